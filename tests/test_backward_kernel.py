"""The CPU kernel's gradients against those that autograd finds for the naive composite, in float64.

Tolerance is earned: at most three times the error of the same composite in the call's dtype (+1e-6 for fp32).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from tolerance import assert_accurate
from torch import Tensor

from fastattn.args import AttentionArgs
from fastattn.backends import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class AttentionGrads(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


def composite(args: AttentionArgs, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` by the book, in q's dtype; differentiable, and zero in rows that see nothing."""
    q, k, v = args.q, args.k, args.v
    batch, seqlen_q, nheads, _ = q.shape
    seqlen_k, group = k.shape[1], nheads // k.shape[2]
    used = torch.full((batch,), seqlen_k) if args.seqlens_k is None else args.seqlens_k
    scores = torch.einsum("bihd,bjhd->bhij", q * args.softmax_scale, k.repeat_interleave(group, 2))
    if args.softcap > 0:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    if args.attn_bias is not None:
        scores = scores + args.attn_bias
    place = torch.arange(seqlen_q)[None, :, None] + (used - seqlen_q)[:, None, None]  # (batch, seqlen_q, 1)
    key = torch.arange(seqlen_k)
    if args.alibi_slopes is not None:
        slopes = args.alibi_slopes.to(q.dtype).expand(batch, nheads)[:, :, None, None]
        scores = scores - slopes * (place - key).abs()[:, None]
    left, right = args.window_size
    open_ = key < used[:, None, None]
    if args.causal or right >= 0:
        open_ = open_ & (key <= place + (0 if args.causal else right))
    if left >= 0:
        open_ = open_ & (key >= place - left)
    open_ = open_[:, None].expand(scores.shape)
    if args.attn_mask is not None:
        open_ = open_ & args.attn_mask
    scores = scores.masked_fill(~open_, -torch.inf)
    if args.sinks is not None:
        column = args.sinks[None, :, None, None].to(q.dtype).expand(batch, nheads, seqlen_q, 1)
        scores = torch.cat([scores, column], -1)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(~seen[..., 0], -torch.inf)
    weights = torch.softmax(scores, -1)[..., :seqlen_k] * seen
    if keep is not None:
        weights = weights * keep / (1 - args.dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(group, 2)), lse


def autograd(
    args: AttentionArgs, dout: Tensor, dlse: Tensor | None, dtype: torch.dtype, keep: Tensor | None
) -> list[Tensor]:
    """The composite's gradients in ``dtype``: of q, k, v, and of the bias and the sinks where there are any."""
    names = ["q", "k", "v", *(n for n in ("attn_bias", "sinks") if getattr(args, n) is not None)]
    leaves = {name: getattr(args, name).detach().to(dtype).requires_grad_() for name in names}
    out, lse = composite(replaced(args, **leaves), None if keep is None else keep.to(dtype))
    outs, grads = [out], [dout.to(dtype)]
    if dlse is not None:
        seen = lse > -torch.inf
        outs.append(torch.where(seen, lse, 0.0))
        grads.append(dlse.to(dtype))
    return list(torch.autograd.grad(outs, list(leaves.values()), grads))


def replaced(args: AttentionArgs, **changes: Any) -> AttentionArgs:
    fields = {name: getattr(args, name) for name in AttentionArgs.__dataclass_fields__}
    return AttentionArgs(**{**fields, **changes})


def inputs(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    seqlen_q: int = 97,
    seqlen_k: int = 130,
    nheads: int = 4,
    nheads_k: int = 2,
    headdim: int = 40,
    headdim_v: int = 59,
    **fields: Any,
) -> AttentionArgs:
    return AttentionArgs(
        torch.randn(batch, seqlen_q, nheads, headdim, dtype=dtype),
        torch.randn(batch, seqlen_k, nheads_k, headdim, dtype=dtype),
        torch.randn(batch, seqlen_k, nheads_k, headdim_v, dtype=dtype),
        headdim**-0.5,
        return_lse=True,
        **fields,
    )


def gradients(args: AttentionArgs, dout: Tensor, dlse: Tensor | None = None) -> AttentionGrads:
    out, lse = cpu.attention(args)
    assert lse is not None
    return AttentionGrads(
        *cpu.attention_backward(args, out, lse, dout, dlse, needs_dbias=args.attn_bias is not None)
    )


def dout_of(args: AttentionArgs) -> Tensor:
    return torch.randn(*args.q.shape[:3], args.v.shape[3]).to(args.q.dtype)


def dlse_of(args: AttentionArgs) -> Tensor:
    dtype = torch.float64 if args.q.dtype == torch.float64 else torch.float32
    return torch.randn(args.q.shape[0], args.q.shape[2], args.q.shape[1], dtype=dtype)


def check(
    args: AttentionArgs, *, with_dlse: bool = False, keep: Tensor | None = None, label: str = ""
) -> None:
    dout = dout_of(args)
    dlse = dlse_of(args) if with_dlse else None
    found = [grad for grad in gradients(args, dout, dlse) if grad is not None]
    truth = autograd(args, dout, dlse, torch.float64, keep)
    yardstick = autograd(args, dout, dlse, args.q.dtype, keep)
    sources = [args.q, args.k, args.v, *(x for x in (args.attn_bias, args.sinks) if x is not None)]
    assert len(found) == len(truth)
    for name, grad, mine, right, source in zip(
        ("dq", "dk", "dv", "dbias or dsinks", "dsinks"), found, yardstick, truth, sources, strict=False
    ):
        assert (grad.shape, grad.dtype, grad.is_contiguous()) == (source.shape, source.dtype, True), name
        if args.q.dtype == torch.float64:  # where the yardstick is the truth
            eps = 10 * torch.finfo(grad.dtype).eps if grad.dtype != torch.float64 else 1e-11
            torch.testing.assert_close(grad.double(), right, rtol=eps, atol=eps, msg=f"{label} {name}")
        else:
            assert_accurate(grad, mine.to(grad.dtype), right, factor=3.0, label=f"{label} {name}")


SHAPES = [
    # batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v
    (2, 1, 1, 1, 1, 1, 1),
    (2, 1, 257, 4, 2, 64, 64),
    (1, 257, 1, 2, 1, 64, 40),
    (1, 97, 257, 6, 2, 40, 59),
    (1, 257, 97, 4, 1, 59, 128),
    (1, 300, 300, 2, 2, 64, 64),
    (1, 130, 190, 1, 1, 128, 111),
    (1, 70, 140, 1, 1, 256, 512),
]
NAMES = ("batch", "seqlen_q", "seqlen_k", "nheads", "nheads_k", "headdim", "headdim_v")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(isa, dtype, causal):
    for shape in SHAPES:
        args = inputs(dtype, causal=causal, **dict(zip(NAMES, shape, strict=True)))
        check(args, label=str(shape))


@pytest.mark.parametrize("causal", [False, True])
def test_many_blocks_of_keys(causal):
    args = inputs(torch.float32, batch=1, seqlen_q=1025, seqlen_k=1025, nheads=2, headdim=64, headdim_v=64)
    check(replaced(args, causal=causal))


def features(args: AttentionArgs) -> dict[str, AttentionArgs]:
    """One call per feature, and some together."""
    batch, seqlen_q, nheads, _ = args.q.shape
    seqlen_k, dtype = args.k.shape[1], args.q.dtype
    mask = torch.rand(batch, 1, seqlen_q, seqlen_k) < 0.5
    mask[..., 64:] &= torch.rand(batch, 1, seqlen_q, 1) < 0.7  # also tiles with nothing in them
    mask[:, :, 3] = False  # a row that sees nothing
    slopes = torch.rand(batch, nheads)
    bias = torch.randn(1, nheads, seqlen_q, seqlen_k).to(dtype)
    changes: dict[str, dict[str, Any]] = {
        "window": {"window_size": (20, 3)},
        "causal window": {"window_size": (33, -1), "causal": True},
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": slopes},
        "mask": {"attn_mask": mask},
        "key mask": {"attn_mask": torch.arange(seqlen_k)[None, None, None] < 70},
        "sinks": {"sinks": torch.randn(nheads)},
        "lengths": {"seqlens_k": torch.tensor([seqlen_k - 5, 0], dtype=torch.int32)},
        "causal lengths": {"seqlens_k": torch.tensor([40, 90], dtype=torch.int32), "causal": True},
        "softcap, bias": {"softcap": 3.0, "attn_bias": bias},
        "all": {
            "softcap": 3.0, "attn_bias": bias, "alibi_slopes": slopes[0], "attn_mask": mask, "causal": True,
            "sinks": torch.randn(nheads), "window_size": (50, 0),
        },
    }  # fmt: skip
    return {name: replaced(args, **change) for name, change in changes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_features(isa, dtype):
    for name, args in features(inputs(dtype)).items():
        check(args, with_dlse=True, label=name)


def test_bias_shapes(isa):
    """Of every shape that broadcasts, for several sequences, heads, strips of rows and blocks of keys.

    In float64: the gradient of a bias that broadcasts over the keys is zero without dlse, all of it cancels.
    """
    args = inputs(torch.float64, seqlen_q=70, seqlen_k=300, headdim=16, headdim_v=16)
    for sizes in itertools.product((False, True), repeat=4):
        shape = [size if real else 1 for size, real in zip((2, 4, 70, 300), sizes, strict=True)]
        bias = torch.randn(shape, dtype=torch.float64)
        check(replaced(args, attn_bias=bias), with_dlse=True, label=str(shape))
    check(replaced(args, attn_bias=torch.randn(70, 300).double()), label="two dimensions")
    check(replaced(args, attn_bias=torch.randn(70, 300).bfloat16()), label="another dtype")


def test_bias_in_each_dtype(isa):
    for dtype, bias_dtype in itertools.product(DTYPES, [*DTYPES, torch.float64]):
        args = inputs(dtype, seqlen_q=70, seqlen_k=300, headdim=16, headdim_v=16)
        for shape in ((1, 4, 70, 300), (2, 1, 1, 300)):
            check(replaced(args, attn_bias=torch.randn(shape).to(bias_dtype)), label=f"{bias_dtype} {shape}")


def test_bias_of_single_rows_and_keys():
    for seqlen_q, seqlen_k in ((1, 70), (70, 1), (1, 1)):
        args = inputs(torch.float64, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        for shape in ((1, 1, seqlen_q, seqlen_k), (2, 4, seqlen_q, seqlen_k), (1, 4, 1, 1)):
            bias = torch.randn(shape, dtype=torch.float64)
            check(replaced(args, attn_bias=bias), with_dlse=True, label=str((seqlen_q, seqlen_k, shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout(isa, dtype):
    # With the identity for v, out is the dropped weights: what is not zero was kept.
    args = inputs(dtype, seqlen_q=70, seqlen_k=96, headdim=16, headdim_v=24)
    args = replaced(args, dropout_p=0.4, rng_state=torch.tensor([3, 5]))
    identity = torch.eye(96, dtype=dtype)[None, :, None].expand(2, 96, 2, 96)
    out, _ = cpu.attention(replaced(args, v=identity))
    keep = (out != 0).transpose(1, 2)
    assert 0.5 < keep.double().mean() < 0.7
    check(args, with_dlse=True, keep=keep)
    assert all(grad.abs().max() == 0 for grad in gradients(replaced(args, dropout_p=1.0), dout_of(args))[:3])


def test_float64(isa):
    args = inputs(torch.float64)
    for name, call in {"plain": args, "causal": replaced(args, causal=True), **features(args)}.items():
        check(call, with_dlse=True, label=name)


def same(a: AttentionGrads, b: AttentionGrads) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


def test_bits_do_not_depend_on_threads(isa, threads):
    base = inputs(torch.float32, batch=1, seqlen_q=600, seqlen_k=700, nheads=2, nheads_k=1, headdim=32)
    calls = [
        base,
        replaced(base, causal=True),
        replaced(base, window_size=(100, 20)),
        replaced(base, attn_bias=torch.randn(1, 1, 600, 700)),
        replaced(base, attn_bias=torch.randn(1, 2, 600, 1)),
        replaced(base, dropout_p=0.2, rng_state=torch.tensor([1, 2])),
        # A bias that the batch shares: its gradient is added up over sequences.
        replaced(
            inputs(torch.float32, batch=3, seqlen_q=90, seqlen_k=200, nheads=2, nheads_k=1, headdim=32),
            attn_bias=torch.randn(1, 2, 90, 200),
        ),
    ]
    for args in calls:
        dout = dout_of(args)
        torch.set_num_threads(1)
        alone = gradients(args, dout)
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            assert same(gradients(args, dout), alone)


def test_bits_do_not_depend_on_the_batch(isa):
    args = inputs(torch.bfloat16, causal=True)
    dout = dout_of(args)
    together = gradients(args, dout)
    for row in range(2):
        rows = slice(row, row + 1)
        alone = gradients(replaced(args, q=args.q[rows], k=args.k[rows], v=args.v[rows]), dout[rows])
        assert same(alone, AttentionGrads(*(grad[rows] for grad in together[:3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_sequences(isa, dtype):
    """Each sequence gets the bits that it gets alone; empty ones are no exception."""
    lengths_q, lengths_k = [70, 0, 1, 130], [90, 5, 0, 300]
    args = inputs(dtype, batch=1, seqlen_q=201, seqlen_k=395)
    ends_q, ends_k = (list(itertools.accumulate([0, *lengths])) for lengths in (lengths_q, lengths_k))
    packed = replaced(
        args, causal=True, max_seqlen_q=130, max_seqlen_k=300,
        cu_seqlens_q=torch.tensor(ends_q, dtype=torch.int32), cu_seqlens_k=torch.tensor(ends_k, dtype=torch.int32),
    )  # fmt: skip
    dout = dout_of(args)
    grads = gradients(packed, dout)
    for i in range(4):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        own = replaced(args, q=args.q[:, rows], k=args.k[:, keys], v=args.v[:, keys], causal=True)
        alone = gradients(own, dout[:, rows])
        assert same(alone, AttentionGrads(grads.dq[:, rows], grads.dk[:, keys], grads.dv[:, keys])), i


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}])
def test_empty(sizes):
    args = inputs(torch.float32, **sizes)
    for grad, source in zip(gradients(args, dout_of(args))[:3], (args.q, args.k, args.v), strict=True):
        assert grad.shape == source.shape
        assert not grad.any()


def test_rows_without_keys_and_unused_keys_get_zero(isa):
    args = inputs(torch.float32, batch=1, seqlen_q=200, seqlen_k=60, causal=True)
    assert not gradients(args, dout_of(args)).dq[:, :140].any()
    args = inputs(torch.float32, seqlens_k=torch.tensor([7, 100], dtype=torch.int32))
    grads = gradients(args, dout_of(args))
    for grad in (grads.dk, grads.dv):
        assert not grad[0, 7:].any()
        assert grad[1, 99].any()
        assert not grad[1, 100:].any()


def test_strides(isa):
    """Slices of a bigger tensor, and a last dimension that is not the fastest."""
    args = inputs(torch.float32)
    dout = dout_of(args)
    apart = [torch.stack([x, x], 2)[:, :, 0] for x in (args.q, args.k, args.v)]
    across = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (args.q, args.k, args.v)]
    for q, k, v in (apart, across):
        strided = torch.stack([dout, dout], -1)[..., 0]
        assert same(gradients(replaced(args, q=q, k=k, v=v), strided), gradients(args, dout))


def test_large_scores_stay_finite(isa):
    for scale in (1e4, 1e-4):
        args = inputs(torch.float32)
        args = replaced(args, q=args.q * scale, causal=True)
        assert all(grad.isfinite().all() for grad in gradients(args, dout_of(args))[:3])
