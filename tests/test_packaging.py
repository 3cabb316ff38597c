"""The build's promises: no symbol of one ISA can serve another, and every way to install works."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from tree import ROOT, run


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source distribution holds, unpacked."""
    target = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", target, cwd=source)
    (archive,) = target.glob("*.tar.gz")
    shutil.unpack_archive(archive, target / "unpacked", filter="data")
    (tree,) = (target / "unpacked").iterdir()
    return tree


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built as pip does for whoever has no wheel: from the source distribution."""
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "dist",
        ".",
        cwd=sdist,
    )
    (built,) = (sdist / "dist").glob("*.whl")
    return built


def test_sdist_holds_the_sources(sdist):
    for name in ("csrc/bindings.cpp", "csrc/cpu/isa/kernels.inc", "CMakeLists.txt", "kernels/README.md"):
        assert (sdist / name).exists(), name


def test_no_weak_symbols(wheel):
    """A weak symbol in a file compiled with -mavx512f may be the copy that the linker keeps for every machine."""
    objects = sorted((wheel.parent.parent / "build").rglob("isa/*.o"))
    names = {path.name.split(".")[0] for path in objects}
    assert {"baseline"} < names, names
    for path in objects:
        weak = [line for line in run("nm", "-C", path).splitlines() if re.search(r" [WwVvu] ", line)]
        assert not weak, f"{path.name}: {weak[:5]}"


def test_wheel_holds_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "fastattn/__init__.py",
        "fastattn/backends/cpu.py",
        "fastattn/kernels/attention.py",
        "fastattn/model/llama.py",
        "fastattn/py.typed",
    ):
        assert name in names, name
    assert any(name.startswith("fastattn/_C.") for name in names)
    assert not any(name.startswith(("kernels/", "csrc/", "tests/")) for name in names)


CALL = (
    "import torch, fastattn, fastattn.kernels;"
    "x = torch.randn(1, 3, 2, 8);"
    "print(fastattn.__file__, fastattn.attention(x, x, x, backend='cpu').shape, fastattn.sample(x[0, 0], backend='cpu').shape)"
)


def test_wheel_imports(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    out = run(sys.executable, "-c", CALL, cwd=tmp_path, PYTHONPATH=str(site))
    assert str(site) in out


def test_hugging_face_kernels_beside_us(wheel, tmp_path):
    """A top-level package `kernels` is theirs: ours never shadows it, in the wheel or at the repo root."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("owner = 'hugging face'\n")
    zipfile.ZipFile(wheel).extractall(site)
    code = "import kernels, fastattn.kernels; print(kernels.owner, fastattn.kernels.__path__)"
    for cwd in (tmp_path, ROOT):
        assert "hugging face" in run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=str(site))
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tables_are_what_was_measured():
    """README's tables are made from benchmarks/results, never by hand."""
    run(sys.executable, "benchmarks/report.py", "--check")
