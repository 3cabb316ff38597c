"""Perplexity over windows: against transformers' own loss, window by window, and on the command line."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from test_cli import fastattn  # noqa: F401
from test_generate import tiny_llm
from test_train_bytes import train_bytes
from tiny_vocabulary import needs_smollm2

from fastattn.generate import default_model, load_model
from fastattn.perplexity import perplexity

TEXT = "hello w! 🙂 12345 he said: hello, hello wll. "


def by_the_book(logits_of, ids, context, stride):
    """The sum of -log p in float64, from windows whose tokens count once."""
    total, previous, begin = 0.0, 1, 0
    while True:
        end = min(begin + context, len(ids))
        logp = logits_of(ids[begin:end]).double().log_softmax(-1)
        for position in range(previous, end):
            total -= logp[position - begin - 1, ids[position]].item()
        if end == len(ids):
            return total
        previous, begin = end, begin + stride


@pytest.mark.parametrize(("context", "stride"), [(None, None), (2, 1), (7, 3), (8, 7), (16, None), (31, 1)])
def test_windows(context, stride):
    llm = tiny_llm("hello w! 🙂")
    ids = llm.tokenizer.encode(TEXT)
    seen = []
    found = perplexity(llm, TEXT, context=context, stride=stride, progress=lambda *x: seen.append(x))
    expected = by_the_book(llm.logits, ids, found.context, found.stride)
    assert found.negative_log_likelihood == pytest.approx(expected, rel=1e-5)
    assert found.tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(expected / found.tokens), rel=1e-5)
    first = llm.tokenizer.decode(ids[:1], skip_special=True)
    assert found.bytes == len(TEXT.encode()) - len(first.encode())
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / found.bytes, rel=1e-5)
    assert seen[-1] == (len(ids), len(ids))
    assert seen == sorted(seen)


def test_one_window_is_transformers_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=256
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(train_bytes.byte_tokenizer()))
    ids = torch.tensor([list(TEXT.encode())])  # (1, seqlen)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    found = perplexity(load_model(tmp_path), TEXT)
    assert found.tokens == found.bytes == ids.shape[1] - 1
    assert math.log(found.perplexity) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 1}, "context: expected a value in [2, "),
        ({"context": 10**6}, "context: expected a value in [2, "),
        ({"context": 8, "stride": 8}, "stride: expected a value in [1, 7], got 8"),
        ({"stride": 0}, "stride: expected a value in [1, "),
        ({"text": "h"}, "text: expected at least 2 tokens, got 1"),
        ({"text": ""}, "text: expected at least 2 tokens, got 0"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"text": TEXT, **change}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        perplexity(tiny_llm("hello w! 🙂"), given.pop("text"), **given)


def test_command(fastattn, tmp_path):  # noqa: F811
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    expected = perplexity(tiny_llm("hello w! 🙂"), TEXT, context=16, stride=4)
    status, out, err = fastattn("ppl", str(file), "-c", "16", "-s", "4")
    assert status == 0
    assert out.startswith(f"perplexity {expected.perplexity:.4f} +- {expected.standard_error:.4f}, ")
    assert f"{expected.tokens} tokens, {expected.bytes} bytes | context 16, stride 4" in err
    status, out, _ = fastattn("ppl", str(file), "-c", "16", "-s", "4", "--json")
    assert json.loads(out)["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    status, _, err = fastattn("ppl", str(tmp_path / "none.txt"))
    assert status == 1
    assert "none.txt" in err


@needs_smollm2
def test_english_is_expected_more_than_its_words_in_disorder():
    llm = load_model(default_model())
    text = (
        "The capital of France is Paris, and the capital of Italy is Rome. Both are large cities in Europe."
    )
    found, shuffled = (perplexity(llm, x) for x in (text, " ".join(sorted(text.split()))))
    assert 2 < found.perplexity < 20
    assert found.bits_per_byte < 1.2
    assert shuffled.perplexity > 5 * found.perplexity
