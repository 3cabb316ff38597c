"""The GPU benchmark: it says why it cannot run, and its arithmetic is right. Its figures need a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tree import ROOT

from fastattn import available_backends

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_gpu
from shapes import Shape


@pytest.mark.skipif(available_backends()["cuda"] is None, reason="there is a GPU")
def test_it_says_why_it_cannot_run():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py"), "--save"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("bench_gpu needs a GPU and the CUDA kernels: ")
    assert available_backends()["cuda"] in done.stderr
    assert "Traceback" not in done.stderr
    assert not (ROOT / "benchmarks" / "results" / "gpu.json").exists()


def test_flops_and_bytes():
    """By hand: two products of 2 FLOPs for each visible pair; K and V read once."""
    square = Shape("x", 2, 4, 4, 8, 2, 16)
    assert bench_gpu.tflops(square, 1e-6) == pytest.approx(2 * 8 * (4 * 4) * 16 * 4 / 1e6)
    causal = Shape("x", 1, 4, 4, 8, 2, 16, causal=True)
    assert bench_gpu.tflops(causal, 1.0) == pytest.approx(8 * 10 * 16 * 4 / 1e12)
    step = Shape("x", 3, 1, 100, 8, 2, 64)
    assert bench_gpu.gbytes(step, 2, 1e-3) == pytest.approx(3 * 100 * 2 * 64 * 2 * 2 / 1e6)
    assert bench_gpu.matmul_flops() == pytest.approx(2 * 8192**3)


def test_every_shape_fits_the_kernels():
    for shape in (*bench_gpu.FORWARD, *bench_gpu.DECODE):
        assert shape.headdim <= 128
        assert shape.nheads % shape.nheads_k == 0
    assert all(shape.seqlen_q == 1 for shape in bench_gpu.DECODE)
