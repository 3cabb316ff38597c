"""The training example: a few steps of a tiny model, by both attentions, and what becomes of the folder."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from tree import ROOT

from fastattn import load_model
from fastattn.perplexity import perplexity

_spec = importlib.util.spec_from_file_location("train_bytes", ROOT / "examples" / "train_bytes.py")
assert _spec is not None
assert _spec.loader is not None
train_bytes = importlib.util.module_from_spec(_spec)
sys.modules["train_bytes"] = train_bytes
_spec.loader.exec_module(train_bytes)

CONFIG = train_bytes.Config(hidden=32, nlayers=2, nheads=2, seqlen=48, batch=2, steps=25, learning_rate=1e-2)
TEXT = b"the cat sat on the mat, and the dog sat on the cat. " * 20


@pytest.fixture(scope="module")
def trained():
    """Runs by way, after training."""
    attends = {"fastattn": train_bytes.by_fastattn, "torch SDPA": train_bytes.by_torch}
    ways = {name: train_bytes.Run.start(CONFIG, attend) for name, attend in attends.items()}
    ways["again"] = train_bytes.Run.start(CONFIG, train_bytes.by_torch, perturbed=True)
    train_bytes.train(CONFIG, train_bytes.as_ids([TEXT, TEXT[:100]]), ways)
    return ways


def test_loss_falls_alike(trained):
    ours, torchs, again = (run.losses for run in trained.values())
    assert len(ours) == CONFIG.steps
    assert ours[-1] < 0.7 * ours[0]
    assert ours == pytest.approx(torchs, abs=1e-3)
    assert again != torchs  # its weights did differ


def test_what_the_runs_show(trained, tmp_path):
    record = train_bytes.summary(CONFIG, trained)
    expected = max(abs(a - b) for a, b in zip(trained["fastattn"].losses, trained["torch SDPA"].losses))
    assert record["largest_difference"] == expected
    assert set(record["median_step_seconds"]) == set(trained)
    train_bytes.draw(record, tmp_path / "train.svg")
    assert "minus torch SDPA" in (tmp_path / "train.svg").read_text()


def test_the_folder_loads_and_writes(trained, tmp_path):
    model = trained["fastattn"].model
    model.save(tmp_path)
    llm = load_model(tmp_path)
    ids = list(b"the cat sat")
    assert llm.tokenizer.encode("the cat sat") == ids
    assert llm.tokenizer.encode("caf\u00e9") == list("caf\u00e9".encode())
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    torch.testing.assert_close(llm.logits(ids), expected, atol=1e-4, rtol=1e-4)
    written = llm.generate("the cat", max_new_tokens=8, temperature=0)
    assert 1 <= len(written.token_ids) <= 8
    assert perplexity(llm, TEXT.decode()).perplexity < 0.5 * perplexity(llm, TEXT.decode().upper()).perplexity


def test_transformers_reads_the_folder(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = trained["fastattn"].model
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([list(b"the cat sat")])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=1e-4)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    text, record = tmp_path / "text.txt", tmp_path / "record.json"
    text.write_bytes(TEXT)
    sizes = [
        f"--{name}={getattr(CONFIG, name)}" for name in ("hidden", "nlayers", "nheads", "seqlen", "batch")
    ]
    given = [
        "--out",
        str(tmp_path / "model"),
        "--text",
        str(text),
        "--steps=2",
        "--record",
        str(record),
        *sizes,
    ]
    monkeypatch.setattr(sys, "argv", ["train_bytes.py", *given])
    train_bytes.main()
    assert "fastattn: loss 5." in capsys.readouterr().out
    assert json.loads(record.read_text())["text"].startswith("In the beginning")
    monkeypatch.setattr(sys, "argv", ["train_bytes.py", *given, "--seqlen=2000"])
    with pytest.raises(SystemExit, match="text: expected more than 2001 bytes, got 1041"):
        train_bytes.main()
