from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pairs import SEED
from simt.emulator import Emulator, compile_bindings, compile_units, link
from simt.machines import MACHINES, Gpu
from tree import copy_tree

import fastattn
from fastattn import _C


def pytest_report_header() -> str:
    return f"seeds: 0 before every test, {SEED} for all pairs; hypothesis is derandomised"


EMULATED = "emulator"
LONGEST = (
    "test_sanitizers",
    EMULATED,
    "test_cuda_mutants",
    "test_triton",
    "test_cuda_build",
    "test_triton_mutants",
)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook, too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers (``-n``), one file is one worker's, and so is all that runs in the emulator, built once.

    The longest come first, so that no worker is left with one of them while the others have nothing to do.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    groups = {}
    for item in items:
        emulated = {"emulator", "machine"} & set(getattr(item, "fixturenames", ()))
        groups[item] = EMULATED if emulated else item.path.stem
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(groups[item], len(rank)))


@pytest.fixture(params=fastattn.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine can run, forced for one test."""
    before = _C.isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the thread count that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the source tree, to build in."""
    target = tmp_path_factory.mktemp("source") / "fastattn"
    copy_tree(target)
    return target


@pytest.fixture(scope="session")
def cuda_bindings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``csrc/bindings_cuda.cpp``, compiled: the part of an emulated module that no kernel changes."""
    return compile_bindings(tmp_path_factory.mktemp("bindings"))


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory, cuda_bindings: Path) -> Emulator:
    """The CUDA kernels, compiled for the CPU."""
    folder = tmp_path_factory.mktemp("simt")
    return Emulator(link(folder, cuda_bindings, compile_units(folder)))


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Emulator | Gpu:
    """Where CUDA kernels run: emulated, and on the GPU where there is one."""
    return Gpu() if request.param == "gpu" else request.getfixturevalue("emulator")
