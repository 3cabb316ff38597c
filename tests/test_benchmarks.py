"""The benchmarks' arithmetic, and the tables made of it: nothing here is timed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import report
import shapes
from attention_rows import Options, disturbed, feature_calls, forward_row, jobs, judge
from shapes import Shape, required

SHAPE = Shape("model", 2, 48, 80, 6, 3, 32)


def visible(shape: Shape) -> int:
    """Counted on the mask itself."""
    i = torch.arange(shape.seqlen_q)[:, None] + shape.seqlen_k - shape.seqlen_q
    j = torch.arange(shape.seqlen_k)[None]
    mask = (j >= 0).expand(shape.seqlen_q, -1).clone()
    left, right = shape.window
    if shape.causal:
        mask &= j <= i
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    return int(mask.sum())


@pytest.mark.parametrize("window", [(-1, -1), (7, 0), (0, 7), (-1, 3), (5, -1), (100, 100)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(48, 80), (80, 48), (64, 64), (1, 80), (1, 1)])
def test_pairs_are_those_of_the_mask(seqlens, causal, window):
    shape = replace(SHAPE, seqlen_q=seqlens[0], seqlen_k=seqlens[1], causal=causal, window=window)
    assert shape.pairs == visible(shape)
    assert shape.flops == 2 * 2 * shape.batch * shape.nheads * visible(shape) * shape.headdim


def test_causal_counts_half():
    full = Shape("model", 1, 1024, 1024, 12, 12, 64)
    assert replace(full, causal=True).flops / full.flops == pytest.approx(0.5, abs=1e-3)
    assert full.flops == 4 * 12 * 64 * 1024**2
    assert full.training_flops == 3.5 * full.flops


def test_bytes_of_a_decode_step():
    shape = Shape("model", 8, 1, 4096, 32, 8, 128)
    assert shape.kv_bytes(2) == 8 * 4096 * 8 * 128 * 2 * 2  # K and V, bf16


def test_requirements():
    full, causal = (shapes.square("GPT-2", 4096, c) for c in (False, True))
    assert required("forward", full, "float32") == {"share": 0.80, "speedup": 1.0}
    assert required("forward", causal, "float32")["share"] == 0.75
    assert required("forward", replace(causal, seqlen_q=1024, seqlen_k=1024), "float32")["share"] == 0.68
    assert required("forward", causal, "float16")["share"] == 0.72
    assert required("avx2", full, "float32") == {"share": pytest.approx(0.64)}
    assert required("training", causal, "bfloat16")["share"] == 0.60
    assert required("decode", shapes.DECODE[0], "bfloat16")["share"] == 0.88
    assert required("short", shapes.SHORT[0], "float32") == {"speedup": 1.3}


def test_a_row_is_met_when_all_that_is_required_is():
    row = {"share_of_limit": 0.81, "speedup": 0.99}
    assert not judge(row, {"share": 0.80, "speedup": 1.0})["met"]
    assert judge(row, {"share": 0.81})["met"]
    assert not judge({}, {"share": 0.5})["met"]


def test_the_issue_s_kinds_are_all_measured():
    kinds = {job.kind for job in jobs(Options())}
    assert kinds == {"forward", "training", "decode", "short", "overhead", "memory", "feature", "avx2"}
    assert {s.headdim for s in shapes.FORWARD} == {64, 128}
    assert {s.seqlen_k for s in shapes.DECODE} == {4096, 8192, 16384, 32768}
    assert "mask, all True" in feature_calls(shapes.SMALLEST)


@pytest.mark.parametrize("extra", ["", "padding mask", "position bias"])
def test_a_row_is_measured(extra):
    shape = replace(shapes.SMALLEST, batch=2, seqlen_q=8, seqlen_k=8, extra=extra)
    row = forward_row("short", shape, "float32", Options(backend="reference", quick=True))
    useful = 0.75 if extra == "padding mask" else 1.0  # its sequences have 4 and 8 keys
    assert row["rate"]["fastattn"] == useful * shape.flops / row["seconds"]["fastattn"]["min"]
    assert row["share_of_limit"] == row["rate"]["fastattn"] / row["limit"]
    assert row["speedup"] == row["seconds"]["sdpa"]["min"] / row["seconds"]["fastattn"]["min"]
    assert disturbed({**row, "free_cores": 0.5})


def made_row(kind: str, shape: Shape, dtype: str, share: float, unit: str) -> report.Row:
    seconds = {"fastattn": {"min": 1e-3, "median": 1e-3}, "sdpa": {"min": 2e-3, "median": 2e-3}}
    rate = {"fastattn": share * 200e9, "sdpa": share * 100e9}
    row = {"kind": kind, **shape.record(), "dtype": dtype, "unit": unit, "seconds": seconds, "rate": rate,
           "limit": 200e9, "share_of_limit": share, "speedup": 2.0}  # fmt: skip
    return judge(row, required(kind, shape, dtype))


def made_record() -> report.Row:
    rows = [
        made_row("forward", shapes.FORWARD[2], "float32", 0.81, "GFLOP/s"),
        made_row("forward", shapes.FORWARD[2], "bfloat16", 0.70, "GFLOP/s"),
        made_row("decode", shapes.DECODE[0], "float32", 0.9, "GB/s"),
    ]
    environment = {
        "cpu": "CPU",
        "threads": 2,
        "isa": "avx2",
        "load_average": 0.1,
        "torch": "2",
        "commit": "c",
        "date": "d",
    }
    skipped = [{"kind": "decode", "row": "long", "reason": "too large"}]
    return {
        "rows": rows,
        "skipped": skipped,
        "fma_peak": 200e9,
        "read_bandwidth": [30e9, 40e9],
        "environment": environment,
    }


def test_tables_say_what_is_missed():
    text = "\n".join(report.attention_table(made_record()))
    assert "| GPT-2 (12/12, 64): 4096 tokens | 162, 81 %, 2.0x | *140, 70 %, 2.0x* | 80 % / 72 % |" in text
    assert "| Llama-3-8B (32/8, 128): 4096 keys, batch 1 | 180, 90 %, 2.0x | 88 % |" in text
    assert "30 to 40 GB/s" in text
    assert "Not measured: decode, long: too large." in text


def test_the_plot_follows_from_the_rows_alone(tmp_path):
    pytest.importorskip("matplotlib")
    from plot import draw

    rows = made_record()["rows"]
    for name in ("a.svg", "b.svg"):
        draw(rows, tmp_path / name, "sha256 of the rows")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "sha256 of the rows" in (tmp_path / "a.svg").read_text()


def test_models_are_measured_and_tabled():
    pytest.importorskip("transformers")
    from model_rows import MODELS, WORKS, bench_models, geometric_mean, model_rows

    rows = [
        row
        for model in MODELS
        if model.name.startswith(("BLOOM", "T5"))
        for row in model_rows(model, 16, "float32", list(WORKS), True)
    ]
    for row in rows:
        others = {who: t["min"] for who, t in row["seconds"].items() if who not in ("fastattn", "free")}
        if row["model"] == "T5-small":
            assert row["limit"] == others[row["default"]] / row["seconds"]["free"]["min"]
        assert row["speedup"] == others[row["default"]] / row["seconds"]["fastattn"]["min"]
        assert row["speedup_best"] == min(others.values()) / row["seconds"]["fastattn"]["min"]
        assert row["error"] < 1e-5
    assert {row["what"] for row in rows} == {"forward", "training"}
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    record = {"rows": rows, "geometric_means": {"float32": 1.25}, "environment": made_record()["environment"]}
    text = "\n".join(report.models_table(record))
    assert "| float32 | BLOOM-560M, 1 | 16 |" in text
    assert "BLOOM-560M: adapter: causal self-attention with ALiBi" in text
    assert "1.25x (float32)" in text
    assert "x eager" in text
    kept = {**rows[-1], "seqlen": 32, "mark": "kept"}  # only what is asked for is measured anew
    first, second = bench_models(True, ["float32:T5-small:32:forward"], {"rows": [kept]})["rows"]
    assert (first["model"], first["seqlen"], first["what"]) == ("T5-small", 32, "forward")
    assert second == kept
