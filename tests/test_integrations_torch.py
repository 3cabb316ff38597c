"""PyTorch switched to our kernels and back: who calls, in which mode, forward and backward, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn.integrations.torch as switch
from fastattn.nn import MultiheadAttention


@pytest.fixture(autouse=True)
def off_afterwards():
    torch._dynamo.reset()
    yield
    switch.disable()


@pytest.fixture
def calls(monkeypatch):
    """One entry for every call that reaches our kernels, by the function."""
    found = []

    def counted(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            found.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(switch, "scaled_dot_product_attention")
    counted(MultiheadAttention, "forward")
    return found


def call(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


def qkv(requires_grad=False, headdim_v=8):
    shapes = ((2, 4, 9, 8), (2, 4, 11, 8), (2, 4, 11, headdim_v))
    return [torch.randn(*s, requires_grad=requires_grad) for s in shapes]


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.rand(9, 11) > 0.4},
    "bias with a gradient": {"attn_mask": torch.randn(9, 11, requires_grad=True)},
    "headdim_v": {},
}


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("name", CALLS)
def test_eager(name, mode, calls):
    inputs = qkv(mode == "grad", headdim_v=6 if name == "headdim_v" else 8)
    leaves = [x for x in (*inputs, CALLS[name].get("attn_mask")) if x is not None and x.requires_grad]

    def run():
        out = call(*inputs, **CALLS[name])
        return [out, *(torch.autograd.grad(out.square().sum(), leaves) if mode == "grad" else ())]

    with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
        expected = run()
        assert not calls
        with switch.enable():
            for a, b in zip(run(), expected, strict=True):
                torch.testing.assert_close(a, b)
            assert calls == ["scaled_dot_product_attention"]
        run()
    assert len(calls) == 1


def test_dropout_and_its_backward(calls):
    q, k, v = qkv(True)
    with switch.enable():
        torch.manual_seed(1)
        out = call(q, k, v, dropout_p=0.5)
        torch.manual_seed(1)
        assert torch.equal(out, call(q, k, v, dropout_p=0.5))
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert len(calls) == 2


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_before_during_and_after(compiler, calls):
    q, k, v = qkv(True)

    def step(q, k, v):
        return call(q * 2, k, v, is_causal=True).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)

    def outcome(fn):
        loss = fn(q, k, v)
        return [loss, *torch.autograd.grad(loss, (q, k, v))]

    before = outcome(compiled)
    assert not calls
    with switch.enable():
        during, eager = outcome(compiled), outcome(step)
        assert len(calls) >= 2  # tracing, and eager
        with torch.inference_mode():
            torch.testing.assert_close(compiled(q, k, v), before[0])
    count = len(calls)
    after = outcome(compiled)
    assert len(calls) == count
    for a, b, c, d in zip(before, during, eager, after, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)
        assert torch.equal(d, a)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights, training, calls):
    module = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    x = torch.randn(2, 7, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.set_grad_enabled(training):
        expected = module(x, x, x, padding, need_weights=need_weights)
        with switch.enable():
            found = module(x, x, x, padding, need_weights=need_weights)
    assert calls == ["forward"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers(training, calls):
    model = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True).train(training)
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    given = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5), "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding, "tgt_is_causal": True,
    }  # fmt: skip

    def run(model):
        with torch.set_grad_enabled(training):
            out = model(source, target, **given)
            grads = torch.autograd.grad(out.square().sum(), list(model.parameters())) if training else ()
        return [out, *grads]

    expected = run(model)
    assert not calls
    with switch.enable():
        found = run(model)
        assert calls == ["forward"] * 6  # 2 encoder layers, 2 decoder layers with 2 each
        compiled = run(torch.compile(model, backend="aot_eager")) if training else expected
    for a, b, c in zip(found, compiled, expected, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_reversible_nested_and_by_exception():
    forward, fast_path = nn.MultiheadAttention.forward, torch.backends.mha.get_fastpath_enabled()
    tag = torch.compiler.config.cache_key_tag
    assert not switch.is_enabled()
    with switch.enable():
        with switch.enable():
            pass
        assert switch.is_enabled()
        assert nn.MultiheadAttention.forward is not forward
    assert not switch.is_enabled()
    with pytest.raises(ValueError, match="attn_mask"), switch.enable():
        call(*qkv(), attn_mask=torch.ones(3, 3, dtype=torch.bool))
    switch.disable()
    assert not switch.is_enabled()
    assert nn.MultiheadAttention.forward is forward
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.compiler.config.cache_key_tag == tag


@pytest.mark.skipif(not switch._HAS_REGISTRY, reason="this torch has no registry of flash attention")
def test_torch_s_registry(calls):
    from torch.nn import attention as registry

    assert "fastattn" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None
    registry.activate_flash_attention_impl("fastattn")
    assert switch.is_enabled()
    call(*qkv())
    assert len(calls) == 1
    registry.restore_flash_attention_impl()
    assert not switch.is_enabled()

    class Other:
        def remove(self):
            pass

    registry.register_flash_attention_impl("other", register_fn=Other)
    try:
        registry.activate_flash_attention_impl("other")
        with switch.enable():
            assert registry.current_flash_attention_impl() == "fastattn"
        assert registry.current_flash_attention_impl() == "other"
        registry.restore_flash_attention_impl()
    finally:
        del registry._registry._FLASH_ATTENTION_IMPLS["other"]


def test_without_torch_s_registry(calls, monkeypatch):
    monkeypatch.setattr(switch, "_HAS_REGISTRY", False)
    with switch.enable():
        call(*qkv())
    call(*qkv())
    assert len(calls) == 1
    assert not switch.is_enabled()


def test_what_stays_torch_s_own(calls):
    q, k, v = qkv()
    expected = call(q, k, v)
    with switch.enable():
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            torch.testing.assert_close(call(q, k, v), expected)
        torch.func.grad(lambda q: call(q, k, v).sum())(q)
        torch.vmap(call)(*(x[:, None] for x in (q, k, v)))
        assert call(*(x.to("meta") for x in (q, k, v))).shape == expected.shape
    assert not calls


def test_importing_changes_nothing():
    import sys

    from tree import run

    code = (
        "import torch; before = torch.nn.MultiheadAttention.forward; import fastattn.integrations.torch as switch;"
        "print(switch.is_enabled(), torch.nn.MultiheadAttention.forward is before)"
    )
    assert run(sys.executable, "-c", code).split() == ["False", "True"]


def test_a_model_of_transformers(calls):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 50, (2, 9))
    expected = model(ids).logits
    with switch.enable():
        torch.testing.assert_close(model(ids).logits, expected)
    assert calls == ["scaled_dot_product_attention"] * 2
