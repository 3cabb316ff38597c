"""Drop-in for F.scaled_dot_product_attention: same shapes, strides, masks, corners and gradients, on every path."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import attention64

from fastattn import attention, scaled_dot_product_attention
from fastattn.backends import cpu

SHAPES = {  # query, key, value
    "4-D": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "2-D": ((5, 8), (7, 8), (7, 8)),
    "5-D": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8)),
    "another headdim_v": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "key's batch broadcasts": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "query's batch broadcasts": ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "heads broadcast": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "query's heads broadcast": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "value broadcasts": ((2, 4, 5, 8), (2, 4, 7, 8), (1, 1, 7, 8)),
    "query has fewer dimensions": ((4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "more queries than keys": ((2, 4, 9, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "as many": ((2, 4, 7, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "one query": ((2, 4, 1, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no queries": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    "no batch": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
}
SHARED = {
    "GQA": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "GQA, 3-D": ((6, 5, 8), (2, 7, 8), (2, 7, 8)),
    "GQA, key and value apart": ((2, 6, 5, 8), (2, 3, 7, 8), (2, 2, 7, 8)),
    "GQA, batch broadcasts": ((2, 6, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)),
    "GQA of equals": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
}
MASKS = [(5, 7), (1, 7), (5, 1), (4, 5, 7), (2, 1, 5, 7), (2, 4, 5, 7), (2, 1, 1, 7), (1, 1, 1, 1)]


def tensors(shapes, dtype=torch.float64, requires_grad=False):
    return [torch.randn(*shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def both(inputs, **call):
    """Ours and torch's, with the gradients of every input that wants one."""
    found = []
    for fn in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        mask = call.get("attn_mask")
        leaves = [x for x in (*inputs, mask) if x is not None and x.requires_grad]
        out = fn(*inputs, **call)
        weight = torch.linspace(-1, 1, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].view(out.shape)
        found.append((out, *(torch.autograd.grad((out * weight).sum(), leaves) if leaves else ())))
    return found


def assert_same(inputs, **call):
    ours, theirs = both(inputs, **call)
    assert ours[0].stride() == theirs[0].stride() or not ours[0].numel()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", [*SHAPES, *SHARED])
def test_shapes(name, is_causal, requires_grad):
    inputs = tensors({**SHAPES, **SHARED}[name], requires_grad=requires_grad)
    assert_same(inputs, is_causal=is_causal, enable_gqa=name in SHARED)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "float, with a gradient", "float32 for float64"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(shape, kind, requires_grad):
    inputs = tensors(SHAPES["4-D"], requires_grad=requires_grad)
    mask = torch.randn(shape, dtype=torch.float32 if "32" in kind else torch.float64)
    if kind == "bool":
        mask = mask > -0.5
    assert_same(inputs, attn_mask=mask.requires_grad_("gradient" in kind))


@pytest.mark.parametrize("name", ["3-D", "5-D", "2-D", "query's batch broadcasts", "GQA"])
def test_masks_of_other_shapes(name):
    shapes = {**SHAPES, **SHARED}[name]
    inputs = tensors(shapes, requires_grad=True)
    full = F.scaled_dot_product_attention(*inputs, enable_gqa=name == "GQA").shape
    for keep in range(2 ** (len(full) - 2)):
        lead = [n if keep >> i & 1 else 1 for i, n in enumerate(full[:-2])]
        assert_same(inputs, attn_mask=torch.randn(*lead, 5, 7).double(), enable_gqa=name == "GQA")


def test_rows_that_see_nothing_are_zero():
    mask = torch.tensor([1, 0, 1, 0, 1], dtype=torch.bool)[:, None].expand(5, 7)
    for x in (mask, torch.zeros(5, 7).double().masked_fill(~mask, -math.inf)):
        inputs = tensors(SHAPES["4-D"], requires_grad=True)
        assert_same(inputs, attn_mask=x)
        assert not scaled_dot_product_attention(*inputs, attn_mask=x)[:, :, 1].any()


@pytest.mark.parametrize("seqlens", [(5, 7), (7, 7), (9, 7)])
def test_causal_and_a_mask_both_hold(seqlens):
    n, m = seqlens
    inputs = tensors(((2, 4, n, 8), (2, 4, m, 8), (2, 4, m, 8)), requires_grad=True)
    for mask in (torch.rand(n, m) > 0.4, torch.randn(2, 1, n, 1).double()):
        assert_same(inputs, attn_mask=mask, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["heads first", "seqlen first", "of one projection", "headdim not last"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_layouts_and_dtypes(layout, dtype, requires_grad):
    shape = {"heads first": (2, 4, 65, 32), "headdim not last": (2, 4, 32, 65)}.get(layout, (2, 65, 4, 32))
    q, k, v = tensors([shape] * 3, dtype)
    if layout == "of one projection":
        q, k, v = torch.randn(2, 65, 3, 4, 32, dtype=dtype).unbind(2)
    if layout == "headdim not last":
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))
    elif layout != "heads first":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    inputs = [x.detach().requires_grad_(requires_grad) for x in (q, k, v)]
    out = scaled_dot_product_attention(*inputs, is_causal=True)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert out.stride() == theirs.stride()
    truth, _ = attention64(*(x.detach().transpose(1, 2) for x in inputs), causal=True)
    error, allowed = ((x.detach().double() - truth.transpose(1, 2)).abs().max().item() for x in (out, theirs))
    assert error <= 2 * allowed + (1e-6 if dtype == torch.float32 else 0)


def test_scale_and_autocast():
    inputs = tensors(SHAPES["4-D"], requires_grad=True)
    for scale in (0.3, -1.0, 0.0, 1):
        assert_same(inputs, scale=scale)
    q, k, v = tensors(SHAPES["4-D"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both((q, k, v), attn_mask=torch.zeros(5, 7))
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], theirs[0], atol=4e-3, rtol=0.016)


def test_dropout_is_that_of_attention():
    q, k, v = tensors(((2, 4, 50, 8), (2, 4, 60, 8), (2, 4, 60, 6)), requires_grad=True)
    torch.manual_seed(5)
    out = scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(5)
    same = attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.3)
    torch.testing.assert_close(out, same.transpose(1, 2))
    assert not scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()
    ones = torch.ones(4, 4, 300, 8)
    assert scaled_dot_product_attention(ones, ones, ones, dropout_p=0.3).mean() == pytest.approx(1, abs=0.01)


def test_gradients_of_both_orders():
    q, k, v = tensors(((1, 2, 4, 3), (1, 1, 3, 3), (1, 1, 3, 2)), requires_grad=True)
    mask = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask, is_causal=True, enable_gqa=True)

    assert torch.autograd.gradcheck(call, (q, k, v, mask))
    assert torch.autograd.gradgradcheck(call, (q, k, v, mask))


@pytest.mark.parametrize("name", ["4-D", "3-D", "heads broadcast", "more queries than keys"])
def test_compiled(name):
    torch._dynamo.reset()
    inputs = tensors(SHAPES[name], torch.float32, requires_grad=True)

    def step(q, k, v):
        return scaled_dot_product_attention(q * 1.5, k, v, is_causal=True) + 1

    found = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = fn(*inputs)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_vmap():
    q, k, v = tensors(((3, 2, 4, 5, 8), (2, 4, 7, 8), (3, 2, 4, 7, 8)), torch.float32)
    found = torch.vmap(scaled_dot_product_attention, (0, None, 0))(q, k, v)
    for i in range(3):
        torch.testing.assert_close(found[i], scaled_dot_product_attention(q[i], k, v[i]))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_quick_way_and_the_long_way_agree(dtype, requires_grad, monkeypatch):
    bias = torch.randn(2, 1, 1, 7)
    cases = [
        (n, {"is_causal": c, "enable_gqa": n in SHARED, "attn_mask": mask})
        for n in ("4-D", "GQA", "one query", "more queries than keys")
        for c in (False, True)
        for mask in (
            None,
            bias,
            bias > 0,
            bias.bfloat16() if dtype == torch.bfloat16 else bias.half().float(),
        )
    ]
    for name, call in cases:
        inputs = tensors({**SHAPES, **SHARED}[name], dtype, requires_grad)
        outs = [scaled_dot_product_attention(*inputs, **call)]
        with monkeypatch.context() as without:
            without.setattr(cpu, "plain_attention", None)
            outs.append(scaled_dot_product_attention(*inputs, **call))
        assert torch.equal(*outs), name
        assert outs[0].stride() == outs[1].stride()
        if requires_grad:
            weight = torch.randn_like(outs[0])
            grads = [torch.autograd.grad(out, inputs, weight) for out in outs]
            assert all(torch.equal(a, b) for a, b in zip(*grads)), name


R = torch.randn
WRONG = {
    "query: expected 2 or more dimensions": ((R(8), R(7, 8), R(7, 8)), {}),
    "key: expected (..., seqlen_k, headdim=8), got (2, 4, 7, 9)": ((R(2, 4, 5, 8), R(2, 4, 7, 9), R(2, 4, 7, 8)), {}),
    "value: expected (..., seqlen_k=7, headdim_v), got (2, 4, 6, 8)": ((R(2, 4, 5, 8), R(2, 4, 7, 8), R(2, 4, 6, 8)), {}),
    "leading dimensions that broadcast": ((R(2, 4, 5, 8), R(2, 2, 7, 8), R(2, 2, 7, 8)), {}),
    "key: expected heads that divide query's 4, got 3": ((R(2, 4, 5, 8), R(2, 3, 7, 8), R(2, 3, 7, 8)), {"enable_gqa": True}),
    "enable_gqa: expected tensors with heads": ((R(5, 8), R(7, 8), R(7, 8)), {"enable_gqa": True}),
    "key: expected the dtype of query": ((R(4, 5, 8), R(4, 7, 8).double(), R(4, 7, 8)), {}),
    "query: expected dtype": ((torch.ones(4, 5, 8, dtype=torch.int64),) * 3, {}),
    "query: expected a last dimension from 1 to 512, got 600": ((R(4, 5, 600),) * 3, {}),
    "attn_mask: expected dtype bool, float32, got int64": ((R(4, 5, 8),) * 3, {"attn_mask": torch.ones(5, 5, dtype=torch.int64)}),
    "attn_mask: expected dtype bool, float32, got float64": ((R(4, 5, 8),) * 3, {"attn_mask": R(5, 5).double()}),
    "attn_mask: expected a shape that broadcasts to (4, 5, 5), got (6, 5)": ((R(4, 5, 8),) * 3, {"attn_mask": R(6, 5)}),
    "attn_mask: expected a shape that broadcasts to (1, 4, 5, 5), got (3, 1, 5, 5)": ((R(1, 4, 5, 8),) * 3, {"attn_mask": R(3, 1, 5, 5)}),
    "dropout_p: expected a value in [0.0, 1.0], got 1.5": ((R(4, 5, 8),) * 3, {"dropout_p": 1.5}),
    "dropout_p: expected a value in [0.0, 1.0], got -0.1": ((R(4, 5, 8),) * 3, {"dropout_p": -0.1}),
    "scale: expected a finite number, got inf": ((R(4, 5, 8),) * 3, {"scale": math.inf}),
    "is_causal: expected a bool, got int": ((R(4, 5, 8),) * 3, {"is_causal": 1}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    args, call = WRONG[message]
    with pytest.raises((ValueError, TypeError)) as error:
        scaled_dot_product_attention(*args, **call)
    assert message in str(error.value)
