"""Llama, Mistral, Qwen and Gemma against transformers: rope scalings, windows, soft caps; folders and GGUF."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fastattn.generate import LLM
from fastattn.model import ModelFileError, RopeScaling, load_decoder
from fastattn.model.config import Fields
from fastattn.model.gemma2 import gguf_window
from fastattn.model.kv_cache import Ring
from fastattn.model.rope import read_gguf_rope

pytest.importorskip("gguf")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

from decoder_checks import (  # noqa: E402, F401  # the tests among them run on the pairs below
    TOLERANCE,
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
from tiny_vocabulary import tiny_tokenizer  # noqa: E402

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 7,
}
WINDOW = 6  # its ring holds 16 tokens: the longer sequences of every test roll over


def scaled(kind: str, **values) -> dict:
    return {**SIZES, "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.25}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GEMMA = {**SIZES, "head_dim": 16, "sliding_window": WINDOW}
GEMMA3_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

MODELS = {
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-rope3": lambda: transformers.LlamaConfig(
        **scaled("llama3", **LLAMA3, original_max_position_embeddings=32)
    ),
    "llama-linear": lambda: transformers.LlamaConfig(**scaled("linear", factor=4.0)),
    "llama-yarn": lambda: transformers.LlamaConfig(**scaled("yarn", **YARN)),
    "llama-yarn-mscale": lambda: transformers.LlamaConfig(
        **scaled("yarn", **YARN, mscale=0.7, mscale_all_dim=1.4, truncate=False)
    ),
    "llama-headdim": lambda: transformers.LlamaConfig(**SIZES, head_dim=16),
    "llama-bias": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2-window": lambda: transformers.Qwen2Config(**SIZES, **QWEN_WINDOW),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3-window": lambda: transformers.Qwen3Config(**SIZES, **QWEN_WINDOW, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **GEMMA, query_pre_attn_scalar=16, attn_logit_softcapping=3.0, final_logit_softcapping=5.0
    ),
    "gemma2-plain": lambda: transformers.Gemma2Config(
        **GEMMA, query_pre_attn_scalar=48, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GEMMA, query_pre_attn_scalar=16, layer_types=GEMMA3_LAYERS, rope_parameters=GEMMA3_ROPE
    ),
}
FOLDERS_ONLY = {
    "llama-yarn-mscale",
    "qwen2-window",
    "qwen3-window",
    "gemma2-plain",
}  # GGUF has no keys for them
GGUF_MODELS = [name for name in MODELS if name not in FOLDERS_ONLY]
PAIRS = [(name, "hf") for name in MODELS] + [(name, "gguf") for name in GGUF_MODELS]
WINDOWED = ["mistral-window", "qwen2-window", "gemma2", "gemma3"]


def random_model(name: str):
    """One of MODELS with random weights."""
    model = randomised(MODELS[name](), name)
    if name.startswith("gemma"):
        with (
            torch.no_grad()
        ):  # token vectors come in times 7: the tied head would again predict what it has read
            model.model.embed_tokens.weight.mul_(0.15)
            model.model.norm.weight.add_(5)
    return model


def load(name: str, kind: str, path):
    """(transformers' model, our decoder)."""
    model = random_model(name)
    if kind == "hf":
        model.save_pretrained(path)
    else:
        path = path / "model.gguf"
        write_gguf(path, model)
    return model, load_decoder(path)[0]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, tmp_path_factory):
    return load(*request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=WINDOWED)
def windowed(request, tmp_path_factory):
    return load(request.param, "hf", tmp_path_factory.mktemp("model"))[1]


def run(decoder, rows, pieces, cache=None):
    """Logits of the rows, each (seqlen, vocab), fed ``pieces`` tokens of every row at a time."""
    cache = decoder.new_cache(len(rows), 1) if cache is None else cache
    logits = [[] for _ in rows]
    for parts in zip(*(row.split(pieces) for row in rows)):
        seqlens = [len(part) for part in parts]
        flat = decoder.forward(torch.cat(parts), seqlens, cache, all_logits=True)
        for row, part in zip(logits, flat.split(seqlens)):
            row.append(part)
    return [torch.cat(row) for row in logits]


def test_window_keeps_its_bits(windowed):
    """Pieces, steps, batchmates and threads change nothing, though each fills the ring in its own way."""
    rows = [prompt(60, seed) for seed in (1, 2, 3)]
    whole = run(windowed, rows[:1], 60)[0]
    for pieces in (1, 7, 25):
        assert torch.equal(run(windowed, rows[:1], pieces)[0], whole)
        assert torch.equal(run(windowed, rows, pieces)[0], whole)
    torch.set_num_threads(2)
    try:
        assert torch.equal(run(windowed, rows, 25)[0], whole)
    finally:
        torch.set_num_threads(1)


def test_window_bounds_memory(windowed):
    config, ring = windowed.config, Ring(WINDOW)
    assert ring.tokens == 16
    cache = windowed.new_cache(2, 64)
    for layer in range(config.nlayers):
        tokens = ring.tokens if layer in config.local_layers else 64
        assert cache.k[layer].shape == (2, tokens, config.nheads_k, config.headdim)
    kept = sum(ring.tokens if n in config.local_layers else 64 for n in range(config.nlayers))
    assert cache.nbytes == 2 * 2 * kept * config.nheads_k * config.headdim * 4
    short = windowed.new_cache(1, 3)
    assert all(k.shape[1] <= 8 for k in short.k)  # no more than asked for, in whole pages


def test_rewind(windowed):
    """What is left goes on as if nothing had been after it; where the window is gone, nothing is left."""
    ids, other = prompt(60, 1), prompt(64, 2)
    for held, wanted, kept in [
        (16, 3, 3),
        (20, 3, 0),
        (60, 58, 58),
        (60, 49, 49),
        (60, 48, 0),
        (60, 20, 0),
        (60, 0, 0),
        (60, 64, 60),
    ]:
        cache = windowed.new_cache(1, 64)
        run(windowed, [ids[:held]], 60, cache)
        assert cache.rewind([wanted]) == [kept]
        new = torch.cat([ids[:kept], other[kept : kept + 4]])
        logits = windowed.forward(new[kept:], [4], cache, all_logits=True)
        assert torch.equal(logits, run(windowed, [new], 64)[0][kept:])
    cache = windowed.new_cache(2, 64)
    run(windowed, [ids, other[:60]], 60, cache)
    cache.rewind([59, 58])
    assert cache.rewind([50, 20]) == [50, 0]  # from what was written, not from what is left
    cache.select([1, 0])
    logits = windowed.forward(torch.cat([other[:5], ids[50:54]]), [5, 4], cache, all_logits=True)
    assert torch.equal(logits[:5], run(windowed, [other[:5]], 5)[0])
    assert torch.equal(logits[5:], run(windowed, [ids[:54]], 54)[0][50:])


def test_conversation(tmp_path):
    """What a turn reads again beyond the window's reach is read from the start: the answer is that of a new chat."""
    tokenizer = tiny_tokenizer()
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512}
    randomised(transformers.MistralConfig(**sizes, sliding_window=WINDOW), "mistral").save_pretrained(
        tmp_path
    )
    llm = LLM(load_decoder(tmp_path)[0], tokenizer)
    options = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
    talk = llm.conversation()
    for text in ("hello", "hello world", "12345"):
        stream = talk.send(text, **options)
        asked = talk.messages[:-1]
        answer = "".join(stream)
        fresh = llm.chat(asked, **options)
        assert (answer, stream.completion.token_ids) == (fresh.text, fresh.token_ids)
    assert stream.row.cached == 0  # bytes that are no text are other tokens when they are read again


def test_dynamic(tmp_path):
    """Beyond the trained length every token turns as transformers turns it when it decodes with its cache."""
    config = transformers.LlamaConfig(**{**scaled("dynamic", factor=3.0), "max_position_embeddings": 24})
    model = randomised(config, "llama-dynamic")
    model.save_pretrained(tmp_path)
    decoder, _ = load_decoder(tmp_path)
    assert decoder.config.max_seqlen == 72
    ids = prompt(72)
    cache, past = decoder.new_cache(2, 72), transformers.DynamicCache()
    for start, end in [(0, 20), *((n, n + 1) for n in range(20, 72))]:
        piece = ids[start:end]
        with torch.no_grad():
            wanted = model(piece[None], past_key_values=past).logits[0]  # (tokens, vocab)
        mates = prompt(max(1, len(piece) - 3), seed=end)  # another row is elsewhere in its text
        logits = decoder.forward(torch.cat([piece, mates]), [len(piece), len(mates)], cache, all_logits=True)
        torch.testing.assert_close(logits[: len(piece)], wanted, atol=TOLERANCE, rtol=TOLERANCE)
    with pytest.raises(ValueError, match=r"row 0 would hold 25 tokens; beyond 24, .* one at a time"):
        decoder.forward(ids[:25], [25], decoder.new_cache(1, 72))


def test_yarn_reaches_further(tmp_path):
    """The files name the trained length, as Qwen's do: the model is for factor times as much."""
    yarn = {"factor": 2.0, "original_max_position_embeddings": 64}
    model = randomised(transformers.Qwen2Config(**scaled("yarn", **yarn)), "qwen2-yarn")
    model.save_pretrained(tmp_path)
    decoder, _ = load_decoder(tmp_path)
    ids = prompt(128)
    logits = run(decoder, [ids], 100)[0]
    torch.testing.assert_close(logits, reference(model, ids), atol=TOLERANCE, rtol=TOLERANCE)


def edit(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_older_configs(tmp_path):
    """The keys of files from before transformers 5 mean the same."""
    old = {
        "gemma3": {
            "rope_parameters": None,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "layer_types": None,
            "sliding_window_pattern": 3,
        },
        "qwen2-window": {"layer_types": None, "rope_parameters": None, "rope_theta": 10000.0},
        "llama-yarn": {
            "rope_parameters": None,
            "rope_theta": 500.0,
            "rope_scaling": {"type": "yarn", **YARN},
        },
    }
    for name, values in old.items():
        (folder := tmp_path / name).mkdir()
        _, decoder = load(name, "hf", folder)
        edit(folder, **values)
        assert load_decoder(folder)[0].config == decoder.config


ERRORS = {
    "layer_types": (["full_attention"], "expected 3 of sliding_attention, full_attention, got"),
    "sliding_window": (-1, r"expected an integer in \[0, "),
    "use_bidirectional_attention": (True, "only False is supported, got True"),
    "query_pre_attn_scalar": (0, "expected a number > 0, got 0"),
    "final_logit_softcapping": ("much", "expected a number > 0, got 'much'"),
    "hidden_activation": ("tanh", "expected one of silu"),
    "head_dim": (15, "expected an even number for rotary embedding, got 15"),
}


@pytest.fixture(scope="module")
def gemma3_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma3")
    load("gemma3", "hf", path)
    return path, (path / "config.json").read_text()


@pytest.mark.parametrize("key", ERRORS)
def test_config_errors(gemma3_folder, key):
    folder, before = gemma3_folder
    (folder / "config.json").write_text(before)
    value, message = ERRORS[key]
    edit(folder, **{key: value})
    with pytest.raises(ModelFileError, match=f"config.json: key '{key}': {message}"):
        load_decoder(folder)


ROPE_ERRORS = [
    ({"rope_type": "longrope"}, "'longrope' is not supported; default, linear, dynamic, yarn, llama3 are"),
    ({"rope_type": "yarn", "rope_theta": 500.0}, "key 'rope_parameters.factor': missing"),
    ({"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}, "expected more than 1 for yarn, got 1.0"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "'rope_parameters.beta_fast': expected a number"),
    ({"rope_type": "dynamic", "factor": 0}, "'rope_parameters.factor': expected a number > 0, got 0"),
    ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "expected more than low_freq_factor=1.0"),
]


def test_rope_errors(tmp_path):
    load("llama-linear", "hf", tmp_path)
    for rope, message in ROPE_ERRORS:
        edit(tmp_path, rope_parameters=rope)
        with pytest.raises(ModelFileError, match=message):
            load_decoder(tmp_path)


def test_gguf_rope():
    """What llama.cpp makes of the keys."""

    def read(**scaling):
        values = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
        fields = Fields(Path("tiny.gguf"), {**values, "llama.context_length": 4096})
        return read_gguf_rope(fields, "llama", 8).scaling

    assert read() is read(type="none") is None
    assert read(factor=2.0) == read(type="linear", factor=2.0) == RopeScaling("linear", 2.0)
    yarn = {"type": "yarn", "factor": 4.0}
    sharper = 1 + 0.1 * math.log(4)
    assert read(**yarn) == RopeScaling("yarn", 4.0, 4096, attention_factor=sharper)
    assert read(**yarn, attn_factor=0.5).attention_factor == 0.5 * sharper
    assert read(**yarn, yarn_log_multiplier=1.0).attention_factor == 1.0
    assert read(**yarn, original_context_length=512, yarn_beta_fast=8.0).original_max_seqlen == 512
    with pytest.raises(ModelFileError, match="'longrope' is not supported; none, linear, yarn are"):
        read(type="longrope")
    with pytest.raises(ModelFileError, match=r"yarn_ext_factor': only 1.0 is supported, got 0.5"):
        read(**yarn, yarn_ext_factor=0.5)


def test_gguf_window():
    """A pattern is a number, or a list that says it of every layer; without a window there is none."""

    def read(**values):
        keys = {f"gemma3.{key}": value for key, value in values.items()}
        return gguf_window("gemma3", Fields(Path("tiny.gguf"), {**keys, "gemma3.block_count": 7}), 6, None)

    window, pattern = "attention.sliding_window", "attention.sliding_window_pattern"
    assert read() == {}
    assert read(**{window: 512}) == {"window": 512, "local_layers": (0, 1, 2, 3, 4, 6)}
    assert read(**{window: 512, pattern: 2})["local_layers"] == (0, 2, 4, 6)
    listed = [True, False, False, True, False, False, False]
    assert read(**{window: 512, pattern: listed})["local_layers"] == (0, 3)
    for broken in (listed[:6], [*listed[:6], "yes"]):
        with pytest.raises(ModelFileError, match="expected a bool for each of the 7 layers"):
            read(**{window: 512, pattern: broken})


def test_missing_parts(tmp_path):
    """What one of them has more is not optional."""
    from safetensors.torch import load_file, save_file

    for name, part in [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.2.self_attn.q_norm.weight"),
        ("gemma2", "model.layers.0.post_feedforward_layernorm.weight"),
    ]:
        (folder := tmp_path / name).mkdir()
        load(name, "hf", folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({key: x for key, x in tensors.items() if key != part}, folder / "model.safetensors")
        wanted = f"tensor '{part.removeprefix('model.')}' is missing"
        with pytest.raises(ModelFileError, match=wanted):
            load_decoder(folder)
