from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
EMULATED_FILES = (
    "test_cuda_attention",
    "test_cuda_backward",
    "test_cuda_banks",
    "test_cuda_hopper",
    "test_cuda_kvcache",
    "test_cuda_sampling",
    "test_cuda_sampling_edits",
)
LONGEST = (
    "test_sanitizers",
    EMULATED,
    "test_cuda_mutants",
    "test_triton",
    "test_cuda_build",
    "test_triton_mutants",
)


def group_of(path: str) -> str:
    """One file is one worker's, and so are all that run in the emulator, which is built once."""
    stem = Path(path).stem
    return EMULATED if stem in EMULATED_FILES else stem


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (``-n``), a group stays together. pytest-xdist 3.8's own groups do nothing under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::")[0])

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups first, so that no worker is left with one of them while the others have nothing to do."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(group_of(item.nodeid.split("::")[0]), len(rank)))


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
