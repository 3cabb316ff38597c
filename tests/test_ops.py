"""What PyTorch's machinery sees of attention: autograd to the second order, opcheck, compile, vmap, checkpoint, autocast."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastattn import attention, attention_varlen, attention_with_kvcache, ops
from fastattn.args import AttentionArgs

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (1, 0)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.5, 0.3, 0.9], dtype=torch.float64)},
    "mask": {
        "attn_mask": torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    },
}


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def check_orders(call, inputs):
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", FEATURES)
def test_gradients_of_both_orders(name, backend):
    """seqlen_q > seqlen_k leaves causal rows without keys; the mask has a row that sees none."""
    q, k, v = leaves((1, 3 if name == "mask" else 6, 4, 4), (1, 5, 2, 4), (1, 5, 2, 3))
    check_orders(lambda q, k, v: attention(q, k, v, backend=backend, **FEATURES[name]), (q, k, v))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_bias_and_sinks_and_through_lse(backend):
    inputs = leaves((2, 3, 4, 4), (2, 5, 2, 4), (2, 5, 2, 3), (1, 4, 3, 5), (4,))
    check_orders(
        lambda q, k, v, bias, sinks: attention(
            q, k, v, attn_bias=bias, sinks=sinks, causal=True, return_lse=True, backend=backend
        ),
        inputs,
    )
    for shape in ((2, 1, 1, 5), (4, 3, 1), (3, 5), (2, 4, 3, 5), (1,)):
        q, k, v, bias = leaves((2, 3, 4, 4), (2, 5, 2, 4), (2, 5, 2, 3), shape)
        assert torch.autograd.gradcheck(
            lambda q, k, v, bias: attention(q, k, v, attn_bias=bias, backend=backend, return_lse=True),
            (q, k, v, bias),
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_under_dropout(backend):
    def call(q, k, v):
        torch.manual_seed(3)
        return attention(q, k, v, dropout_p=0.4, backend=backend)

    check_orders(call, leaves((1, 3, 4, 4), (1, 5, 2, 4), (1, 5, 2, 3)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_packed_sequences(backend):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 5], [0, 3, 5, 8]))
    check_orders(
        lambda q, k, v: attention_varlen(q, k, v, cu_q, cu_k, 3, 3, causal=True, backend=backend),
        leaves((5, 2, 4), (8, 1, 4), (8, 1, 3)),
    )


def samples():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 6)
    cu = torch.tensor([0, 1, 3], dtype=torch.int32)
    yield AttentionArgs(q, k, v, 0.5, causal=True)
    yield AttentionArgs(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.5, window_size=(2, 1))
    yield AttentionArgs(
        q, k, v, 0.5, attn_bias=torch.randn(4, 3, 5), sinks=torch.randn(4), alibi_slopes=torch.rand(2, 4)
    )
    yield AttentionArgs(
        q, k, v, 0.5, attn_mask=torch.rand(2, 1, 3, 5) > 0.3, dropout_p=0.3, rng_state=torch.tensor([5, 7])
    )
    yield AttentionArgs(
        q[:1], k[:1], v[:1], 0.5, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=2, max_seqlen_k=2
    )
    yield AttentionArgs(q, k, v, 0.5, seqlens_k=torch.tensor([5, 2], dtype=torch.int32))
    yield AttentionArgs(q, k, v, 0.5, attn_bias=torch.randn(1, 4, 1, 7), bias_is_relative=True)


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("which", range(len(list(samples()))))
def test_opcheck(which, with_grad):
    args = list(samples())[which]
    flat = list(ops._flat(args, "auto"))
    if with_grad:
        for i, x in enumerate(flat):
            if isinstance(x, torch.Tensor) and ops._TENSORS[i] in ops._DIFFERENTIABLE:
                flat[i] = x.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastattn.attention.default, tuple(flat))
    out, lse = torch.ops.fastattn.attention(*flat)
    backward = (
        torch.randn_like(out),
        torch.randn_like(lse),
        out.detach(),
        lse.detach(),
        args.attn_bias is not None,
    )
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in flat]
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, (*backward, *plain))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training_step(compiler):
    torch._dynamo.reset()
    projection = torch.nn.Linear(16, 48)
    bias = torch.zeros(2, 7, 7, requires_grad=True)
    x = torch.randn(3, 7, 16)

    def step(x, bias):
        q, k, v = projection(x).view(3, 7, 3, 2, 8).unbind(2)
        return attention(q, k, v, causal=True, attn_bias=bias, softcap=5.0).square().sum()

    def gradients(fn):
        projection.zero_grad()
        bias.grad = None
        loss = fn(x, bias)
        loss.backward()
        return loss, projection.weight.grad.clone(), bias.grad.clone()

    expected = gradients(step)
    found = gradients(torch.compile(step, fullgraph=True, backend=compiler))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        q = torch.randn(1, 9, 2, 8)
        compiled = torch.compile(
            lambda q: attention(q, q, q, causal=True), fullgraph=True, backend=compiler, dynamic=True
        )
        for length in (9, 5):
            assert torch.equal(
                compiled(q[:, :length]), attention(q[:, :length], q[:, :length], q[:, :length], causal=True)
            )


def test_compiled_with_numbers_that_change():
    """From the second value on torch.compile holds a symbol, no number."""
    torch._dynamo.reset()
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)

    def call(q, k, v, x):
        return attention(q, k, v, softmax_scale=x, softcap=9 * x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for x in (0.3, 0.5, 0.7):
        assert torch.equal(compiled(q, k, v, x), call(q, k, v, x))


def test_compiled_decode_step():
    torch._dynamo.reset()
    q, new = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8)
    caches = [torch.randn(2, 6, 2, 8) for _ in range(2)]
    lengths = torch.tensor([2, 4], dtype=torch.int32)
    angle = torch.rand(6, 4)

    def step(q, new, k_cache, v_cache, lengths):
        return attention_with_kvcache(
            q, k_cache, v_cache, new, new, cache_seqlens=lengths, rotary_cos=angle.cos(), rotary_sin=angle.sin(),
            causal=True,
        )  # fmt: skip

    with torch.no_grad():
        expected_caches = [x.clone() for x in caches]
        expected = step(q, new, *expected_caches, lengths)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(q, new, *caches, lengths)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected_caches))


@pytest.mark.parametrize("mapped", ["q", "k", "v", "bias", "qkv", "q bias", "qkv bias mask slopes", "sinks"])
def test_vmap_is_a_loop(mapped):
    n, mapped = 3, mapped.split() if mapped != "qkv" else ["q", "k", "v"]
    mapped = [name for group in mapped for name in (["q", "k", "v"] if group == "qkv" else [group])]
    shapes = {"q": (2, 5, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8), "bias": (4, 5, 6), "mask": (2, 1, 5, 6),
              "slopes": (4,), "sinks": (4,)}  # fmt: skip
    x = {name: torch.randn(*((n,) if name in mapped else ()), *shape) for name, shape in shapes.items()}
    x["mask"] = x["mask"] > -0.5
    names = list(shapes)

    def call(*values):
        y = dict(zip(names, values))
        return attention(
            y["q"], y["k"], y["v"], attn_bias=y["bias"], attn_mask=y["mask"], alibi_slopes=y["slopes"],
            sinks=y["sinks"], causal=True, return_lse=True,
        )  # fmt: skip

    dims = tuple(0 if name in mapped else None for name in names)
    out, lse = torch.vmap(call, dims)(*x.values())
    for i in range(n):
        one = call(*(x[name][i] if name in mapped else x[name] for name in names))
        assert torch.equal(out[i], one[0])
        assert torch.equal(lse[i], one[1])


def test_vmap_and_gradients_mix():
    q, k, v = torch.randn(3, 1, 4, 2, 8), torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    loss = lambda q, k, v: attention(q, k, v, causal=True).square().sum()  # noqa: E731
    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), (0, None, None))(q, k, v)
    for i in range(3):
        one = torch.func.grad(loss, argnums=(0, 1))(q[i], k, v)
        torch.testing.assert_close(per_sample[0][i], one[0])
        torch.testing.assert_close(per_sample[1][i], one[1])
    total = lambda q: torch.vmap(loss, (0, None, None))(q, k, v).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(total)(q), per_sample[0])
    nested = torch.vmap(
        torch.vmap(functools.partial(attention, causal=True), (0, None, None)), (0, None, None)
    )
    assert torch.equal(
        nested(q[None], k, v)[0],
        torch.vmap(functools.partial(attention, causal=True), (0, None, None))(q, k, v),
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_repeats_the_same_dropout(reentrant):
    q, k, v = leaves((1, 40, 2, 8), (1, 40, 2, 8), (1, 40, 2, 8), dtype=torch.float32)

    def gradients(wrap):
        torch.manual_seed(11)
        call = lambda q, k, v: attention(q, k, v, dropout_p=0.5)  # noqa: E731
        out = checkpoint(call, q, k, v, use_reentrant=reentrant) if wrap else call(q, k, v)
        return torch.autograd.grad(out.square().sum(), (q, k, v)) if not reentrant else backward(out)

    def backward(out):
        for x in (q, k, v):
            x.grad = None
        out.square().sum().backward()
        return [x.grad.clone() for x in (q, k, v)]

    for a, b in zip(gradients(True), gradients(False)):
        assert torch.equal(a, b)


def test_autocast():
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, q.bfloat16(), q)
        assert out.dtype == torch.bfloat16
        assert attention(q.double(), q.double(), q.double()).dtype == torch.float64
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert attention(q, q, q).dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    assert attention(q, q, q).dtype == torch.float32


def test_what_is_not_plain_takes_the_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q = mode.from_tensor(torch.randn(2, 3, 4, 8))
        out, lse = attention(q, q, q, causal=True, return_lse=True)
    assert type(out).__name__ == "FakeTensor"
    assert out.shape == (2, 3, 4, 8)
    assert lse.shape == (2, 4, 3)
