"""The architectures with LayerNorm and a plain MLP against transformers, from folders and from GGUF."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn.info import describe
from fastattn.model import ModelFileError, load_decoder

gguf = pytest.importorskip("gguf")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

from decoder_checks import (  # noqa: E402, F401  # the tests among them run on the pairs below
    check_bfloat16,
    one_thread,
    prompt,
    randomised,
    test_bits,
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
        **NEOX, use_parallel_residual=False, rotary_pct=0.34, rotary_emb_base=500
    ),
    "gpt_neox-plain": lambda: transformers.GPTNeoXConfig(**NEOX, attention_bias=False, rotary_pct=1.0),
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
        **FALCON, num_kv_heads=3, new_decoder_architecture=True, num_ln_in_parallel_attn=1
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
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(101)
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


GGUF_MODELS = [name for name in MODELS if not name.startswith(NOT_IN_GGUF)]
PAIRS = [(name, "hf") for name in MODELS] + [(name, "gguf") for name in GGUF_MODELS]


def random_model(name: str):
    """One of MODELS with random weights."""
    # Falcon's eager attention adds ALiBi twice, to the scores and in the mask.
    return randomised(MODELS[name](), name, "sdpa" if name == "falcon-rw" else "eager")


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, tmp_path_factory):
    """(transformers' model, our decoder)."""
    name, kind = request.param
    model = random_model(name)
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


def edited(path: Path, **values) -> None:
    """Change config.json; None removes a key."""
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


CONFIG_ERRORS = [
    ("opt", "do_layer_norm_before", False, "only True is supported, got False"),
    ("opt", "_remove_final_layer_norm", True, "only False is supported, got True"),
    ("opt", "layer_norm_elementwise_affine", False, "only True is supported, got False"),
    ("opt", "word_embed_proj_dim", 32, "only 48 is supported, got 32"),
    ("phi", "qk_layernorm", True, "only False is supported, got True"),
    ("bloom", "apply_residual_connection_post_layernorm", True, "only False is supported, got True"),
    ("gptj", "rotary_dim", 5, "expected an even number of at most headdim=12, got 5"),
    ("gptj", "rotary_dim", 14, "expected an even number of at most headdim=12, got 14"),
    ("gptj", "activation_function", "tanh", "expected one of silu, swish, gelu"),
    (
        "gpt_neox",
        "rope_parameters",
        {"partial_rotary_factor": 0.25},
        "a share of headdim=12 that is an even number",
    ),
    ("gpt_neox", "rope_parameters", {"partial_rotary_factor": 1.5}, "got 1.5, 18 dimensions"),
    ("gpt_neox", "use_parallel_residual", "no", "expected true or false, got 'no'"),
    ("falcon-new", "num_kv_heads", 4, "expected a divisor of num_attention_heads=6, got 4"),
    ("falcon", "alibi", 1, "expected true or false, got 1"),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), CONFIG_ERRORS, ids=lambda x: str(x)[:20])
def test_config_errors(tmp_path, name, key, value, message):
    random_model(name).save_pretrained(tmp_path)
    edited(tmp_path / "config.json", **{key: value})
    with pytest.raises(ModelFileError, match=message) as caught:
        load_decoder(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "key '" in str(caught.value)


def test_missing_bias(tmp_path):
    """A bias that the architecture always has is asked for by name."""
    from safetensors.torch import load_file, save_file

    random_model("phi").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.fc1.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"tensor 'layers.1.mlp.fc1.bias' is missing"):
        load_decoder(tmp_path)


def test_bloom_of_the_first_checkpoints(tmp_path):
    """Other words for the sizes, and a longest sequence."""
    random_model("bloom").save_pretrained(tmp_path)
    wanted = load_decoder(tmp_path)[0].config
    assert wanted.max_seqlen == 2048
    edited(
        tmp_path / "config.json",
        hidden_size=None,
        n_embed=48,
        n_head=None,
        num_attention_heads=6,
        seq_length=96,
    )
    config = load_decoder(tmp_path)[0].config
    assert config == replace(wanted, max_seqlen=96)


def test_phi_with_fused_qkv(tmp_path):
    """GGUF files of the time before transformers had Phi hold q, k and v as one matrix."""
    model = random_model("phi")
    write_gguf(tmp_path / "three.gguf", model)
    with torch.no_grad():
        for layer in model.model.layers:
            attn = layer.self_attn
            attn.qkv_proj = torch.nn.Linear(48, 3 * 48)
            for kind in ("weight", "bias"):
                parts = [getattr(x, kind) for x in (attn.q_proj, attn.k_proj, attn.v_proj)]
                getattr(attn.qkv_proj, kind).copy_(torch.cat(parts))
            del attn.q_proj, attn.k_proj, attn.v_proj
    write_gguf(tmp_path / "one.gguf", model)
    ids = prompt(20)
    three, one = (load_decoder(tmp_path / f"{name}.gguf")[0] for name in ("three", "one"))
    logits = [d.forward(ids, [20], d.new_cache(1, 20), all_logits=True) for d in (three, one)]
    assert torch.equal(*logits)


def test_falcon_of_another_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_tensor_data_layout",
        lambda self, layout: self.add_string(
            gguf.Keys.LLM.TENSOR_DATA_LAYOUT.format(arch=self.arch), "other"
        ),
    )
    write_gguf(tmp_path / "model.gguf", random_model("falcon"))
    with pytest.raises(
        ModelFileError, match=r"'falcon.tensor_data_layout': only 'jploski' is supported, got 'other'"
    ):
        load_decoder(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("opt", "learned"),
        ("phi", "rotary, base 10000, 6 dimensions"),
        ("bloom", "ALiBi"),
        ("falcon-rw", "ALiBi"),
    ],
)
def test_info(tmp_path, name, positions):
    model = random_model(name)
    model.save_pretrained(tmp_path)
    facts = describe(tmp_path)
    assert facts["positions"] == positions
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt_neox", "gptj", "bloom", "falcon-new"])
def test_bfloat16(tmp_path, name):
    check_bfloat16(random_model(name), tmp_path)
