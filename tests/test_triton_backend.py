"""The Triton backend where there is no GPU: what it says, what it refuses by name, and what torch.compile sees of it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from tree import run

from fastattn import attention, available_backends, ops
from fastattn.args import AttentionArgs, SamplingArgs
from fastattn.backends import resolve, triton

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def gpu(monkeypatch):
    """Fake tensors that say they are a GPU's: tracing launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr(triton, "unavailable", lambda: None)
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32)
    )  # whose compiler tells what is written
    monkeypatch.setattr(driver, "_active", target, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.mark.parametrize(("change", "lacks"), [
    ({"dtype": torch.float64}, "lacks dtype 'float64'"),
    ({"device": "meta"}, "lacks device 'meta'"),
    ({"k": {"dtype": torch.int8}}, "lacks 'kv_dtype'"),
    ({"needs_grad": True, "block_table": {"dtype": torch.int32}}, "lacks 'gradients'"),
])  # fmt: skip
def test_what_it_lacks_is_named(gpu, change, lacks):
    place = {"device": change.get("device", "cuda"), "dtype": change.get("dtype", torch.float16)}
    more = {n: x for n, x in change.items() if n not in place}
    tensors = {n: torch.empty(2, 4, 2, 16, **place) for n in "qkv"}
    tensors |= {n: torch.empty(2, 4, 2, 16, **place | x) for n, x in more.items() if isinstance(x, dict)}
    args = AttentionArgs(**tensors, softmax_scale=1.0, needs_grad=more.get("needs_grad", False))
    assert triton.supports(args) == lacks


def test_it_serves_what_it_says(gpu):
    q = torch.empty(2, 4, 2, 16, device="cuda", dtype=torch.bfloat16)
    assert resolve("auto", AttentionArgs(q, q, q, softmax_scale=1.0, softcap=2.0)) is triton
    for dtype in (torch.float32, torch.float64):
        logits = torch.empty(2, 100, device="cuda", dtype=dtype)
        assert resolve("auto", SamplingArgs(logits, 1.0, 0, 1.0, 0.0, 0, 0)) is triton
    long = torch.empty(1, 1 << 22, device="cuda")
    assert "vocabularies" in triton.supports(SamplingArgs(long, 1.0, 0, 1.0, 0.0, 0, 0))


def kernels_of(function, *inputs):
    graph = make_fx(dispatch_functionalize(function))(*inputs).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert not any(t.startswith("fastattn") for t in targets), targets
    return sum("triton_kernel_wrapper" in t for t in targets)


def test_compile_sees_the_kernels_of_the_forward_pass(gpu):
    q, k, v = (torch.empty(2, n, 4, 64, device="cuda", dtype=torch.float16) for n in (128, 256, 256))
    assert kernels_of(lambda *x: attention(*x, causal=True), q, k, v) == 1
    one = torch.empty(2, 1, 4, 64, device="cuda", dtype=torch.float16)
    assert kernels_of(attention, one, k, v) == 2  # decode and combine


def test_compile_sees_the_kernels_of_the_backward_pass(gpu):
    q, k, v, out, dout = (torch.empty(2, 128, 4, 64, device="cuda", dtype=torch.float16) for _ in range(5))
    lse, dlse = (torch.empty(2, 4, 128, device="cuda") for _ in range(2))

    def backward(q, k, v, out, lse, dout, dlse):  # what autograd's formula calls
        args = AttentionArgs(q=q, k=k, v=v, softmax_scale=0.125, causal=True)
        return torch.ops.fastattn.attention_backward(dout, dlse, out, lse, False, *ops._flat(args, "triton"))

    assert kernels_of(backward, q, k, v, out, lse, dout, dlse) == 3  # delta, dQ, dK and dV


def test_triton_is_imported_at_the_first_call_that_needs_it():
    out = run(
        sys.executable,
        "-c",
        "import fastattn, sys; fastattn.available_backends(); print('triton' in sys.modules)",
    )
    assert out.split() == ["False"]


def test_a_machine_without_gpu_says_so():
    if not torch.cuda.is_available():
        assert "no GPU" in available_backends()["triton"]
        with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: no GPU"):
            attention(*(torch.zeros(1, 2, 1, 8) for _ in range(3)), backend="triton")
