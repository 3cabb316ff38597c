"""Tiny GGUF files give the logits and the greedy tokens of llama.cpp, by a fixture."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from decoder_checks import one_thread, prompt  # noqa: E402, F401
from make_llamacpp_logits import KEPT, NAMES, OUT, SEQLEN, written  # noqa: E402

from fastattn.model import load_decoder  # noqa: E402

TOLERANCE = 0.01  # llama.cpp looks GELU up in a table of float16


@pytest.fixture(scope="module")
def golden():
    return safetensors.load_file(OUT)


@pytest.mark.parametrize("name", NAMES)
def test_llamacpp(golden, tmp_path, name):
    total = written(name, tmp_path / "model.gguf")
    assert abs(total - golden[f"{name}.sum"]) < 1e-6, "other weights: run make_llamacpp_logits.py"
    decoder, _ = load_decoder(tmp_path / "model.gguf")
    cache = decoder.new_cache(1, 64)
    logits = decoder.forward(prompt(SEQLEN), [SEQLEN], cache, all_logits=True)
    torch.testing.assert_close(logits[-KEPT:], golden[f"{name}.logits"], atol=TOLERANCE, rtol=0)
    for token in golden[f"{name}.greedy"].tolist():
        assert logits[-1].argmax() == token
        logits = decoder.forward(torch.tensor([token]), [1], cache)
