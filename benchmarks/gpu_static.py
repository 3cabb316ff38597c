"""What can be said of the CUDA kernels without a GPU: registers, spills, occupancy, what main loops are made of.

``python benchmarks/gpu_static.py --save`` compiles every instantiation for every architecture and writes
``results/gpu_static.json``. Nothing here is a speed: no TFLOP/s follow from these figures. They are exact for a given
ptxas, so a budget can hold them: ``tests/test_cuda_build.py``.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from gpu_tables import ways_key

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu_static.json"
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120")
FLOAT_ARCHITECTURES = ("80", "86", "90a", "120")
HEADDIMS = (32, 64, 96, 128, 192, 256)
HOPPER_HEADDIMS = (64, 128)  # csrc/cuda/launch.cu, forward_kernel
THREADS = 128  # csrc/cuda/traits.cuh, kThreads


class Chip(NamedTuple):
    """What a multiprocessor has, from the CUDA programming guide's table of technical specifications."""

    registers: int
    shared_bytes: int
    warps: int
    blocks: int


CHIPS = {
    "80": Chip(65536, 164 << 10, 64, 32),
    "86": Chip(65536, 100 << 10, 48, 16),
    "89": Chip(65536, 100 << 10, 48, 24),
    "90a": Chip(65536, 228 << 10, 64, 32),
    "100a": Chip(65536, 228 << 10, 64, 32),
    "120": Chip(65536, 100 << 10, 48, 24),
}


def find_tool(name: str) -> str | None:
    """nvcc or nvdisasm: on PATH, of the pip packages nvidia-cuda-*, or nvdisasm as triton brings it."""
    if found := shutil.which(name):
        return found
    for folder in map(Path, sys.path):
        for pattern in (f"nvidia/cu1*/bin/{name}", f"triton/backends/nvidia/bin/{name}"):
            for path in sorted(folder.glob(pattern)):
                return str(path)
    return None


def compile_cubin(architecture: str, source: str, flags: tuple[str, ...], folder: Path) -> tuple[Path, str]:
    """Every kernel of a source; and what ptxas says. Warnings are errors."""
    target = folder / f"{architecture}_{source}{''.join(flags)}.cubin".replace("=", "_")
    command = [
        find_tool("nvcc") or "nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", f"-I{ROOT / 'csrc'}",
        *flags, "-Werror", "all-warnings", "-Xptxas", "-v", "-o", str(target), str(ROOT / "csrc/cuda" / source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for sm_{architecture}:\n{done.stdout}{done.stderr}")
    return target, done.stderr + done.stdout


def attention_flags(headdim: int, dtype: str) -> tuple[str, ...]:
    """Of forward.cu, hopper.cu and backward.cu, for one headdim and dtype."""
    return (
        f"-DFASTATTN_HEADDIM={headdim}",
        f"-DFASTATTN_CUDA_TYPES={dtype if dtype == 'float' else dtype + '_t'}",
    )


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of every kernel, by its mangled name, from ptxas -v."""
    found: dict[str, dict[str, int]] = {}
    for name, body in re.findall(
        r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL
    ):
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", body).groups()  # type: ignore[union-attr]
        registers = re.search(r"Used (\d+) registers", body)[1]  # type: ignore[index]
        found[name] = {"registers": int(registers), "spill_bytes": int(stores) + int(loads)}
    return found


def resident_warps(chip: Chip, registers: int, shared_bytes: int, threads: int) -> int:
    """Warps that fit a multiprocessor: registers go by 256 per warp, a block costs 1 KiB of shared memory more."""
    warps = threads // 32
    by_registers = chip.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = chip.shared_bytes // (-(-(shared_bytes + 1024) // 128) * 128)
    return min(by_registers, by_shared, chip.warps // warps, chip.blocks) * warps


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z0-9_]+(?:\.[A-Za-z0-9_]+)*)")
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")
GLOBAL = ("LDG", "STG", "LDGSTS", "LD", "ST")


def operations(lines: list[str]) -> list[str]:
    """The opcodes with their modifiers, NOP left out."""
    found = [match[1] for line in lines if (match := INSTRUCTION.match(line))]
    return [name for name in found if not name.startswith("NOP")]


def main_loop(lines: list[str], step: int | None = None) -> list[str]:
    """The loop with the most tensor instructions, or with those of a step; of several the shortest, without masks."""
    places = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"^(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        match = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if match and places.get(match[1], i) < i:
            body = operations(lines[places[match[1]] : i + 1])
            tensor = sum(name.split(".")[0] in TENSOR for name in body)
            if step in (None, tensor):
                loops.append((-tensor, len(body), body))
    return min(loops)[2] if loops else []


def describe(mangled: str) -> dict[str, Any] | None:
    """Headdim, rows of a tile, policy and shared memory of an attention kernel, from its template arguments."""
    threads, step = THREADS, None
    if match := re.search(
        r"attention_forward_sm90.*?12HopperTraitsILi(\d+)EE.*?6PolicyILb(\d)ELb(\d)ELb(\d)ELb(\d)EE", mangled
    ):
        headdim, *flags = map(int, match.groups())
        kernel, names = "wgmma forward", ("modifiers", "dropout", "pages", "splits")
        rows, threads, keys = 128, 3 * THREADS, 128
        step = headdim // 16 + keys // 16  # waits spin in loops of their own, all around it
        # csrc/cuda/hopper_tiles.cuh, kSharedBytes
        shared_bytes = 1024 + 128 * (2 * headdim + 16) + 2 * 2 * keys * headdim * 2 + 9 * 8
    elif match := re.search(
        r"attention_forward.*?6TraitsILi(\d+)ELi(\d+)ELi(\d+)EE.*?6PolicyILb(\d)ELb(\d)ELb(\d)ELb(\d)EE",
        mangled,
    ):
        headdim, row_tiles, element_bytes, *flags = map(int, match.groups())
        kernel, names = "forward", ("modifiers", "dropout", "pages", "splits")
        # csrc/cuda/traits.cuh, kKeys and kSharedBytes
        keys = next(
            n for n, most in ((64, 128), (32, 512), (16, 768), (8, 1024)) if headdim * element_bytes <= most
        )
        rows = 64 * row_tiles
        shared_bytes = (rows + 4 * keys) * headdim * element_bytes
    elif match := re.search(
        r"(query|key)_gradients.*?14BackwardTraitsILi(\d+)ELi(\d+)EE.*?14BackwardPolicyILb(\d)ELb(\d)ELNS0_9GradientsE(\d)EE",
        mangled,
    ):
        headdim, element_bytes, *flags, gradients = map(int, match.groups()[1:])
        kernel = "dQ" if match[1] == "query" else ("dK and dV", "dK", "dV")[gradients]
        names = ("modifiers", "dropout")
        # csrc/cuda/traits.cuh, BackwardTraits
        steps = ((64, 64), (32, 128), (16, 256)) if element_bytes == 2 else ((32, 64), (16, 192), (8, 256))
        lines = next(n for n, most in steps if headdim <= most)
        row_bytes = headdim * element_bytes
        parts = 2 if row_bytes > 512 else 1
        rows = 64 // parts
        shared_bytes = 2 * rows * row_bytes + 2 * (2 * lines * row_bytes + max(128, lines * 8))
        shared_bytes += 4 * 512 * (parts > 1)
    else:
        return None
    policy = " ".join(n for n, on in zip(names, flags) if on) or "plain"
    return {
        "kernel": f"{kernel} {policy}",
        "headdim": headdim,
        "rows": rows,
        "shared_bytes": shared_bytes,
        "threads": threads,
        "step": step,
    }


def report(
    architecture: str, headdim: int, dtype: str, folder: Path, unit: str = "forward"
) -> list[dict[str, Any]]:
    """One row per attention kernel of a unit."""
    cubin, log = compile_cubin(architecture, f"{unit}.cu", attention_flags(headdim, dtype), folder)
    disassembler = find_tool("nvdisasm") or "nvdisasm"
    text = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    rows = []
    for name, used in resources(log).items():
        about = describe(name)
        if about is None:
            continue
        lines = re.split(r"\n\s*\.section", text[text.index(f".text.{name}:") :])[0].split("\n")
        accesses = [x for x in operations(lines) if x.split(".")[0] in GLOBAL and x.split(".")[0] != "LD"]
        threads, step = about.pop("threads"), about.pop("step")
        loop = main_loop(lines, step)
        kinds = collections.Counter(x.split(".")[0] for x in loop)
        tensor = sum(kinds[kind] for kind in TENSOR)
        rows.append(
            {"architecture": f"sm_{architecture}", "dtype": dtype, **about, **used}
            | {
                "resident_warps": resident_warps(
                    CHIPS[architecture], used["registers"], about["shared_bytes"], threads
                )
            }
            | {"wide_accesses": round(sum(".128" in x for x in accesses) / len(accesses), 3)}
            | {"tensor": next(kind for kind in TENSOR if kinds[kind]), "tensor_in_loop": tensor}
            | {"instructions_per_tensor": round(len(loop) / tensor, 2)}
        )
    return rows


DTYPES = {"f": "float", "5f16_t": "f16", "6bf16_t": "bf16"}


def sampling_kernel(mangled: str) -> dict[str, Any] | None:
    """Which sampling kernel, and its dtype."""
    match = re.search(r"(sample|edit|rank)_rowsI(?:NS_)?(f|5f16_t|6bf16_t)E", mangled)
    return match and {"kernel": match[1], "dtype": DTYPES[match[2]]}


def sampling_report(architecture: str, folder: Path) -> list[dict[str, Any]]:
    """One row per sampling kernel, none of which has a main loop to speak of: the draw, edits, log-probabilities."""
    log = compile_cubin(architecture, "sampling.cu", ("-fmad=false",), folder)[1]
    rows = []
    for name, used in resources(log).items():
        about = sampling_kernel(name)
        assert about is not None, name
        rows.append({"architecture": f"sm_{architecture}", **about, **used})
    return rows


def float_report(architecture: str, headdim: int, folder: Path, unit: str) -> list[dict[str, Any]]:
    """One row per attention kernel of a unit on float32, which no tensor core helps."""
    log = compile_cubin(architecture, f"{unit}.cu", attention_flags(headdim, "float"), folder)[1]
    about = ((describe(name), used) for name, used in resources(log).items())
    head = {"architecture": f"sm_{architecture}", "dtype": "float"}
    rows = [head | known | used for known, used in about if known is not None]
    return [{name: value for name, value in row.items() if name not in ("threads", "step")} for row in rows]


# Headdim 64 everywhere; on sm_80 every headdim, and both dtypes, which differ in one instruction's operand.
UNITS = ("forward", "backward")
TABLE = [
    *(("80", headdim, "f16", unit) for headdim in HEADDIMS for unit in UNITS),
    *(("80", headdim, "bf16", unit) for headdim in (64, 128) for unit in UNITS),
    *(
        (architecture, 64, "f16", unit)
        for architecture in ARCHITECTURES
        if architecture != "80"
        for unit in UNITS
    ),
    *(("90a", headdim, dtype, "hopper") for headdim in HOPPER_HEADDIMS for dtype in ("f16", "bf16")),
]


def bank_ways(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The worst bank conflict of every kernel among ``rows``, in the emulator."""
    sys.path.insert(0, str(ROOT / "tests"))
    from simt import bank_ways, emulator

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objects = emulator.compile_units(folder, flags=("-O1", "-w"))
        built = emulator.Emulator(emulator.link(folder, emulator.compile_bindings(folder), objects))
        found = bank_ways.measured(built)
    return {key: found[key] for key in sorted({ways_key(row) for row in rows})}


def main() -> None:
    """The whole table, printed and saved if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument(
        "--banks", action="store_true", help="only the bank conflicts, of the kernels that are known"
    )
    parser.add_argument("--others", action="store_true", help="only the kernels without tensor instructions")
    options = parser.parse_args()
    if options.banks:
        table = json.loads(RESULTS.read_text())
        table["bank_ways"] = bank_ways([*table["kernels"], *table["others"]])
        print(*table["bank_ways"].items(), sep="\n")
        if options.save:
            RESULTS.write_text(json.dumps(table, indent=1) + "\n")
        return
    rows, others = [], []
    with tempfile.TemporaryDirectory() as name:
        for architecture in ARCHITECTURES:
            others += sampling_report(architecture, Path(name))
        for architecture, unit in itertools.product(FLOAT_ARCHITECTURES, UNITS):
            for headdim in HEADDIMS:
                others += float_report(architecture, headdim, Path(name), unit)
        for row in others:
            print(*row.values(), flush=True)
        for architecture, headdim, dtype, unit in () if options.others else TABLE:
            for row in report(architecture, headdim, dtype, Path(name), unit):
                print(*row.values(), flush=True)
                rows.append(row)
    if options.others:
        rows = json.loads(RESULTS.read_text())["kernels"]
    if options.save:
        version = subprocess.run(
            [find_tool("nvcc") or "nvcc", "--version"], capture_output=True, text=True
        ).stdout
        release = re.search(r"V([\d.]+)", version)
        table = {"nvcc": release[1] if release else None, "kernels": rows, "others": others}
        table["bank_ways"] = bank_ways([*rows, *others])
        RESULTS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
