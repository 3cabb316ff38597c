"""The kernels, for CPUs and emulated, on AddressSanitizer + UndefinedBehaviorSanitizer builds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from simt.emulator import compile_units, link
from simt.mutants import FLOAT_FAMILIES, HEADDIM_OF
from simt.probes import PROBES
from simt.sanitized import SANITIZE
from tree import run

KERNEL_TESTS = [
    "tests/test_kvcache.py",
    "tests/test_kvcache_layouts.py",
    "tests/test_varlen.py",
    "tests/test_backward_kernel.py::test_features",
    "tests/test_backward_kernel.py::test_bias_shapes",
    "tests/test_backward_kernel.py::test_packed_sequences",
    "tests/test_dropout.py::test_the_mask_is_the_one_defined",
    "tests/test_linear.py",
    "tests/test_fused.py",
    "tests/test_attention.py::test_random_calls",
    "tests/test_attention.py::test_strides",
    "tests/test_attention.py::test_many_chunks",
    "tests/test_attention.py::test_rows_without_keys",
    "tests/test_attention.py::test_bits_do_not_depend_on_threads_or_batch",
]


@pytest.fixture
def preload():
    """The environment of a Python that can import what is built with sanitizers."""
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if "/" not in runtime:
        pytest.skip("the compiler has no AddressSanitizer runtime (libasan.so)")
    return {
        "LD_PRELOAD": f"{runtime}:{runtime.replace('libasan', 'libubsan')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # CPython itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.parametrize("dtype", ["f16_t", "float"])
def test_emulated_cuda_kernels_under_sanitizers(dtype, preload, cuda_bindings, tmp_path):
    families = [family for family in PROBES if (family in FLOAT_FAMILIES) == (dtype == "float")]
    headdims = tuple({HEADDIM_OF[family] for family in families})
    objects = compile_units(
        tmp_path, headdims=headdims, flags=("-Og", "-w", f"-DFASTATTN_CUDA_TYPES={dtype}", *SANITIZE)
    )
    module = link(tmp_path, cuda_bindings, objects, SANITIZE[:1])
    out = run(sys.executable, "tests/simt/sanitized.py", "probe", module, *families, **preload)
    assert f"clean: {' '.join(families)}" in out, out


def test_kernels_under_sanitizers(source, preload):
    run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--inplace",
        cwd=source,
        FASTATTN_SANITIZE="address,undefined",
    )
    preload = preload | {"PYTHONPATH": str(source)}
    out = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *KERNEL_TESTS,
        cwd=source,
        **preload,
    )
    assert " passed" in out, out

    # The sanitizer is really there: a cache length past the end of the buffer is caught.
    overrun = (
        "import torch; from fastattn.backends import cpu; from fastattn.args import AttentionArgs;"
        "x = torch.zeros(1, 4, 1, 64);"
        "cpu.attention(AttentionArgs(x, x, x, 1.0, seqlens_k=torch.tensor([4000], dtype=torch.int32)))"
    )
    broken = subprocess.run([sys.executable, "-c", overrun], env={**preload, "PATH": "/usr/bin:/bin"}, cwd=source,
                            capture_output=True, text=True)  # fmt: skip
    assert broken.returncode != 0
    assert "AddressSanitizer" in broken.stderr
