"""Builds ``fastattn._cuda`` against the emulator with g++, and puts it in the real one's place.

The Python backend, the bindings, the launch code and the kernels are the real ones; only ``ptx.h`` is its twin. Every
tensor whose address is taken becomes memory that kernels may touch, exactly as long as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import itertools
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pybind11
import torch
from nested import tensors_in
from torch import Tensor

from fastattn import calls
from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs
from fastattn.backends import cuda

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fno-gnu-unique",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
]
FAULTS = (
    "shared race", "copy in flight", "uninitialised", "shared bounds", "global bounds", "global race", "alignment",
    "barrier", "collective", "unwaited copy", "warpgroup", "proxy",
)  # fmt: skip  # tests/simt/fibers.h, Fault
_NUMBERS = itertools.count()
HEADDIMS = (32, 64, 96, 128, 192, 256)  # csrc/cuda/launch.cu
HOPPER_HEADDIMS = (64, 128)
UNITS_OF_HEADDIM = {"forward": HEADDIMS, "backward": HEADDIMS, "hopper": HOPPER_HEADDIMS}
UNITS = (*UNITS_OF_HEADDIM, "launch", "sampling")
LANDINGS = {"at wait": 0, "at issue": 1, "between": 2}


def compile_bindings(folder: Path) -> Path:
    """The object file of bindings_cuda.cpp, which no kernel changes."""
    target = folder / "bindings.o"
    include = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    source = str(CSRC / "bindings_cuda.cpp")
    subprocess.run(
        ["g++", *FLAGS, "-O0", "-fvisibility=hidden", *include, "-c", source, "-o", str(target)], check=True
    )
    return target


def compile_units(
    folder: Path,
    csrc: Path = CSRC,
    headdims: tuple[int, ...] = HEADDIMS,
    flags: tuple[str, ...] = (),
    units: tuple[str, ...] = UNITS,
) -> dict[str, Path]:
    """The object files of csrc/cuda by name, two compilers at once. ``csrc`` may be a changed copy."""
    compiler = ["g++", *FLAGS, *flags, f"-I{csrc}", f"-I{HERE}", "-x", "c++", "-c"]
    commands = {
        f"{unit}{d}": [*compiler, f"-DFASTATTN_HEADDIM={d}", str(csrc / "cuda" / f"{unit}.cu")]
        for d in headdims
        for unit in units
        if d in UNITS_OF_HEADDIM.get(unit, ())
    }
    if "launch" in units:
        listed = ",".join(map(str, headdims))
        switches = [f"-DFASTATTN_CUDA_HEADDIMS={listed}", "-DFASTATTN_CUDA_SM90A"]
        commands["launch"] = [*compiler, *switches, str(HERE / "emulated.cpp")]
    if "sampling" in units:
        commands["sampling"] = [*compiler, str(csrc / "cuda" / "sampling.cu")]
    objects = {name: folder / f"{name}.o" for name in commands}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda x: subprocess.run([*x[1], "-o", objects[x[0]]], check=True), commands.items()))
    return objects


def link(folder: Path, bindings: Path, objects: dict[str, Path], flags: tuple[str, ...] = ()) -> Path:
    """The module's path, in ``folder``."""
    module = folder / "_cuda.so"
    subprocess.run(["g++", *flags, "-shared", bindings, *objects.values(), "-o", module], check=True)
    return module


class Emulator:
    """One build of the kernels. Calls return what the backend returns; faults are counted since the last reset."""

    def __init__(self, path: Path) -> None:
        name = f"emulated{next(_NUMBERS)}._cuda"  # pybind11 keeps modules by name
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))
        self._path = path
        self._library.simt_launches.restype = ctypes.c_char_p
        self._library.simt_report.restype = ctypes.c_char_p
        self._library.simt_bank_table.restype = ctypes.c_char_p
        self._library.simt_bank_factor.restype = ctypes.c_double
        self._library.simt_mmas.restype = ctypes.c_long
        self._library.simt_wgmmas.restype = ctypes.c_long

    def reset(self, seed: int, landing: str) -> None:
        """Seed 0 runs threads and blocks in order."""
        self._library.simt_reset(ctypes.c_uint64(seed), LANDINGS[landing])

    @contextlib.contextmanager
    def compute_capability(self, capability: int) -> Iterator[None]:
        """What launches see of the device: 80, unless told otherwise; 90 makes the Hopper kernel take what it can."""
        self._library.simt_set_capability(capability)
        yield
        self._library.simt_set_capability(80)

    def forward_kernel(self, args: AttentionArgs) -> str:
        """Which kernel serves a call: ``wgmma`` or ``mma``."""
        with self._in_place(args):
            return cuda.forward_kernel(args)

    def attention(
        self, args: AttentionArgs, seed: int = 1, landing: str = "between"
    ) -> tuple[Tensor, Tensor | None]:
        """``cuda.attention``, one run."""
        self.reset(seed, landing)
        with self._in_place(args):
            return cuda.attention(args)

    def attention_backward(
        self,
        args: AttentionArgs,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None = None,
        seed: int = 1,
        landing: str = "between",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """``cuda.attention_backward`` with the bias' gradient where there is a bias, one run."""
        self.reset(seed, landing)
        with self._in_place(args, given=(out, lse, dout, *(() if dlse is None else (dlse,)))):
            return cuda.attention_backward(args, out, lse, dout, dlse, needs_dbias=args.attn_bias is not None)

    def append_kv(self, args: KVAppendArgs, seed: int = 1) -> tuple[Tensor, Tensor]:
        """``cuda.append_kv``, one run; the caches may be written."""
        self.reset(seed, "between")
        with self._in_place(args, written=("k_cache", "v_cache")):
            return cuda.append_kv(args)

    def sample(self, args: SamplingArgs, seed: int = 1) -> Tensor:
        """The tokens of ``cuda.tokens_or_errors``, one run."""
        return self.sample_with_logprobs(args, seed)[0]

    def sample_with_logprobs(
        self, args: SamplingArgs, seed: int = 1
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """``cuda.tokens_or_errors``, one run."""
        self.reset(seed, "between")
        with self._in_place(args):
            return cuda.tokens_or_errors(args)

    def survivors(self, args: SamplingArgs, seed: int = 1) -> Tensor:
        """``cuda.survivors``, one run."""
        self.reset(seed, "between")
        with self._in_place(args):
            return cuda.survivors(args)

    @contextlib.contextmanager
    def _in_place(
        self, args: Any, written: tuple[str, ...] = (), given: tuple[Tensor, ...] = ()
    ) -> Iterator[None]:
        names = getattr(args, "_fields", args.__slots__)
        inputs = tuple(getattr(args, name) for name in names if name not in written)
        readonly = {x.data_ptr() for x in tensors_in((inputs, given))}
        known: set[int] = set()

        def address(x: Tensor | None) -> int:
            if x is None or x.numel() == 0:
                return 0
            if x.data_ptr() not in known:
                known.add(x.data_ptr())
                elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
                writable = x.data_ptr() not in readonly
                size = ctypes.c_size_t(elements * x.element_size())
                self._library.simt_allow(ctypes.c_void_p(x.data_ptr()), size, int(writable))
            return x.data_ptr()

        new_empty = Tensor.new_empty

        def poisoned(self: Tensor, *shape: Any, **keywords: Any) -> Tensor:
            x = new_empty(self, *shape, **keywords)
            if x.dtype == torch.bool:
                return x
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min // 3)

        with (
            mock.patch.object(cuda, "_cuda", self.module),
            mock.patch.object(cuda, "_on_device", return_value=contextlib.nullcontext()),
            mock.patch.object(cuda, "_stream", return_value=0),
            mock.patch.object(calls, "address", address),
            mock.patch.object(Tensor, "new_empty", poisoned),
        ):
            yield

    def faults(self) -> dict[str, int]:
        """How many of each kind, those that occurred."""
        counts = (ctypes.c_long * len(FAULTS))()
        self._library.simt_faults(counts)
        return {name: count for name, count in zip(FAULTS, counts) if count}

    def report(self) -> str:
        """The first of each kind of fault: what, where in the kernel, which block and thread."""
        return self._library.simt_report().decode()

    def bank_factor(self) -> float:
        """Cycles per phase of the worst access site; 1 = no bank conflict."""
        return self._library.simt_bank_factor()

    def bank_table(self) -> dict[str, float]:
        """The factor of every access site, by file and line."""
        lines = self._library.simt_bank_table().decode().splitlines()
        return {site: float(factor) for site, factor in (line.split() for line in lines)}

    @functools.cached_property
    def _symbols(self) -> dict[int, str]:
        listed = subprocess.run(["nm", self._path], capture_output=True, text=True, check=True).stdout
        fields = (line.split() for line in listed.splitlines())
        return {
            int(place, 16): name for place, kind, name in (x for x in fields if len(x) == 3) if kind in "tT"
        }

    def bank_ways(self) -> list[tuple[str, int]]:
        """Every launch since the reset: its kernel's mangled name, and of how many words of one bank an access asked for
        at the most. 1 = no bank conflict, 0 = no access."""
        lines = (line.split() for line in self._library.simt_launches().decode().splitlines())
        return [(self._symbols[int(place, 16)], int(ways)) for place, ways in lines]

    def mmas(self) -> int:
        """Tensor core instructions executed, counted by warp."""
        return self._library.simt_mmas()

    def wgmmas(self) -> int:
        """The same on Hopper, counted by warpgroup."""
        return self._library.simt_wgmmas()
