"""The Hopper kernel, emulated, on the table and the tests of ``test_cuda_attention``: the imported ones run here with another machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracles import attention64
from pairs import all_pairs
from simt.emulator import Emulator
from simt.machines import Hopper
from test_cuda_attention import (  # noqa: F401
    AXES,
    check,
    checked,
    legal,
    plain_args,
    tensors,
    test_any_scale,
    test_dropout_is_that_of_the_cpu,
    test_packed_sequences,
    test_pages_change_no_bit,
    test_rows_of_a_cache,
)
from test_features import build

HOPPER_AXES = AXES | {
    "dtype": [torch.float16, torch.bfloat16],
    "lengths": [(97, 97), (70, 201), (201, 70), (140, 40), (70, 400), (130, 0)],
    "headdim": [40, 59, 64, 111, 128],
}


def on_hopper(case):
    rows = case["lengths"][0] * case["heads"][0] // case["heads"][1]
    return legal(case) and rows > 64 and case["lengths"][1] * rows * case["headdim"] < 300 * 400 * 128  # time


CASES = all_pairs(HOPPER_AXES, on_hopper, 20261125)


@pytest.fixture
def machine(emulator: Emulator, request: pytest.FixtureRequest) -> Iterator[Hopper]:
    """Hopper in the place of what ``conftest`` runs the shared tests on."""
    hopper = Hopper(emulator)
    yield hopper
    parameters = getattr(request.node, "callspec", None)
    values = parameters.params if parameters else {}
    is_taken = torch.float32 not in values.values() and values.get("seqlen_q") != 1
    assert ("wgmma" in hopper.served) == is_taken


@pytest.mark.parametrize("number", range(len(CASES)))
def test_features(machine, number):
    case = CASES[number]
    q, k, v, call = build(case)
    landing = ("at wait", "at issue", "between")[number % 3]
    check(machine, q, k, v, call, f"{case}", seed=number, landing=landing)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("call", [{"causal": True}, {"window_size": (250, 40)}], ids=str)
def test_no_schedule_changes_a_bit(machine, dtype, headdim, call):
    """5 tiles of keys, so that each stage is used thrice, and 2 blocks; any order, copies and products at any time."""
    q, k, v = tensors(dtype, 1, 140, 600, 1, 1, headdim)
    args = plain_args(q, k, v, **call)
    expected = checked(machine, args, seed=0, landing="at issue")
    truth, _ = attention64(q, k, v, **call)
    torch.testing.assert_close(expected[0].double(), truth, rtol=0, atol=8e-3)
    for seed, landing in ((1, "at wait"), (2, "between"), (3, "at issue"), (4, "between"), (5, "between")):
        found = checked(machine, args, seed=seed, landing=landing)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_no_bank_conflicts(machine, emulator):
    """Copies, operands of both products, and the epilogue."""
    for headdim in (40, 64, 104, 128):
        checked(machine, plain_args(*tensors(torch.float16, 1, 200, 300, 1, 1, headdim)))
        table = emulator.bank_table()
        assert {site.split(":")[0] for site in table} >= {"tile_copy.cuh", "attention_fwd_sm90.cuh"}, table
        assert len(table) >= 4
        assert emulator.bank_factor() == 1.0, (headdim, table)


def test_masked_tiles_are_not_multiplied(machine, emulator):
    q, k, v = tensors(torch.float16, 1, 512, 512, 1, 1, 64)
    executed = {}
    for name, call in {"full": {}, "causal": {"causal": True}, "window": {"window_size": (128, 0)}}.items():
        checked(machine, plain_args(q, k, v, **call))
        executed[name] = emulator.wgmmas()
    tile = 2 * (4 + 8)  # warpgroups, products of QK^T and of PV
    assert executed == {"full": 16 * tile, "causal": (1 + 2 + 3 + 4) * tile, "window": (1 + 2 + 2 + 2) * tile}


def test_large_scores(machine):
    q, k, v = tensors(torch.float16, 1, 140, 300, 1, 1, 64)
    check(machine, q * 30, k * 30, v, {})


def test_which_calls_it_takes(machine, emulator):
    """On a GPU of compute capability 9.0, and there 16 bits, more than 64 rows and the headdims that it is made for."""

    def kernel(dtype=torch.float16, rows=65, heads=1, headdim=64, headdim_v=None, **call):
        q, k, v = tensors(dtype, 1, rows, 70, heads, 1, headdim, headdim_v)
        return machine.forward_kernel(plain_args(q, k, v, **call))

    assert emulator.forward_kernel(plain_args(*tensors(torch.float16, 1, 65, 70, 1, 1, 64))) == "mma"
    assert kernel() == kernel(torch.bfloat16) == kernel(rows=33, heads=2) == "wgmma"
    assert kernel(torch.float32) == kernel(rows=64) == kernel(rows=32, heads=2) == "mma"
    dims = {d: kernel(headdim=d) for d in (32, 40, 64, 72, 96, 104, 128, 136, 256)}
    assert [d for d, name in dims.items() if name == "wgmma"] == [40, 64, 104, 128]
    assert kernel(headdim=24, headdim_v=128) == "wgmma"
    assert kernel(softcap=3.0, causal=True, sinks=torch.randn(1)) == "wgmma"
    checked(machine, plain_args(*tensors(torch.float16, 1, 65, 70, 1, 1, 64)))
