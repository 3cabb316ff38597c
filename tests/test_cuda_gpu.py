"""What only a GPU can show of the CUDA kernels: the public face on CUDA tensors, repetition, graphs."""

from __future__ import annotations

import pytest
import torch
from nested import map_tensors
from sampling_cases import Case, sampling_args
from test_cuda_attention import plain_args, tensors

import fastattn
from fastattn.backends import cuda

if cuda.unavailable():
    pytest.skip(f"needs a GPU: {cuda.unavailable()}", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_the_public_face(dtype, headdim):
    q, k, v = (x.cuda() for x in tensors(dtype, 2, 1000, 1300, 8, 2, headdim))
    found = fastattn.attention(q, k, v, causal=True, backend="cuda")
    expected = fastattn.attention(*(x.cpu() for x in (q, k, v)), causal=True)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=3e-2 if dtype == torch.bfloat16 else 4e-3)
    assert torch.equal(fastattn.attention(q, k, v, causal=True), found)  # "auto" takes it


@pytest.mark.parametrize("rows", [1000, 3])
def test_250_runs_are_equal_to_the_bit(rows):
    q, k, v = (x.cuda() for x in tensors(torch.float16, 4, rows, 5000, 8, 2, 128))
    args = plain_args(q, k, v, causal=True)
    out, lse = cuda.attention(args)
    for _ in range(250):
        again = cuda.attention(args)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)


def test_250_gradients_are_equal_to_the_bit():
    q, k, v = (x.cuda().requires_grad_() for x in tensors(torch.float16, 2, 700, 900, 8, 2, 64))
    dout = torch.randn(2, 700, 8, 64, dtype=torch.float16, device="cuda")
    out = fastattn.attention(q, k, v, causal=True, backend="cuda")
    expected = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for _ in range(250):
        again = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again, expected))


def test_a_decode_step_in_a_graph():
    """Lengths live on the GPU: one captured step serves as they grow."""
    q, k, v = (x.cuda() for x in tensors(torch.float16, 2, 1, 2000, 8, 2, 64))
    lengths = torch.tensor([700, 5], dtype=torch.int32, device="cuda")
    args = plain_args(q, k, v, seqlens_k=lengths)
    cuda.attention(args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = cuda.attention(args)
    for _ in range(3):
        lengths += 600
        graph.replay()
        expected = cuda.attention(args)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


def test_a_sampling_step_in_a_graph():
    """Logits, edits and positions live on the GPU: one captured step serves as they change."""
    case = Case(seed=1, vocab=40000, batch=2)
    ours, _ = case.edits("pba", "sparse")
    positions = torch.zeros(2, dtype=torch.int64)
    args = sampling_args(case.logits, **ours, top_p=0.9, positions=positions, logprobs=5)
    moved = map_tensors(args, torch.Tensor.cuda)
    cuda.sample(moved)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logprobs = cuda.sample(moved)
    for _ in range(3):
        moved.positions.add_(1)
        moved.logits.add_(torch.randn(2, 40000, device="cuda"))
        graph.replay()
        expected = cuda.sample(moved)
        assert torch.equal(tokens, expected[0])
        assert all(map(torch.equal, logprobs, expected[1]))


def test_sampling_by_the_public_face():
    case = Case(seed=2, vocab=5000)
    ours, _ = case.edits("pba", "sparse")
    expected = fastattn.sample(case.logits, **ours, seeds=3, top_k=50, return_logprobs=4)
    edits = map_tensors(ours, torch.Tensor.cuda)
    found = fastattn.sample(case.logits.cuda(), **edits, seeds=3, top_k=50, return_logprobs=4, backend="cuda")
    assert torch.equal(found.tokens.cpu(), expected.tokens)
    assert torch.equal(found.top_ids.cpu(), expected.top_ids)
    torch.testing.assert_close(found.top_logprobs.cpu(), expected.top_logprobs, rtol=1e-6, atol=2e-6)


def test_another_stream():
    q, k, v = (x.cuda() for x in tensors(torch.float16, 2, 300, 300, 4, 2, 64))
    expected, _ = cuda.attention(plain_args(q, k, v))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out, _ = cuda.attention(plain_args(q, k, v))
    stream.synchronize()
    assert torch.equal(out, expected)
