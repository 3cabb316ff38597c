"""A bias by distance: values and gradients against the matrix that it stands for, in float64; and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_features import close_enough
from torch import Tensor

from fastattn import attention
from fastattn.gradient_sums import SLOT_KEYS, scores_to_bias

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def matrix(relative: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """Row by row: the next query sees the same line one place further left. (..., seqlen_q, seqlen_k)."""
    starts = range(seqlen_q - 1, -1, -1)
    return torch.stack([relative[..., start : start + seqlen_k] for start in starts], -2)


def inputs(
    dtype: torch.dtype, batch: int, seqlen_q: int, seqlen_k: int, nheads: int, nheads_k: int, headdim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and what comes back of the result."""
    shapes = ((seqlen_q, nheads), (seqlen_k, nheads_k), (seqlen_k, nheads_k), (seqlen_q, nheads))
    return tuple(torch.randn(batch, *shape, headdim).to(dtype) for shape in shapes)  # type: ignore[return-value]


def gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dout: Tensor, name: str, **call: Any
) -> list[Tensor]:
    """out, and the gradients of q, k, v and the bias, which is the argument ``name``."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, bias)]
    out = attention(*leaves[:3], **{name: leaves[3]}, **call)
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(relative: Tensor, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **call: Any) -> None:
    """By the accuracy rule, beside PyTorch's own arithmetic in the call's dtype, both against float64."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]

    def by_matrix(dtype: torch.dtype) -> list[Tensor]:
        leaf = relative.to(dtype).requires_grad_()
        whole = matrix(leaf, seqlen_q, seqlen_k)
        x = [t.to(dtype) for t in (q, k, v)]
        out, dq, dk, dv, dwhole = gradients(
            *x, whole, dout.to(dtype), "attn_bias", backend="reference", **call
        )
        return [out, dq, dk, dv, torch.autograd.grad(whole, leaf, dwhole)[0]]

    truth, usual = by_matrix(torch.float64), by_matrix(q.dtype)
    found = gradients(q, k, v, relative, dout, "relative_bias", backend="cpu", **call)
    for name, x, yardstick, exact in zip(
        ("out", "dq", "dk", "dv", "dbias"), found, usual, truth, strict=True
    ):
        factor, floor = (2.0, 1e-6) if name == "out" else (3.0, 3e-6)
        close_enough(x, yardstick, exact, factor, floor, name, torch.finfo(q.dtype).eps, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(97, 130, 2, 2, 40), (257, 65, 2, 1, 59), (1, 97, 2, 2, 64), (130, 257, 4, 4, 64)]
)
def test_against_float64(isa, dtype, sizes):
    seqlen_q, seqlen_k, nheads, nheads_k, headdim = sizes
    x = inputs(dtype, 2, seqlen_q, seqlen_k, nheads, nheads_k, headdim)
    for causal in (False, True):
        check(torch.randn(nheads, seqlen_q + seqlen_k - 1).to(dtype), *x, causal=causal)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1), (1, 2), (3, 1), (3, 2)])
def test_shapes(shape):
    x = inputs(torch.float32, 3, 70, 140, 2, 1, 32)
    check(torch.randn(*shape, 209), *x, causal=True)


def test_strides(isa):
    """As an embedding of distances has it: heads side by side."""
    q, k, v, _ = inputs(torch.float32, 2, 70, 140, 2, 2, 32)
    relative = torch.randn(209, 2).T
    assert torch.equal(
        attention(q, k, v, relative_bias=relative), attention(q, k, v, relative_bias=relative.contiguous())
    )


@pytest.mark.parametrize(
    "call",
    [
        {"window_size": (20, 7)},
        {"softcap": 3.0},
        {"attn_mask": torch.rand(2, 1, 70, 140, generator=torch.Generator().manual_seed(1)) > 0.3},
        {"sinks": torch.tensor([0.5, -1.0])},
        {"alibi_slopes": torch.tensor([0.1, 0.2])},
        {"dropout_p": 0.3, "rng_state": torch.tensor([3, 4])},
    ],
    ids=lambda call: next(iter(call)),
)
def test_beside_other_modifiers(isa, call):
    check(torch.randn(2, 209), *inputs(torch.float32, 2, 70, 140, 2, 2, 32), **call)


@given(
    seqlens=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    headdim=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    causal=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_random_calls(seqlens, heads, headdim, dtype, causal):
    relative = torch.randn(heads[0], sum(seqlens) - 1).to(dtype)
    check(relative, *inputs(dtype, 1, *seqlens, *heads, headdim), causal=causal)


def test_long_sequences():
    """More slots of keys than a work item holds, the last of them not full."""
    seqlen_q, seqlen_k = 300, 8 * SLOT_KEYS + 5
    check(torch.randn(2, seqlen_q + seqlen_k - 1), *inputs(torch.float32, 2, seqlen_q, seqlen_k, 2, 2, 64))


def test_bits_do_not_depend_on_threads(isa, threads):
    x = inputs(torch.float32, 3, 300, 700, 2, 2, 32)
    relative = torch.randn(2, 999)
    torch.set_num_threads(1)
    alone = gradients(*x[:3], relative, x[3], "relative_bias", causal=True)
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        together = gradients(*x[:3], relative, x[3], "relative_bias", causal=True)
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_has_the_bits_of_the_matrix(isa, dtype):
    q, k, v, _ = inputs(dtype, 2, 130, 97, 2, 2, 64)
    relative = torch.randn(2, 226).to(dtype)
    assert torch.equal(
        attention(q, k, v, relative_bias=relative), attention(q, k, v, attn_bias=matrix(relative, 130, 97))
    )


def test_lse_and_its_gradient():
    q, k, v, _ = inputs(torch.float64, 1, 30, 40, 2, 2, 16)

    def lse(relative: Tensor, **call: Any) -> Tensor:
        return attention(q, k, v, return_lse=True, **call)[1]

    leaf = torch.randn(2, 69, dtype=torch.float64).requires_grad_()
    found, expected = lse(leaf, relative_bias=leaf), lse(leaf, attn_bias=matrix(leaf, 30, 40))
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), leaf) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    q, k, v, _ = inputs(torch.float64, 1, 4, 5, 2, 1, 3)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(2, 8, dtype=torch.float64))]
    call = lambda q, k, v, relative: attention(q, k, v, relative_bias=relative, causal=True)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_compiled():
    q, k, v, dout = inputs(torch.float32, 2, 20, 30, 2, 2, 16)
    relative = torch.randn(2, 49, requires_grad=True)

    def step(relative: Tensor) -> Tensor:
        out = attention(q, k, v, relative_bias=2 * relative)
        (found,) = torch.autograd.grad(out, relative, dout)
        return found

    compiled = torch.compile(
        lambda r: attention(q, k, v, relative_bias=2 * r), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(torch.autograd.grad(compiled(relative), relative, dout)[0], step(relative))


@pytest.mark.parametrize("mapped", [(True, False), (False, True), (True, True)])
def test_vmap_is_a_loop(mapped):
    q, k, v, _ = inputs(torch.float32, 3, 20, 30, 2, 2, 16)
    relative = torch.randn(3, 2, 49)
    dims = tuple(0 if is_mapped else None for is_mapped in mapped)
    call = lambda q, relative: attention(q, k, v, relative_bias=relative)  # noqa: E731
    given_q, given_bias = (
        q[:, None].expand(3, 3, 20, 2, 16) if mapped[0] else q,
        relative if mapped[1] else relative[0],
    )
    found = torch.vmap(call, dims)(given_q, given_bias)
    for n in range(3):
        one = call(given_q[n] if mapped[0] else given_q, given_bias[n] if mapped[1] else given_bias)
        torch.testing.assert_close(found[n], one)


def test_autocast():
    q, k, v, _ = inputs(torch.float32, 1, 20, 30, 2, 2, 16)
    relative = torch.randn(2, 49)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, relative_bias=relative)
    low = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, attention(*low, relative_bias=relative.bfloat16()))


def test_empty():
    for batch, seqlen_q, seqlen_k in itertools.product((0, 1), (0, 3), (0, 3)):
        q, k, v, _ = inputs(torch.float32, batch, seqlen_q, seqlen_k, 2, 2, 8)
        relative = torch.randn(batch, 2, max(0, seqlen_q + seqlen_k - 1), requires_grad=True)
        out = attention(q, k, v, relative_bias=relative)
        assert out.shape == (batch, seqlen_q, 2, 8)
        if not seqlen_k:
            assert not out.any()
        (found,) = torch.autograd.grad(out.sum(), relative)
        assert found.shape == relative.shape


@pytest.mark.parametrize(
    ("relative", "message"),
    [
        (
            torch.zeros(2, 48),
            r"relative_bias: expected \(\[batch,\] \[nheads,\] seqlen_q \+ seqlen_k - 1 = 49\)",
        ),
        (
            torch.zeros(3, 49),
            r"relative_bias: expected a shape that broadcasts to \(1, 2, 49\), got \(3, 49\)",
        ),
        (torch.zeros(1, 1, 1, 49), "relative_bias: expected"),
        (torch.zeros(2, 49, dtype=torch.int64), "relative_bias: expected .*float"),
        (torch.zeros(2, 49, device="meta"), "relative_bias: expected .*cpu"),
        ([0.0] * 49, "relative_bias: expected a .*Tensor, got list"),
    ],
)
def test_errors(relative, message):
    q, k, v, _ = inputs(torch.float32, 1, 20, 30, 2, 2, 16)
    with pytest.raises((ValueError, TypeError), match=message):
        attention(q, k, v, relative_bias=relative)


def test_one_bias_at_a_time():
    q, k, v, _ = inputs(torch.float32, 1, 20, 30, 2, 2, 16)
    with pytest.raises(ValueError, match="relative_bias: expected None together with attn_bias"):
        attention(q, k, v, relative_bias=torch.zeros(2, 49), attn_bias=torch.zeros(20, 30))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(20, 30), (30, 20), (1, 9), (9, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_gradients_of_scores_are_added_up_by_diagonals(shape, seqlen_q, seqlen_k):
    """What backends do that write out dS."""
    leaf = torch.randn(*shape, seqlen_q + seqlen_k - 1, dtype=torch.float64, requires_grad=True)
    dscores = torch.randn(3, 2, seqlen_q, seqlen_k, dtype=torch.float64)
    found = scores_to_bias(dscores, leaf[:, :, None], is_relative=True)
    if seqlen_q == 0:
        assert not found.any()
        return
    spread = matrix(leaf, seqlen_q, seqlen_k).expand(3, 2, -1, -1)
    (expected,) = torch.autograd.grad(spread, leaf, dscores)
    torch.testing.assert_close(found[:, :, 0], expected)
