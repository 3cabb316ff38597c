"""Bank conflicts of every CUDA kernel, held to the budget: benchmarks/results/gpu_static.json."""

from __future__ import annotations

import json

from simt.bank_ways import gpu_static, measured, ways_key
from simt.emulator import Emulator, compile_units, link
from simt.mutants import MUTANTS, UNITS_OF, healthy_units

SAMPLING = ("sample", "edit", "rank")
LIMIT = 1  # no access site of any kernel has a conflict


def test_no_kernel_has_more_conflicts_than_its_budget(emulator):
    budget = json.loads(gpu_static.RESULTS.read_text())["bank_ways"]
    found = measured(emulator)
    assert found.keys() >= budget.keys()
    assert {key: found[key] for key in budget if found[key] > budget[key]} == {}
    assert {key: ways for key, ways in found.items() if ways > LIMIT} == {}


def test_the_budget_has_every_kernel():
    table = json.loads(gpu_static.RESULTS.read_text())
    assert table["bank_ways"].keys() == {ways_key(row) for row in (*table["kernels"], *table["others"])}
    assert all(ways <= LIMIT for ways in table["bank_ways"].values())
    attention = {key: ways for key, ways in table["bank_ways"].items() if not key.startswith(SAMPLING)}
    assert attention
    assert set(attention.values()) == {1}  # 0: never touched shared memory, so nothing was counted


def test_a_planted_conflict_is_counted(cuda_bindings, tmp_path):
    bug = next(mutant for mutant in MUTANTS if mutant.name == "lost swizzle")
    changed = compile_units(
        tmp_path,
        bug.plant(tmp_path),
        (64,),
        ("-O1", "-w", "-DFASTATTN_CUDA_TYPES=f16_t"),
        UNITS_OF["forward"],
    )
    emulator = Emulator(link(tmp_path, cuda_bindings, healthy_units(cuda_bindings) | changed))
    found = measured(emulator, ("f16",), (64,))
    # 8 rows of 64 bytes, all read at the same column: every other begins in the same bank.
    assert found["forward plain | f16 | 64 | 128"] == 4
    assert found["dQ plain | f16 | 64 | 64"] == 1  # built without the bug
