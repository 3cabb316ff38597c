"""Builds ``fastattn._C`` with CMake and Ninja. torch is not needed to build, only to run.

Everything declarative is in pyproject.toml. ``fastattn/kernels`` is a symlink to ``kernels/``, and ``kernels/`` has no
``__init__.py``: a top-level package of that name would shadow Hugging Face's ``kernels``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


class CMakeBuild(build_ext):
    """One CMake configure and build per extension; the build folder is kept, so a second build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build ``ext`` where setuptools wants it."""
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
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
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build), "--parallel", jobs], check=True)


setup(ext_modules=[Extension("fastattn._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
