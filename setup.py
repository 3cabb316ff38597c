"""Builds ``fastattn._C``, and ``fastattn._cuda`` where it can, with CMake and Ninja. torch is only needed to run.

``FASTATTN_CUDA``: ``auto`` (with the nvcc on PATH or of the pip packages, where there is one), ``on`` or ``off``.
``FASTATTN_CUDA_ARCHS``: compute capabilities, ``80;90a`` and so on; the first comes as PTX too, for GPUs of the future.

Everything declarative is in pyproject.toml. ``fastattn/kernels`` is a symlink to ``kernels/``, and ``kernels/`` has no
``__init__.py``: a top-level package of that name would shadow Hugging Face's ``kernels``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The executable of a PyPI build tool beside this Python, or the one on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"fastattn needs {name} to build: pip install {name}")
    return found


def wanted_nvcc() -> str | None:
    """The nvcc to build ``fastattn._cuda`` with; None for a build without it."""
    wish = os.environ.get("FASTATTN_CUDA") or "auto"
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"FASTATTN_CUDA: expected auto, on or off, got {wish!r}")
    nvcc = None if wish == "off" else find_nvcc()
    if wish == "on" and nvcc is None:
        raise SystemExit("FASTATTN_CUDA=on needs nvcc: on PATH, or pip install 'fastattn[cuda-build]'")
    return nvcc


def find_nvcc() -> str | None:
    """nvcc on PATH, or that of the package nvidia-cuda-nvcc in this Python."""
    if found := shutil.which("nvcc"):
        return found
    folders = [Path(folder) for folder in sys.path]
    return next((str(path) for folder in folders for path in folder.glob("nvidia/cu1*/bin/nvcc")), None)


class CMakeBuild(build_ext):
    """One CMake configure and build for both modules; the build folder is kept, so a second build is incremental."""

    def build_folder(self) -> Path:
        """setuptools' own; an editable install has a temporary one: instead one of this Python in ``build/``."""
        if not self.editable_mode:
            return Path(self.build_temp).resolve()
        python = f"{sys.implementation.cache_tag}-{zlib.crc32(sys.prefix.encode()):08x}"
        return ROOT / "build" / f"editable-{python}"

    def build_extension(self, ext: Extension) -> None:
        """Configure and build ``ext`` where setuptools wants it; ``_cuda`` comes with ``_C``."""
        if ext.name != "fastattn._C":
            return
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = self.build_folder()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            tool("cmake"),
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFASTATTN_SANITIZE={os.environ.get('FASTATTN_SANITIZE', '')}",
            f"-DFASTATTN_NVCC={NVCC or ''}",
            f"-DFASTATTN_CUDA_ARCHS={os.environ.get('FASTATTN_CUDA_ARCHS') or '80'}",
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build), "--parallel", jobs], check=True)


NVCC = wanted_nvcc()
MODULES = ["fastattn._C", *(["fastattn._cuda"] if NVCC else [])]
setup(ext_modules=[Extension(name, sources=[]) for name in MODULES], cmdclass={"build_ext": CMakeBuild})
