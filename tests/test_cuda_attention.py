"""The CUDA attention kernels on the CPU kernels' feature table, against float64: emulated, and on a GPU where there is one.

The emulator (``tests/simt``) runs the real kernels, launches, bindings and Python backend. A run is clean only if nothing
was raced for, read before it landed, touched out of bounds or waited for in vain: ``faults`` counts what was.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import attention64
from pairs import all_pairs
from test_features import build, by_hand, close_enough

from fastattn.args import AttentionArgs
from fastattn.backends import cpu, cuda, reference

AXES = {
    "dtype": [torch.float16, torch.bfloat16, torch.float32],
    "heads": [(2, 2), (4, 2), (4, 1), (8, 1)],
    "lengths": [(1, 1), (1, 97), (97, 97), (70, 201), (201, 70), (7, 1025), (140, 40), (5, 0)],
    "headdim": [8, 40, 59, 64, 96, 111, 128, 192, 256],
    "headdim_v": ["same", 33],
    "causal": [False, True],
    "window": [(-1, -1), (3, -1), (-1, 2), (70, 8), (0, 0)],
    "softcap": [0.0, 15.0],
    "alibi": [None, "head", "batch"],
    "bias": [None, None, "11qk", "b11k", "1hqk", "bhq1", "qk", "inf", "turned"],
    "mask": [None, None, "left", "right", "random", "true", "rows"],
    "sinks": [False, True],
    "strides": ["plain", "head-major", "slices"],
}
SIZE = {(201, 70): 3, (70, 201): 2, (140, 40): 1}


def legal(case):
    work = SIZE.get(case["lengths"], 0) * case["heads"][0] * case["headdim"]
    return work <= 3 * 8 * 64  # time


CASES = all_pairs(AXES, legal, 20261124)


def plain_args(q, k, v, **call):
    return AttentionArgs(
        **({"q": q, "k": k, "v": v, "softmax_scale": q.shape[3] ** -0.5, "return_lse": True} | call)
    )


def tensors(dtype, batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v=None):
    q = torch.randn(batch, seqlen_q, nheads, headdim).to(dtype)
    k = torch.randn(batch, seqlen_k, nheads_k, headdim).to(dtype)
    v = torch.randn(batch, seqlen_k, nheads_k, headdim_v or headdim).to(dtype)
    return q, k, v


def checked(machine, args, **run):
    """out and lse of a clean run."""
    out, lse = machine.attention(args, **run)
    assert machine.faults() == {}, machine.report()
    assert torch.isfinite(out).all()
    return out, lse


def check(machine, q, k, v, call, label="", **run):
    truth, lse64 = attention64(q, k, v, **call)
    out, lse = checked(machine, plain_args(q, k, v, **call), **run)
    close_enough(out, by_hand(q, k, v, **(NOTHING | call)), truth, 2.0, 1e-6, label, torch.finfo(q.dtype).eps)
    torch.testing.assert_close(lse.double(), lse64, rtol=1e-5, atol=1e-4)


NOTHING = {"causal": False, "window_size": (-1, -1), "softcap": 0.0}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_features(machine, number):
    case = CASES[number]
    q, k, v, call = build(case)
    landing = ("at wait", "at issue", "between")[number % 3]
    check(machine, q, k, v, call, f"{case}", seed=number, landing=landing)


@pytest.mark.parametrize(
    ("dtype", "headdim"),
    [
        *itertools.product([torch.float16, torch.bfloat16], [32, 64, 96, 128, 192, 256]),
        *((torch.float32, headdim) for headdim in (32, 64, 96, 128, 192, 256)),
    ],
    ids=str,
)  # fmt: skip
def test_no_schedule_changes_a_bit(machine, dtype, headdim):
    """At least 3 tiles of keys and 2 of rows; threads and blocks in any order, copies landing at any time."""
    lengths = (70, 100) if dtype == torch.float32 and headdim > 128 else (131, 197)
    q, k, v = tensors(dtype, 1, *lengths, 1, 1, headdim)
    args = plain_args(q, k, v, causal=True)
    expected = checked(machine, args, seed=0, landing="at issue")
    for seed, landing in ((1, "at wait"), (2, "between"), (3, "at issue"), (4, "at wait"), (5, "between")):
        found = checked(machine, args, seed=seed, landing=landing)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_no_bank_conflicts(emulator):
    """Every access site of the main loop and of the epilogue, all headdims."""
    for headdim in (32, 64, 96, 128, 192, 256):
        for rows in (200, 20):
            q, k, v = tensors(torch.float16, 1, rows, 140, 1, 1, headdim)
            checked(emulator, plain_args(q, k, v))
            table = emulator.bank_table()
            assert len(table) >= 7, table
            assert emulator.bank_factor() == 1.0, (headdim, table)
            checked(emulator, plain_args(q.float(), k.float(), v.float()))
            assert emulator.bank_factor() == 1.0, (headdim, emulator.bank_table())


def test_masked_tiles_are_not_multiplied(emulator):
    """Causal attention executes the tiles below the diagonal and no others; so does a window."""
    q, k, v = tensors(torch.float16, 1, 512, 512, 1, 1, 64)
    executed = {}
    for name, call in {"full": {}, "causal": {"causal": True}, "window": {"window_size": (64, 0)}}.items():
        checked(emulator, plain_args(q, k, v, **call))
        executed[name] = emulator.mmas()
    tile = 4 * 128  # warps, instructions
    assert executed == {"full": 32 * tile, "causal": (2 + 4 + 6 + 8) * tile, "window": (2 + 3 + 3 + 3) * tile}


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.7])
def test_any_scale(machine, scale):
    q, k, v = tensors(torch.float16, 1, 70, 140, 2, 1, 64)
    truth, lse64 = attention64(q, k, v, softmax_scale=scale, causal=True)
    out, lse = checked(machine, plain_args(q, k, v, softmax_scale=scale, causal=True))
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=5e-3)
    torch.testing.assert_close(lse.double(), lse64, rtol=1e-5, atol=2e-4)


def test_large_scores(machine):
    """The maximum keeps exponents in range; the lowest finite bias means almost never, not never."""
    q, k, v = tensors(torch.float16, 1, 40, 100, 1, 1, 64)
    check(machine, q * 30, k * 30, v, {})
    bias = torch.full((1, 1, 40, 100), torch.finfo(torch.float32).min)
    out, _ = checked(machine, plain_args(q, k, v, attn_bias=bias))
    mean = v.double().mean(1, keepdim=True).expand(-1, 40, -1, -1)
    torch.testing.assert_close(out.double(), mean, rtol=0, atol=2e-3)


@pytest.mark.parametrize("lengths", [(70, 133), (3, 600)], ids=str)
def test_relative_bias(machine, lengths):
    """The bits of the matrix that it stands for; of few queries keys are split."""
    q, k, v = tensors(torch.float16, 1, *lengths, 2, 1, 64)
    line = torch.randn(1, 2, 1, sum(lengths) - 1)
    found = checked(machine, plain_args(q, k, v, attn_bias=line, bias_is_relative=True))
    expected = checked(machine, plain_args(q, k, v, attn_bias=reference.bias_by_score(line, *lengths)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1100])
@pytest.mark.parametrize(
    "features", [{}, {"causal": True, "window_size": (300, 0)}, {"sinks": True}, {"alibi": True}]
)
def test_split_keys(machine, length, features):
    """Few queries of long sequences: blocks share the keys, and the lengths around the splits' edges are exact."""
    nheads = 6
    call = {name: value for name, value in features.items() if name not in ("sinks", "alibi")}
    call |= {"sinks": torch.randn(nheads)} if "sinks" in features else {}
    call |= {"alibi_slopes": torch.rand(nheads) * 0.1} if "alibi" in features else {}
    q, k, v = tensors(torch.bfloat16, 2, 3, length, nheads, 2, 72, 40)
    check(machine, q, k, v, call)
    if length == 1100:
        check(machine, q.float(), k.float(), v.float(), call)


def test_rows_do_not_depend_on_the_batch(machine):
    """A sequence's bits are those it has alone: splits follow its own length."""
    q, k, v = tensors(torch.float16, 3, 2, 1300, 4, 2, 64)
    lengths = torch.tensor([1300, 700, 5], dtype=torch.int32)
    out, lse = checked(machine, plain_args(q, k, v, seqlens_k=lengths, causal=True))
    for b, length in enumerate(lengths.tolist()):
        alone = checked(
            machine, plain_args(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], causal=True)
        )
        assert torch.equal(alone[0][0], out[b])
        assert torch.equal(alone[1][0], lse[b])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "call", [{}, {"causal": True}, {"window_size": (40, 10)}, {"softcap": 5.0}, {"sinks": True}]
)
def test_packed_sequences(machine, dtype, call):
    lengths = [(70, 70), (1, 130), (0, 5), (33, 0), (150, 80)]
    nheads = 4
    if "sinks" in call:
        call = {"sinks": torch.randn(nheads)}
    total_q, total_k = (sum(x) for x in zip(*lengths))
    q, k, v = tensors(dtype, 1, 1, 1, nheads, 2, 64)
    q = torch.randn(1, total_q, nheads, 64).to(dtype)
    k, v = (torch.randn(1, total_k, 2, 64).to(dtype) for _ in range(2))
    cu_q, cu_k = (
        torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in zip(*lengths)
    )
    args = plain_args(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=150, max_seqlen_k=130, **call
    )
    out, lse = checked(machine, args)
    for b, (n_q, n_k) in enumerate(lengths):
        i, j = int(cu_q[b]), int(cu_k[b])
        part = [q[:, i : i + n_q], k[:, j : j + n_k], v[:, j : j + n_k]]
        if n_q == 0:
            continue
        truth, lse64 = attention64(*part, **call)
        label = f"sequence {b}"
        close_enough(
            out[:, i : i + n_q],
            by_hand(*part, **(NOTHING | call)),
            truth,
            2.0,
            1e-6,
            label,
            torch.finfo(dtype).eps,
        )
        torch.testing.assert_close(lse[:, i : i + n_q].double(), lse64[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("p", [0.0001, 0.3, 1.0])
@pytest.mark.parametrize(
    ("headdim", "dtype"), [(64, torch.float16), (128, torch.float16), (64, torch.float32)], ids=str
)
def test_dropout_is_that_of_the_cpu(machine, headdim, dtype, p):
    """The same elements fall out as on the CPU, whatever the tiles: v = 1 in one column a key shows them."""
    nheads, seqlen_q, seqlen_k = 4, 70, 64
    q, k, _ = tensors(dtype, 2, seqlen_q, seqlen_k, nheads, 2, headdim)
    v = torch.eye(seqlen_k, dtype=dtype).view(1, seqlen_k, 1, seqlen_k).expand(2, -1, 2, -1)
    state = torch.tensor([123456789012345, 77], dtype=torch.int64)
    args = plain_args(q, k, v, dropout_p=p, rng_state=state, causal=True)
    out, lse = checked(machine, args)
    expected, expected_lse = reference.attention(args)
    assert torch.equal(out == 0, expected == 0)
    if p == 0.3:
        assert 0.2 < (out[:, -1] == 0).double().mean() < 0.4
    torch.testing.assert_close(out.double(), expected.double(), rtol=4e-3, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
    from_cpu, _ = cpu.attention(args)
    assert torch.equal(out == 0, from_cpu == 0)


def paged_copy(x, page_size):
    """x (batch, seqlen, heads, dim) in shuffled pages of NaN, and the table."""
    batch, seqlen, heads, dim = x.shape
    blocks = -(-seqlen // page_size)
    table = torch.randperm(batch * blocks + 3)[: batch * blocks].view(batch, blocks).to(torch.int32)
    pages = torch.full((batch * blocks + 3, page_size, heads, dim), math.nan, dtype=x.dtype)
    for b in range(batch):
        for j in range(seqlen):
            pages[table[b, j // page_size], j % page_size] = x[b, j]
    return pages, table


@pytest.mark.parametrize(
    ("page_size", "dtype"), [*((n, torch.float16) for n in (1, 3, 16, 256)), (16, torch.float32)]
)
@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("call", [{}, {"softcap": 3.0, "window_size": (200, 0)}])
def test_pages_change_no_bit(machine, page_size, dtype, seqlen_q, call):
    q, k, v = tensors(dtype, 2, seqlen_q, 600, 4, 2, 64)
    lengths = torch.tensor([600, 77], dtype=torch.int32)
    generator = torch.get_rng_state()
    k_pages, table = paged_copy(k, page_size)
    torch.set_rng_state(generator)
    v_pages, _ = paged_copy(v, page_size)
    call = {"seqlens_k": lengths, "causal": True, **call}
    out, lse = checked(machine, plain_args(q, k_pages, v_pages, block_table=table, **call))
    truth, lse64 = attention64(q, k, v, **(call | {"seqlens_k": lengths.tolist()}))
    tolerance = 3e-6 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), lse64, rtol=1e-5, atol=1e-4)
    if seqlen_q * 2 <= 64:  # the same kernel but for the addresses
        plain = checked(machine, plain_args(q, k, v, **call))
        assert torch.equal(out, plain[0])
        assert torch.equal(lse, plain[1])


@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_rows_of_a_cache(machine, seqlen_q):
    """Left padding, another order of rows, lengths below the capacity; what is outside is NaN."""
    q, k, v = tensors(torch.bfloat16, 3, seqlen_q, 300, 4, 2, 64)
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    begin, end = torch.tensor([0, 7, 64], dtype=torch.int32), torch.tensor([300, 200, 64], dtype=torch.int32)
    for x in (k, v):
        for b in range(3):
            x[order[b], : begin[b]] = math.nan
            x[order[b], end[b] :] = math.nan
    out, lse = checked(
        machine,
        plain_args(q, k, v, causal=True, seqlens_k=end, k_leftpad=begin, cache_batch_idx=order),
    )
    for b in range(3):
        row = slice(int(order[b]), int(order[b]) + 1)
        keys = slice(int(begin[b]), int(end[b]))
        truth, lse64 = attention64(q[b : b + 1], k[row, keys], v[row, keys], causal=True)
        torch.testing.assert_close(out[b : b + 1].double(), truth, rtol=0, atol=2e-2)
        torch.testing.assert_close(lse[b : b + 1].double(), lse64, rtol=1e-5, atol=1e-4)


def test_what_the_backend_lacks_it_names():
    q, k, v = tensors(torch.float16, 1, 4, 4, 2, 2, 64)
    assert cuda._lacks(plain_args(q, k, v)) is None
    assert cuda._lacks(plain_args(q.float(), k.float(), v.float())) is None
    assert cuda._lacks(plain_args(q.double(), k.double(), v.double())) == "lacks dtype 'float64'"
    assert cuda._lacks(plain_args(q, k, v, needs_grad=True)) is None
    assert cuda._lacks(plain_args(q.float(), k.float(), v.float(), needs_grad=True)) is None
    wide = torch.zeros(1, 4, 2, 264, dtype=torch.float16)
    assert cuda._lacks(plain_args(wide, wide, wide)) == "lacks headdim above 256"
    widest = torch.zeros(1, 4, 2, 256)
    assert cuda._lacks(plain_args(widest, widest, widest, needs_grad=True)) is None
    assert cuda.supports(plain_args(q, k, v)) == "lacks device 'cpu'"
