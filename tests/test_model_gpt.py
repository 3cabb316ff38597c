"""The architectures with LayerNorm and a plain MLP against transformers, from folders and from GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastattn.model import load_decoder

gguf = pytest.importorskip("gguf")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

from decoder_checks import (  # noqa: E402, F401  # the tests among them run on the pairs below
    one_thread,
    randomised,
    test_greedy,
    test_pieces,
    test_prefill,
    test_ragged_batch,
)

SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "eos_token_id": 7, "bos_token_id": 1}
NEOX = {**SIZES, "num_attention_heads": 4, "intermediate_size": 80, "max_position_embeddings": 64}
FALCON = {**SIZES, "num_attention_heads": 6, "max_position_embeddings": 64}
OPT = {**SIZES, "num_attention_heads": 4, "ffn_dim": 80, "max_position_embeddings": 64}
GPTJ = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 6}

MODELS = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX, rotary_pct=0.5),
    "gpt_neox-serial": lambda: transformers.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=0.34, rotary_emb_base=500
    ),
    "gptj": lambda: transformers.GPTJConfig(**GPTJ, eos_token_id=7, bos_token_id=1),
    "gptj-inner": lambda: transformers.GPTJConfig(**GPTJ, n_inner=80, eos_token_id=7, bos_token_id=1),
    "opt": lambda: transformers.OPTConfig(**OPT),
    "opt-plain": lambda: transformers.OPTConfig(
        **OPT, activation_function="gelu", enable_bias=False, tie_word_embeddings=False
    ),
    "phi": lambda: transformers.PhiConfig(**NEOX),
    "phi-grouped": lambda: transformers.PhiConfig(**NEOX, num_key_value_heads=2, partial_rotary_factor=0.7),
    "bloom": lambda: transformers.BloomConfig(**SIZES, n_head=6),
    "bloom-untied": lambda: transformers.BloomConfig(**SIZES, n_head=4, tie_word_embeddings=False),
    "falcon": lambda: transformers.FalconConfig(**FALCON),
    "falcon-new": lambda: transformers.FalconConfig(**FALCON, num_kv_heads=3, new_decoder_architecture=True),
    "falcon-new-one-norm": lambda: transformers.FalconConfig(
        **FALCON, num_kv_heads=3, new_decoder_architecture=True, num_ln_in_parallel_attn=1, bias=True
    ),
    "falcon-many": lambda: transformers.FalconConfig(**FALCON, multi_query=False, ffn_hidden_size=80),
    "falcon-rw": lambda: transformers.FalconConfig(
        **{**FALCON, "num_attention_heads": 8}, multi_query=False, parallel_attn=False, alibi=True, bias=True
    ),
}
NOT_IN_GGUF = ("opt", "falcon-rw")
IN_GGUF = {
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "gptj": gguf.MODEL_ARCH.GPTJ,
    "phi": gguf.MODEL_ARCH.PHI2,
    "bloom": gguf.MODEL_ARCH.BLOOM,
    "falcon": gguf.MODEL_ARCH.FALCON,
}


def write_gguf(path: Path, model) -> None:
    """What llama.cpp's converter would write, by the gguf package's own table of names."""
    config = model.config
    arch = IN_GGUF[config.model_type]
    nlayers, nheads, hidden = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    headdim = hidden // nheads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(nlayers)
    writer.add_head_count(nheads)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(7)
    sizes = (getattr(config, key, None) for key in ("intermediate_size", "ffn_hidden_size", "n_inner"))
    writer.add_feed_forward_length(next((size for size in sizes if size), 4 * hidden))
    eps = (getattr(config, key, None) for key in ("layer_norm_epsilon", "layer_norm_eps"))
    writer.add_layer_norm_eps(next(x for x in eps if x))
    groups = nheads  # of queries, a key and a value, that a fused matrix consists of
    if config.model_type == "gpt_neox":
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * headdim))
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_parallel_residual(config.use_parallel_residual)
    if config.model_type == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
        writer.add_tensor_data_layout("jploski")
        writer.add_head_count_kv(groups)
    if config.model_type == "phi":
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * headdim))
        writer.add_head_count_kv(config.num_key_value_heads)
    if config.model_type == "gptj":
        writer.add_rope_dimension_count(config.rotary_dim)

    names = gguf.get_tensor_name_map(arch, nlayers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "query_key_value" in key:
            parts = weight.view(groups, nheads // groups + 2, headdim, *weight.shape[1:])
            parts = (parts[:, :-2], parts[:, -2], parts[:, -1])
            weight = torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])
        key = (
            key.removeprefix("transformer.") if config.model_type == "bloom" else key
        )  # as the converter does
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


PAIRS = [(name, "hf") for name in MODELS] + [
    (name, "gguf") for name in MODELS if not name.startswith(NOT_IN_GGUF)
]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, tmp_path_factory):
    """(transformers' model, our decoder)."""
    name, kind = request.param
    # Falcon's eager attention adds ALiBi twice, to the scores and in the mask.
    model = randomised(MODELS[name](), name, "sdpa" if name == "falcon-rw" else "eager")
    path = tmp_path_factory.mktemp("model")
    if kind == "hf":
        model.save_pretrained(path)
    else:
        path = path / "model.gguf"
        write_gguf(path, model)
    decoder, file = load_decoder(path)
    assert file.kind == kind
    assert decoder.config.eos_ids == (7,)
    return model, decoder
