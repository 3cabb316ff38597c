"""bench.py sampling: the peers draw what they should, the arithmetic of reads, and the table; nothing here is timed."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import report
import sampling_peers
import sampling_rows
from attention_rows import Options
from sampling_rows import ADVERSARIAL, FIRST, KINDS, VOCABULARIES, WORK, jobs, logits_of, record

QUICK = Options("reference", quick=True)
LOGITS = logits_of("random", 60)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH"
)


@needs_compiler
def test_partial_sort_draws_the_filtered_distribution() -> None:
    draw = sampling_peers.partial_sort(0.8, 12, 0.9)
    tokens = np.array([draw(LOGITS, seed) for seed in range(100_000)])
    expected = oracle.probabilities(LOGITS[0].numpy(), temperature=0.8, top_k=12, top_p=0.9)
    assert oracle.g_test(tokens, expected) > 0.001
    assert sampling_peers.partial_sort(0.8, 100, 1.0)(LOGITS, 3) < 60  # more than there are


def test_python_peers_draw_the_filtered_distribution() -> None:
    expected = oracle.probabilities(LOGITS[0].numpy(), temperature=0.8, top_k=12, top_p=0.9)
    for draw in (sampling_peers.torch_topk(0.8, 12, 0.9), sampling_peers.transformers_chain(0.8, 12, 0.9)):
        tokens = np.array([int(draw(LOGITS)) for _ in range(4000)])
        assert oracle.g_test(tokens, expected) > 0.001
    least = oracle.probabilities(LOGITS[0].numpy(), min_p=0.1)
    chain = sampling_peers.transformers_chain(min_p=0.1)
    assert oracle.g_test(np.array([int(chain(LOGITS)) for _ in range(2000)]), least) > 0.001


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    sampling_peers._library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        SystemExit, match="needs a C\\+\\+ compiler: none of c\\+\\+, g\\+\\+, clang\\+\\+ is on PATH"
    ):
        sampling_peers.partial_sort(0.8, 12, 0.9)


def test_rows_that_are_meant_to_hurt() -> None:
    ascending, equal, two = (logits_of(kind, 300) for kind in ADVERSARIAL)
    assert bool((ascending.diff() >= 0).all())
    assert len(equal.unique()) == 1
    assert len(two.unique()) == 2
    assert logits_of("random", 300, 5).shape == (5, 300)


def test_the_issue_s_rows_are_all_measured() -> None:
    found = [(job.kind, job.label) for job in jobs(Options())]
    assert {kind for kind, _ in found} == set(KINDS)
    for vocab in VOCABULARIES:
        for work in WORK:
            assert ("work", f"{work}, {vocab}") in found
            assert ("batch", f"{work}, {vocab}") in found
            for kind in ADVERSARIAL:
                assert ("adversarial", f"{kind}, {work}, {vocab}") in found
        assert ("penalties", str(vocab)) in found
    assert len(set(found)) == len(found)


@needs_compiler
def test_a_row_is_measured() -> None:
    row = sampling_rows.work_row(FIRST, 500, QUICK)
    seconds = row["seconds"]
    read = seconds["read"]["min"] - seconds["read, fixed"]["min"]
    assert row["reads"] == (row["draws"]["median"] - seconds["fastattn, fixed"]["min"]) / read
    assert row["reads_mean"] == (row["draws"]["mean"] - seconds["fastattn, fixed"]["min"]) / read
    assert row["draws"]["median"] <= row["draws"]["p99"]
    assert row["required"] == {"reads": 3.0, "speedup": 200.0}
    assert set(row["speedups"]["min"]) == {"transformers", "torch.topk", "partial_sort"}
    assert row["speedup"] == row["beside"]["transformers"]["min"] / row["beside"]["fastattn"]["min"]
    json.dumps(row)


def test_the_other_rows_are_measured() -> None:
    before = torch.get_num_threads()
    penalties = sampling_rows.penalties_row(2000, QUICK)
    hurt = sampling_rows.adversarial_row("two values", FIRST, 500, QUICK)
    batch = sampling_rows.batch_row(FIRST, 100, QUICK)
    dense = sampling_rows.penalties_row(2000, QUICK, dense=True)
    fixed = sampling_rows.fixed_row("fresh seeds", QUICK)
    assert torch.get_num_threads() == before
    seconds = penalties["seconds"]
    more = [seconds[name]["min"] - seconds[f"{name}, fixed"]["min"] for name in ("with", "without", "read")]
    assert penalties["reads"] == pytest.approx((more[0] - more[1]) / more[2])
    fast, slow, none = (hurt["seconds"][name]["min"] for name in ("random", "two values", "fixed"))
    assert hurt["times"] == (slow - none) / (fast - none)
    assert batch["speedup"] == batch["seconds"]["1 thread"]["min"] / batch["seconds"]["2 threads"]["min"]
    assert fixed["call_seconds"] == fixed["seconds"]["fastattn"]["min"]
    assert dense["kind"] == "dense"
    reads = [batch["seconds"][f"read, {name}"]["min"] for name in ("1 thread", "2 threads")]
    assert batch["read_speedup"] == reads[0] / reads[1]
    for row in (penalties, dense, hurt, batch, fixed):
        assert sampling_rows.line(row)
        json.dumps(row)


def test_a_row_is_met_when_all_that_is_required_is() -> None:
    for more, met in (
        ({"reads": 2.9, "speedup": 201.0}, True),
        ({"reads": 3.1, "speedup": 201.0}, False),
        ({"reads": 2.9, "speedup": 199.0}, False),
    ):
        row = record("work", FIRST, 500, {}, **more, required={"reads": 3.0, "speedup": 200.0})
        assert row["met"] is met
    assert not record("adversarial", FIRST, 500, {}, times=4.1, required={"times": 4.0})["met"]
    assert not record("fixed", FIRST, 1, {}, call_seconds=11e-6, required={"call_seconds": 10e-6})["met"]


def made_record() -> report.Row:
    def work(name: str, vocab: int, us: float, reads: float, **more: Any) -> report.Row:
        draws = {"median": us * 1e-6, "mean": us * 1e-6, "p99": us * 1e-6}
        return record(
            "work",
            name,
            vocab,
            {},
            draws=draws,
            reads=reads,
            reads_mean=reads + 1,
            reads_p99=reads + 9,
            **more,
        )

    peers = {"transformers": 250.0, "torch.topk": 12.5, "partial_sort": 6.25}
    rows = [
        work(FIRST, vocab, us, reads, speedup=250.0, speedups={"min": peers}, required={"reads": 3.0, "speedup": 200.0})
        for vocab, us, reads in ((32000, 11.0, 2.5), (128256, 30.0, 3.5))
    ] + [
        work("min-p 0.05 alone", 32000, 9.0, 2.0, speedup=99.0, speedups={"min": {"transformers": 99.0}}, required={"reads": 4.0}),
        record("penalties", "all penalties, 1000 tokens seen", 128256, {}, reads=0.5, required={"reads": 1.0}),
        record("adversarial", FIRST, 128256, {}, row="all equal", times=4.5, required={"times": 4.0}),
        record("adversarial", FIRST, 32000, {}, row="all equal", times=1.5, required={"times": 4.0}),
        record("dense", "dense counts", 32000, {}, reads=2.5, required={}),
        record("batch", FIRST, 32000, {}, batch=64, speedup=1.9, read_speedup=1.7, required={"speedup": 1.8}),
        record("fixed", "numbers", 1, {}, call_seconds=3.5e-6, required={"call_seconds": 10e-6}),
        record("fixed", "fresh seeds", 1, {}, call_seconds=10.5e-6, required={"call_seconds": 10e-6}),
    ]  # fmt: skip
    environment = {
        "cpu": "CPU",
        "threads": 2,
        "isa": "avx2",
        "load_average": 0.1,
        "torch": "2",
        "commit": "c",
        "date": "d",
    }
    return {"rows": rows, "environment": environment}


def test_the_table_says_what_is_missed() -> None:
    text = "\n".join(report.sampling_table(made_record()))
    cells = "11 us, 2.5 (3.5, 11.5) reads, 250x | *30 us, 3.5 (4.5, 12.5) reads, 250x*"
    assert f"| {FIRST} | {cells} | 3 reads, 200x |" in text
    assert "| min-p 0.05 alone | 9 us, 2.0 (3.0, 11.0) reads, 99x |  | 4 reads |" in text
    assert "| all penalties, 1000 tokens seen |  | 0.5 reads more | 1 read more |" in text
    assert "over llama.cpp's way: 6.2x (32000), 6.2x (128256)." in text
    assert (
        f"at most *4.5* times the random row ({FIRST}, all equal, 128256); 1 of 2 are above 4 times." in text
    )
    assert "* dense counts: 2.5 (32000) reads more." in text
    assert "Batch 64, two threads over one, in the order of the table: 1.90; a read of the same" in text
    assert "nothing else: 1.70." in text
    assert "A call's fixed cost: 3.5 us (numbers), *10.5 us* (fresh seeds)." in text


def test_readme_has_room_for_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- sampling -->") == readme.count("<!-- /sampling -->") == 1
