"""A few calls of every CUDA kernel for a build with ThreadSanitizer, which ends the process at the first race.

Three tiles or more, so that every buffer is used again, and two blocks or more; not many, for each thread of a launch costs
up to 1.6 MB. That values are right is for the other builds to say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sampling_cases import Case, sampling_args
from simt.emulator import Emulator
from torch import Tensor

from fastattn.args import AttentionArgs, KVAppendArgs
from fastattn.backends import reference

FLAGS = ("-O1", "-g1", "-w", "-DFASTATTN_CUDA_TYPES=f16_t", "-DSIMT_THREAD_SANITIZER")
# The module is not instrumented, on purpose (happens_before.h): of its calls to the C library nothing is to be noted.
OPTIONS = "halt_on_error=1:history_size=0:ignore_noninstrumented_modules=1"
SCHEDULES = ((0, "at issue"), (1, "between"), (2, "at wait"))
DROPOUT = {"dropout_p": 0.5, "rng_state": torch.tensor([5, 6])}


def forward_calls(emulator: Emulator) -> None:
    """Plain, modified, with dropout, packed; split decode and its combination; pages."""
    packed = torch.tensor([0, 30, 250], dtype=torch.int32)
    for seqlen_q, seqlen_k, call in (
        (140, 200, {"causal": True}),
        (70, 200, {"softcap": 3.0, "alibi_slopes": torch.rand(2), "window_size": (150, 20)}),
        (70, 200, {"attn_mask": torch.rand(70, 200) > 0.4, "attn_bias": torch.randn(1, 1, 70, 200)}),
        (70, 200, DROPOUT),
        (3, 700, {"sinks": torch.randn(2)}),
        (250, 250, {"cu_seqlens_q": packed, "cu_seqlens_k": packed, "max_seqlen_q": 220, "max_seqlen_k": 220}),
    ):  # fmt: skip
        _attention(emulator, seqlen_q, seqlen_k, 2, **call)
    _paged(emulator, 20)


def hopper_calls(emulator: Emulator) -> None:
    """Plain, modified, pages: five tiles in a ring of two stages."""
    with emulator.compute_capability(90):
        for call in ({}, {"softcap": 3.0, "causal": True}):
            _attention(emulator, 140, 600, 1, **call)
        _paged(emulator, 140)
    assert emulator.wgmmas() > 0


def backward_calls(emulator: Emulator) -> None:
    """Plain, modified, with dropout: three kernels each."""
    bias = torch.randn(1, 1, 100, 140)
    for seqlen_q, seqlen_k, call in (
        (140, 200, {"causal": True}),
        (100, 140, {"softcap": 3.0, "attn_bias": bias, "sinks": torch.randn(1)}),
        (140, 100, DROPOUT),
    ):
        args = _args(*_tensors(seqlen_q, seqlen_k, 1), **call)
        out, lse = reference.attention(args)
        assert lse is not None
        for seed, landing in SCHEDULES[1:]:
            emulator.attention_backward(args, out, lse, torch.randn_like(out), None, seed, landing)


def append_calls(emulator: Emulator) -> None:
    """Rotary embedding and append, to rows and to pages."""
    angle = torch.rand(60, 32) * 6
    lengths = torch.tensor([47, 16], dtype=torch.int32)
    table = torch.tensor([[3, 0, 6, 1], [5, 2, 7, 4]], dtype=torch.int32)
    for room, call in (((2, 53), {}), ((8, 16), {"block_table": table})):
        q, k, v = (torch.randn(2, *shape, 64).half() for shape in ((3, 3), (2, 1), (2, 1)))
        caches = {name: torch.randn(*room, 1, 64).half() for name in ("k_cache", "v_cache")}
        rotary = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "rotary_interleaved": False}
        emulator.append_kv(KVAppendArgs(q=q, k=k, v=v, cache_seqlens=lengths, **caches, **rotary, **call))  # type: ignore[arg-type]


def sampling_calls(emulator: Emulator) -> None:
    """Rows of several blocks: draws, kept sets, edits, log-probabilities."""
    wide, seeds = torch.randn(2, 9000), {"seeds": torch.arange(2)}
    case = Case(seed=1, vocab=4200, batch=2, plain=True)
    for args in (
        sampling_args(wide, top_k=60, top_p=0.9, temperature=1.3, **seeds),
        sampling_args(wide, min_p=0.01, logprobs=300, **seeds),
        sampling_args(case.logits, **case.edits("pba", "sparse")[0], temperature=3.0, top_k=210, **seeds),
        sampling_args(case.logits, **case.edits("pba", "dense")[0], temperature=3.0, top_p=0.5, **seeds),
    ):
        emulator.sample(args)
        emulator.survivors(args._replace(survivors=True, logprobs=None))


def _args(q: Tensor, k: Tensor, v: Tensor, **call: object) -> AttentionArgs:
    return AttentionArgs(q=q, k=k, v=v, softmax_scale=0.125, return_lse=True, **call)  # type: ignore[arg-type]


def _tensors(seqlen_q: int, seqlen_k: int, nheads: int) -> list[Tensor]:
    shapes = ((1, seqlen_q, nheads, 64), *2 * ((1, seqlen_k, 1, 64),))
    return [torch.randn(*shape).half() for shape in shapes]


def _run(emulator: Emulator, args: AttentionArgs) -> None:
    for seed, landing in SCHEDULES:
        emulator.attention(args, seed, landing)


def _attention(emulator: Emulator, seqlen_q: int, seqlen_k: int, nheads: int, **call: object) -> None:
    _run(emulator, _args(*_tensors(seqlen_q, seqlen_k, nheads), **call))


def _paged(emulator: Emulator, seqlen_q: int) -> None:
    q, k, v = _tensors(seqlen_q, 600, 1)
    table = torch.arange(29, -1, -1, dtype=torch.int32)[None]
    _run(emulator, _args(q, k.view(30, 20, 1, 64), v.view(30, 20, 1, 64), block_table=table))


CALLS: dict[str, Callable[[Emulator], None]] = {
    "forward": forward_calls,
    "hopper": hopper_calls,
    "append": append_calls,
    "sampling": sampling_calls,
    "backward": backward_calls,
}
