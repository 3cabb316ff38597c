"""fastattn.MultiheadAttention beside torch.nn.MultiheadAttention with the same state_dict."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastattn

CONFIGS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "kdim and vdim": {"kdim": 10, "vdim": 6},
    "one of them": {"kdim": 10, "bias": False, "batch_first": True},
}
BATCH, NHEADS, EMBED, SEQLEN_Q, SEQLEN_K = 3, 4, 16, 5, 7


def pair(dtype=torch.float64, **config):
    theirs = torch.nn.MultiheadAttention(EMBED, NHEADS, dtype=dtype, **config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)
    ours = fastattn.MultiheadAttention(EMBED, NHEADS, dtype=dtype, **config)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


def inputs(module, kind, dtype=torch.float64):
    widths = (EMBED, module.kdim, module.vdim)
    lengths = (SEQLEN_Q, SEQLEN_K, SEQLEN_K)
    lead = (
        (lambda n: (n,))
        if kind == "unbatched"
        else (lambda n: (BATCH, n) if module.batch_first else (n, BATCH))
    )
    x = [torch.randn(*lead(n), w, dtype=dtype, requires_grad=True) for n, w in zip(lengths, widths)]
    if kind == "self":
        return [x[0]] * 3
    return [x[0], x[1], x[1]] if kind == "shared" else x


def masks(kind, seqlen_k, lead=(BATCH,)):
    """key_padding_mask and attn_mask; no row is hidden wholly."""
    padding = torch.rand(*lead, seqlen_k) > 0.7
    padding[..., 0] = False
    square = torch.rand(SEQLEN_Q, seqlen_k) > 0.6
    square[:, 0] = False
    full = torch.rand((lead[0] if lead else 1) * NHEADS, SEQLEN_Q, seqlen_k) > 0.6
    full[..., 0] = False
    as_float = lambda x: torch.zeros(x.shape, dtype=torch.float64).masked_fill(x, -5.0)  # noqa: E731
    return {
        "none": (None, None),
        "padding": (padding, None),
        "square": (None, square),
        "per head": (None, full),
        "both": (padding, full),
        "float": (None, as_float(square).requires_grad_()),
        "float padding": (as_float(padding), as_float(full)),
    }[kind]


def outcome(module, args, padding, mask, **call):
    out, weights = module(*args, key_padding_mask=padding, attn_mask=mask, **call)
    leaves = {id(x): x for x in (*args, mask, *module.parameters()) if x is not None and x.requires_grad}
    loss = out.square().sum() + (
        0 if weights is None else (weights * torch.linspace(0, 1, weights.shape[-1])).sum()
    )
    return out, weights, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)


def assert_same(ours, theirs, args, padding, mask, **call):
    a, b = (outcome(m, args, padding, mask, **call) for m in (ours, theirs))
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] is None) == (b[1] is None)
    if a[1] is not None:
        torch.testing.assert_close(a[1], b[1])
    for x, y in zip(a[2], b[2], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["self", "shared", "cross", "unbatched"])
@pytest.mark.parametrize("config", CONFIGS)
def test_same_as_torch(config, kind, need_weights):
    ours, theirs = pair(**CONFIGS[config])
    if kind in ("self", "shared") and not ours._qkv_same_embed_dim:
        kind = "cross"
    args = inputs(ours, kind)
    lead = () if kind == "unbatched" else (BATCH,)
    for name in ("none", "padding", "square", "per head", "both", "float", "float padding"):
        padding, mask = masks(name, SEQLEN_Q if kind == "self" else SEQLEN_K, lead)
        for average in (True, False) if need_weights else (True,):
            assert_same(
                ours, theirs, args, padding, mask, need_weights=need_weights, average_attn_weights=average
            )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("seqlens", [(5, 5), (5, 7), (7, 5)])
def test_the_causal_hint(seqlens, need_weights):
    ours, theirs = pair(batch_first=True)
    q, kv = (torch.randn(BATCH, n, EMBED, dtype=torch.float64, requires_grad=True) for n in seqlens)
    mask = torch.ones(seqlens, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, seqlens[1], dtype=torch.bool)
    padding[1, -2:] = True
    for p in (None, padding):
        assert_same(ours, theirs, (q, kv, kv), p, mask, need_weights=need_weights, is_causal=True)
    extra, plain = pair(batch_first=True, add_zero_attn=True)
    out, _ = extra(q, kv, kv, attn_mask=mask, is_causal=True, need_weights=need_weights)
    torch.testing.assert_close(out, plain(q, kv, kv, attn_mask=mask)[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_never_nan(need_weights):
    """torch's module gives NaN here with weights (PyTorch issue 41508)."""
    ours, _ = pair(batch_first=True)
    x = torch.randn(BATCH, SEQLEN_Q, EMBED, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(BATCH, SEQLEN_Q, dtype=torch.bool)
    padding[1] = True
    hidden = torch.zeros(SEQLEN_Q, SEQLEN_Q, dtype=torch.float64).index_fill(0, torch.tensor([2]), -torch.inf)
    for p, mask in ((padding, None), (None, hidden)):
        out, weights, grads = outcome(ours, [x] * 3, p, mask, need_weights=need_weights)
        empty = (1,) if p is not None else (slice(None), 2)
        assert torch.equal(out[empty], ours.out_proj.bias.expand_as(out[empty]))
        assert weights is None or not weights[empty].any()
        assert all(g.isfinite().all() for g in (out, *grads))


def test_weights_change_nothing_and_show_dropout():
    ours, _ = pair(dropout=0.4, batch_first=True)
    x = torch.randn(BATCH, 40, EMBED, dtype=torch.float64)
    found = []
    for need_weights in (True, False):
        torch.manual_seed(3)
        found.append(ours(x, x, x, need_weights=need_weights, average_attn_weights=False))
    (out, weights), (same, none) = found
    assert none is None
    assert torch.equal(out, same)
    assert (weights == 0).double().mean() == pytest.approx(0.4, abs=0.03)
    assert weights.detach().sum(-1).mean() == pytest.approx(1, abs=0.05)
    value = x @ ours.in_proj_weight[-EMBED:].T + ours.in_proj_bias[-EMBED:]
    mixed = weights @ value.unflatten(-1, (NHEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(ours.out_proj(mixed.transpose(1, 2).flatten(2)), out)
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x, need_weights=False)[0])


def test_inside_an_encoder_layer_and_compiled():
    layer = torch.nn.TransformerEncoderLayer(EMBED, NHEADS, 32, dropout=0.0, batch_first=True)
    x = torch.randn(BATCH, SEQLEN_Q, EMBED)
    expected = layer(x)
    ours = fastattn.MultiheadAttention(EMBED, NHEADS, batch_first=True)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    torch.testing.assert_close(layer(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    both = torch.compile(lambda x: ours(x, x, x), fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(both, ours(x, x, x)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, theirs = pair(dtype=dtype, batch_first=True)
    x = torch.randn(BATCH, SEQLEN_Q, EMBED, dtype=dtype)
    exact = pair(batch_first=True)[0]
    exact.load_state_dict(ours.state_dict())
    for i, truth in enumerate(exact(*[x.double()] * 3)):
        error, allowed = ((m(x, x, x)[i].double() - truth).abs().max().item() for m in (ours, theirs))
        assert error <= 2 * allowed
        assert ours(x, x, x)[i].dtype == dtype


R = torch.randn
WRONG = {
    "query: expected 2 or 3 dimensions": (R(1, 2, 3, EMBED), R(3, 2, EMBED), R(3, 2, EMBED), {}),
    "key: expected 3 dimensions, the last of 16, got (3, 2, 8)": (R(3, 2, EMBED), R(3, 2, 8), R(3, 2, EMBED), {}),
    "value: expected (*(3, 2), 16), got (4, 2, 16)": (R(3, 2, EMBED), R(3, 2, EMBED), R(4, 2, EMBED), {}),
    "key: expected batch=2, got (3, 1, 16)": (R(3, 2, EMBED), R(3, 1, EMBED), R(3, 1, EMBED), {}),
    "key_padding_mask: expected (2, 3), got (3, 2)": (*[R(3, 2, EMBED)] * 3, {"key_padding_mask": R(3, 2)}),
    "attn_mask: expected (3, 3) or (8, 3, 3), got (2, 3, 3)": (*[R(3, 2, EMBED)] * 3, {"attn_mask": R(2, 3, 3)}),
    "attn_mask: expected a bool or float dtype, got torch.int64": (*[R(3, 2, EMBED)] * 3, {"attn_mask": torch.ones(3, 3, dtype=torch.int64)}),
    "is_causal: expected False without attn_mask": (*[R(3, 2, EMBED)] * 3, {"is_causal": True}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    *args, call = WRONG[message]
    with pytest.raises((ValueError, TypeError)) as error:
        fastattn.MultiheadAttention(EMBED, NHEADS)(*args, **call)
    assert message in str(error.value)


def test_the_same_arguments_and_parameters():
    for bias, first in itertools.product((True, False), repeat=2):
        ours, theirs = pair(torch.float32, bias=bias, batch_first=first, kdim=3)
        assert {n: p.shape for n, p in ours.named_parameters()} == {
            n: p.shape for n, p in theirs.named_parameters()
        }
    with pytest.raises(AssertionError, match="divisible"):
        fastattn.MultiheadAttention(10, 3)
