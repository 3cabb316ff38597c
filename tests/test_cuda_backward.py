"""The gradients of the CUDA attention kernels on the CPU kernels' feature table, against float64: emulated, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from pairs import all_pairs
from test_cuda_attention import AXES, NOTHING, plain_args, tensors
from test_features import build, by_hand, close_enough, gradients, widened

from fastattn.backends import cpu
from fastattn.backends.reference import bias_by_score

CASES = all_pairs(
    AXES
    | {
        "dtype": [torch.float16, torch.bfloat16, torch.float32],
        "lengths": [(1, 1), (1, 97), (97, 97), (70, 133), (133, 70), (5, 0)],
        "dropout": [0.0, 0.0, 0.3],
    },
    lambda case: (
        case["lengths"][0] * case["lengths"][1] * case["heads"][0] * case["headdim"] <= 97 * 97 * 256
    ),
    20261125,
)
# Above headdim 128 two warps share lines of floats: blocks of 32 lines, tiles of 16 or 8.
WIDE_CASES = all_pairs(
    AXES
    | {
        "dtype": [torch.float32],
        "heads": [(1, 1), (2, 1)],
        "lengths": [(1, 41), (41, 41), (35, 70), (70, 35), (5, 0)],
        "headdim": [160, 192, 256],
        "headdim_v": ["same", 33, 136],
        "bias": [None, None, "11qk", "b11k", "inf"],
        "mask": [None, None, "left", "random"],
        "dropout": [0.0, 0.3],
    },
    lambda case: True,
    20261130,
)
NAMES = ("q", "k", "v", "attn_bias", "sinks")


def run(machine, q, k, v, call, dout, dlse=None, **schedule):
    """Gradients by name of a clean forward and backward run."""
    args = plain_args(q, k, v, **call)
    out, lse = machine.attention(args, **schedule)
    assert machine.faults() == {}, machine.report()
    grads = machine.attention_backward(args, out, lse, dout, dlse, **schedule)
    assert machine.faults() == {}, machine.report()
    return {name: x for name, x in zip(NAMES, grads, strict=True) if x is not None}


def check(machine, q, k, v, call, dout, label, **schedule):
    call = NOTHING | call
    truth = gradients(by_hand, q.double(), k.double(), v.double(), widened(call), dout)
    yardstick = gradients(by_hand, q, k, v, call, dout)
    found = run(machine, q, k, v, call, dout, **schedule)
    assert found.keys() == truth.keys()
    for name, grad in found.items():
        assert torch.isfinite(grad).all(), f"d{name} {label}"
        eps = torch.finfo(q.dtype).eps
        if name != "v" and not truth[name].any():
            # Rows that see one key: dP and delta cancel but for the output's rounding, which delta starts from, and of
            # floats, as which both are summed, for the sums' own.
            roundings = v.shape[3] ** (1.0 if q.dtype == torch.float32 else 0.5)
            assert (grad.abs() <= 4 * eps * roundings).all(), f"d{name} {label}"
        else:
            close_enough(grad, yardstick[name], truth[name], 3.0, 3e-6, f"d{name} {label}", eps, 8)


@pytest.mark.parametrize("number", range(len(CASES) + len(WIDE_CASES)))
def test_features(machine, number):
    case = [*CASES, *WIDE_CASES][number]
    q, k, v, call = build(case)
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)
    check(
        machine,
        q,
        k,
        v,
        call,
        dout,
        f"{case}",
        seed=number,
        landing=("at wait", "at issue", "between")[number % 3],
    )


@pytest.mark.parametrize(
    ("dtype", "headdim"),
    [
        *((torch.bfloat16, headdim) for headdim in (32, 64, 96, 128, 192, 256)),
        *((torch.float32, headdim) for headdim in (64, 128, 192, 256)),
    ],
    ids=str,
)
def test_no_schedule_changes_a_bit(machine, dtype, headdim):
    """At least 3 tiles of keys and of rows; threads and blocks in any order, copies landing at any time."""
    lengths = (197 if headdim <= 64 else 131, 197)
    if dtype == torch.float32:
        lengths = (100, 100) if headdim <= 128 else (70, 70)
    q, k, v = tensors(dtype, 1, *lengths, 1, 1, headdim)
    dout, call = torch.randn_like(q), {"causal": True}
    expected = run(machine, q, k, v, call, dout, seed=0, landing="at issue")
    for seed, landing in ((1, "at wait"), (2, "between"), (3, "at wait")):
        found = run(machine, q, k, v, call, dout, seed=seed, landing=landing)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    check(machine, q, k, v, call, dout, "causal")


@pytest.mark.parametrize(
    ("dtype", "lengths"), [(torch.bfloat16, (70, 133)), (torch.float32, (133, 70))], ids=str
)
def test_relative_bias(machine, dtype, lengths):
    """The bits of the matrix that it stands for; and the sums of that one's gradient by diagonals."""
    q, k, v = tensors(dtype, 2, *lengths, 2, 1, 64)
    dout, line = torch.randn_like(q), torch.randn(1, 2, 1, sum(lengths) - 1, requires_grad=True)
    whole = bias_by_score(line, *lengths)
    expected = run(machine, q, k, v, {"causal": True, "attn_bias": whole.detach()}, dout)
    found = run(
        machine, q, k, v, {"causal": True, "attn_bias": line.detach(), "bias_is_relative": True}, dout
    )
    assert all(torch.equal(found[name], expected[name]) for name in ("q", "k", "v"))
    (dline,) = torch.autograd.grad(whole, line, expected["attn_bias"])
    torch.testing.assert_close(found["attn_bias"], dline, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "call"),
    [
        *((torch.float16, call) for call in ({}, {"causal": True}, {"window_size": (40, 10)})),
        *((dtype, {"softcap": 5.0, "sinks": True}) for dtype in (torch.float16, torch.float32)),
    ],
    ids=str,
)
def test_packed_sequences(machine, dtype, call):
    """Every sequence has the gradients that it has alone."""
    lengths, nheads = [(70, 70), (1, 130), (0, 5), (33, 0), (90, 80)], 4
    if "sinks" in call:
        call = call | {"sinks": torch.randn(nheads)}
    cu_q, cu_k = (
        torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in zip(*lengths)
    )
    q = torch.randn(1, int(cu_q[-1]), nheads, 64).to(dtype)
    k, v = (torch.randn(1, int(cu_k[-1]), 2, 64).to(dtype) for _ in range(2))
    dout = torch.randn_like(q)
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 90, "max_seqlen_k": 130}
    found = run(machine, q, k, v, call | packed, dout)
    sinks = torch.zeros(nheads)
    for b in range(len(lengths)):
        rows, keys = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        if rows.start == rows.stop:
            assert not found["k"][:, keys].any()
            continue
        alone = run(machine, q[:, rows], k[:, keys], v[:, keys], call, dout[:, rows])
        assert torch.equal(found["q"][:, rows], alone["q"])
        assert torch.equal(found["k"][:, keys], alone["k"])
        assert torch.equal(found["v"][:, keys], alone["v"])
        sinks += alone.get("sinks", 0)
    if "sinks" in call:
        torch.testing.assert_close(found["sinks"], sinks)


def test_keys_past_their_sequence_have_no_gradient(machine):
    q, k, v = tensors(torch.float16, 2, 40, 100, 2, 1, 64)
    lengths, dout = torch.tensor([100, 37], dtype=torch.int32), torch.randn_like(q)
    found = run(machine, q, k, v, {"seqlens_k": lengths, "causal": True}, dout)
    alone = run(machine, q[1:], k[1:, :37], v[1:, :37], {"causal": True}, dout[1:])
    assert torch.equal(found["k"][1, :37], alone["k"][0])
    assert torch.equal(found["q"][1], alone["q"][0])
    assert not found["k"][1, 37:].any()
    assert not found["v"][1, 37:].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.float32, 2e-5)], ids=str)
def test_the_gradient_of_lse(machine, dtype, tolerance):
    """dlse joins delta: the CPU's kernels agree, sinks included."""
    q, k, v = tensors(dtype, 2, 50, 70, 4, 2, 64)
    args = plain_args(q, k, v, sinks=torch.randn(4))
    out, lse = cpu.attention(args)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = machine.attention_backward(args, out, lse, dout, dlse)
    assert machine.faults() == {}, machine.report()
    expected = cpu.attention_backward(args, out, lse, dout, dlse, needs_dbias=False)
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_no_bank_conflicts(emulator):
    """Every access site of both kernels, all headdims."""
    for headdim in (32, 64, 96, 128, 192, 256):
        q, k, v = tensors(torch.float16, 1, 100, 70, 1, 1, headdim)
        run(emulator, q, k, v, {}, torch.randn_like(q))
        table = emulator.bank_table()
        assert len(table) >= 7, table
        assert emulator.bank_factor() == 1.0, (headdim, table)
        run(emulator, q.float(), k.float(), v.float(), {}, torch.randn(q.shape))
        assert emulator.bank_factor() == 1.0, (headdim, emulator.bank_table())


def test_hidden_tiles_are_not_multiplied(emulator):
    """Causal gradients execute the tiles below the diagonal and no others."""
    q, k, v = tensors(torch.float16, 1, 256, 256, 1, 1, 64)
    dout = torch.randn_like(q)
    run(emulator, q, k, v, {}, dout)
    all_tiles = emulator.mmas()
    run(emulator, q, k, v, {"causal": True}, dout)
    assert emulator.mmas() * 16 == all_tiles * 10  # of 4 by 4 tiles
