"""The tables of docs/gpu.md: what compilers and emulators say about the GPU kernels. Nothing in them is a speed."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
# Columns of the table, and the kernels that stand in each, whichever headdim has it.
KERNELS = {
    "forward": ("forward plain",),
    "forward by wgmma": ("wgmma forward plain",),
    "modified": ("forward modifiers",),
    "decode": ("forward splits",),
    "paged decode": ("forward pages splits",),
    "dQ": ("dQ plain",),
    "dK and dV": ("dK and dV plain", "dK plain"),
    "dV alone": ("dV plain",),
}


def spilled(rows: list[Row]) -> str:
    """How much, and by which kernels."""
    names = [f"{row['kernel']}, headdim {row['headdim']}" for row in rows if row["spill_bytes"]]
    which = f" ({'; '.join(dict.fromkeys(names))})" if names else ""
    return f"{sum(row['spill_bytes'] for row in rows)} bytes spilled{which}"


def ways_key(row: Row) -> str:
    """Of a kernel among ``bank_ways``: what it is, whatever the architecture."""
    return " | ".join(str(row[name]) for name in ("kernel", "dtype", "headdim", "rows") if name in row)


def cuda_table(record: Row) -> list[str]:
    """A line per architecture, dtype and headdim, a column per kernel."""
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in record["kernels"]:
        line = cells.setdefault((row["architecture"], row["dtype"], row["headdim"]), {})
        line["bank ways"] = str(max(int(line.get("bank ways", 0)), record["bank_ways"][ways_key(row)]))
        column = next((name for name, kernels in KERNELS.items() if row["kernel"] in kernels), None)
        if column is None:
            continue
        line[column] = (
            f"{row['instructions_per_tensor']:.2f} &middot; {row['registers']} &middot; {row['resident_warps']}"
        )
    lines = [
        f"nvcc {record['nvcc']}; instructions per tensor core instruction in the main loop &middot; registers a "
        "thread &middot; resident warps:",
        "",
        "| sm | dtype | headdim | bank ways | " + " | ".join(KERNELS) + " |",
        "|---" * (4 + len(KERNELS)) + "|",
    ]
    for (architecture, dtype, headdim), line in cells.items():
        shown = [line.get(name, "") for name in ("bank ways", *KERNELS)]
        lines.append(
            f"| {architecture.removeprefix('sm_')} | {dtype} | {headdim} | " + " | ".join(shown) + " |"
        )
    rows = record["kernels"]
    tiles = [row["shared_bytes"] >> 10 for row in rows]
    wide = min(row["wide_accesses"] for row in rows if row["kernel"].endswith("plain"))
    floats = [row for row in record["others"] if "headdim" in row]
    used = [row["registers"] for row in floats]
    architectures = ", ".join(dict.fromkeys(row["architecture"] for row in floats))
    return [
        *lines,
        "",
        f"All {len(rows)} instantiations compiled, those with dropout, pages and modifiers too: "
        f"{spilled(rows)}, {min(tiles)} to {max(tiles)} KiB of shared memory a "
        f"block, {', '.join(sorted({row['tensor'] for row in rows}))}. Of the global accesses of the plain kernels "
        f"{wide:.0%} or more move 16 bytes.",
        "",
        f"Of float32, on {architectures}: {len(floats)} instantiations, {min(used)} to {max(used)} registers, "
        f"{spilled(floats)}, at most {max(row['shared_bytes'] for row in floats) / 1024:.1f} KiB of shared memory "
        "a block.",
        "",
        "Bank ways: the most words of one bank that any access to shared memory asks for at once, 1 = no conflict, of "
        f"all of a line's kernels, as the emulator ran them. At most {max(record['bank_ways'].values())} in all "
        f"{len(record['bank_ways'])}, those on float32 and those that sample included. Atomics are not counted.",
    ]


def triton_table(record: Row) -> list[str]:
    """A line per kernel and variant, a column per target: registers, and spills where there are any."""
    cells: dict[str, dict[str, str]] = {}
    targets: dict[str, None] = {}
    for key, row in record["rows"].items():
        target, variant, kernel = key.split(" | ")
        targets[target] = None
        spilled = f" (spills {row['spills']})" if row["spills"] else ""
        tensor = ", ".join(row["tensor"]) or "none"
        name = f"{kernel.removesuffix('_kernel')}: {variant}"
        cells.setdefault(name, {})[target] = f"{row['registers']}{spilled}, {tensor}"
    return [
        f"Triton {record['triton']}; registers a thread, and the tensor instructions used:",
        "",
        "| kernel | " + " | ".join(targets) + " |",
        "|---" * (1 + len(targets)) + "|",
        *(f"| {name} | " + " | ".join(line[t] for t in targets) + " |" for name, line in cells.items()),
    ]


def mutants_table(record: Row) -> list[str]:
    """Which checks see which planted bug."""
    return [
        f"{len(record)} bugs, each seen by:",
        "",
        "| planted bug | seen by |",
        "|---|---|",
        *(f"| {name} | {', '.join(checks)} |" for name, checks in record.items()),
    ]
