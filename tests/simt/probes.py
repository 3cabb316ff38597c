"""A quick look at every part of the CUDA kernels: what the mutants are held to. Headdim 64 at most."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from oracles import attention64
from simt.emulator import Emulator
from torch import Tensor

from fastattn.args import AttentionArgs, KVAppendArgs
from fastattn.backends import cpu, reference

HALF = torch.float16


def _tensors(
    batch: int, seqlen_q: int, seqlen_k: int, nheads: int, nheads_k: int, headdim: int
) -> list[Tensor]:
    shapes = ((batch, seqlen_q, nheads, headdim), *2 * ((batch, seqlen_k, nheads_k, headdim),))
    return [torch.randn(*shape).to(HALF) for shape in shapes]


def _args(q: Tensor, k: Tensor, v: Tensor, **call: object) -> AttentionArgs:
    return AttentionArgs(q=q, k=k, v=v, softmax_scale=q.shape[3] ** -0.5, return_lse=True, **call)  # type: ignore[arg-type]


def _calls() -> Iterator[tuple[AttentionArgs, Tensor, Tensor]]:
    """Calls with the float64 truth, out and lse."""
    for seqlen_q, seqlen_k, nheads, call in (
        (197, 197, 2, {"causal": True}),
        (131, 200, 2, {"window_size": (70, 20)}),
        (200, 70, 2, {"causal": True}),
        (40, 160, 2, {"softcap": 3.0, "alibi_slopes": torch.rand(2)}),
        (40, 97, 2, {"attn_bias": torch.randn(1, 2, 40, 97), "attn_mask": torch.rand(40, 97) > 0.4, "window_size": (-1, 70)}),
        (3, 1100, 4, {"sinks": torch.randn(4) + 5, "causal": True}),
        (70, 64, 2, {"sinks": torch.randn(2)}),
    ):  # fmt: skip
        q, k, v = _tensors(1, seqlen_q, seqlen_k, nheads, 1, 64)
        yield _args(q, k, v, **call), *attention64(q, k, v, **call)
    q, k, v = _tensors(1, 70, 100, 1, 1, 40)
    yield _args(q, k, v), *attention64(q, k, v)
    q, k, v = _tensors(1, 20, 300, 2, 2, 64)
    pages = {name: x[0, 7:295].view(18, 16, 2, 64).flip(0) for name, x in (("k", k), ("v", v))}
    table, begin, end = (
        torch.arange(17, -1, -1, dtype=torch.int32)[None],
        torch.tensor([5]),
        torch.tensor([288]),
    )
    paged = {"block_table": table, "k_leftpad": begin.int(), "seqlens_k": end.int(), "causal": True}
    yield _args(q, pages["k"], pages["v"], **paged), *attention64(q, k[:, 12:295], v[:, 12:295], causal=True)
    packed, lengths = torch.tensor([0, 30, 130], dtype=torch.int32), ((0, 30), (30, 130))
    q, k, v = _tensors(1, 130, 130, 2, 1, 64)
    parts = [attention64(*(x[:, a:b] for x in (q, k, v)), causal=True) for a, b in lengths]
    call = {
        "cu_seqlens_q": packed,
        "cu_seqlens_k": packed,
        "max_seqlen_q": 100,
        "max_seqlen_k": 100,
        "causal": True,
    }
    yield (
        _args(q, k, v, **call),
        torch.cat([out for out, _ in parts], 1),
        torch.cat([lse[0] for _, lse in parts], 1),
    )
    q, k, v = _tensors(1, 40, 64, 2, 1, 64)
    dropped = _args(q, k, v, dropout_p=0.5, rng_state=torch.tensor([5, 6]))
    out, lse = reference.attention(dropped)
    assert lse is not None
    yield dropped, out.double(), lse.double()


def forward_complaints(emulator: Emulator) -> set[str]:
    """The names of the checks that fail: "values", "bank conflicts", "schedule", or a fault's."""
    torch.manual_seed(0)
    seen: set[str] = set()
    for args, truth, lse64 in _calls():
        results = []
        for seed, landing in ((0, "at issue"), (1, "at wait"), (2, "between"), (3, "at wait")):
            out, lse = emulator.attention(args, seed, landing)
            assert lse is not None
            results.append((out, lse))
            seen |= set(emulator.faults())
            if emulator.bank_factor() > 1:
                seen.add("bank conflicts")
            if not _close(out, truth, 4e-3) or not _close(lse, lse64, 1e-3):
                seen.add("values")
        first, *others = results
        if not all(torch.equal(a, b) for other in others for a, b in zip(first, other)):
            seen.add("schedule")
    return seen


def append_complaints(emulator: Emulator) -> set[str]:
    """As above."""
    torch.manual_seed(0)
    q, k, v = _tensors(1, 3, 3, 3, 1, 64)  # 15 rows: one warp has none
    angle = torch.rand(60, 32) * 6
    call = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "rotary_interleaved": False}
    call |= {"cache_seqlens": torch.tensor([50]).int(), "k_leftpad": torch.tensor([5]).int()}
    caches = [torch.randn(1, 53, 1, 64).to(HALF) for _ in range(4)]
    caches[2:] = [x.clone() for x in caches[:2]]
    found, wanted = (
        KVAppendArgs(q=q, k=k, v=v, k_cache=caches[i], v_cache=caches[i + 1], **call)  # type: ignore[arg-type]
        for i in (0, 2)
    )
    turned, _ = emulator.append_kv(found)
    expected, _ = reference.append_kv(wanted)
    seen = set(emulator.faults())
    for x, y in ((turned, expected), (found.k_cache, wanted.k_cache), (found.v_cache, wanted.v_cache)):
        if not _close(x, y.double(), 4e-3):
            seen.add("values")
    return seen


def backward_complaints(emulator: Emulator) -> set[str]:
    """As above; the truth is the CPU's kernels on the same numbers in float64."""
    torch.manual_seed(0)
    seen: set[str] = set()
    dropout = {"dropout_p": 0.5, "rng_state": torch.tensor([5, 6])}
    packed = torch.tensor([0, 30, 130], dtype=torch.int32)
    for seqlen_q, seqlen_k, nheads, call in (
        (131, 197, 2, {"causal": True}),
        (130, 201, 1, {"window_size": (70, 20)}),
        (80, 70, 2, {"causal": True}),
        (40, 97, 2, {"softcap": 3.0, "attn_bias": torch.randn(1, 2, 40, 97), "sinks": torch.randn(2)}),
        (70, 64, 2, dropout),
        (130, 130, 1, {"cu_seqlens_q": packed, "cu_seqlens_k": packed, "max_seqlen_q": 100, "max_seqlen_k": 100}),
    ):  # fmt: skip
        q, k, v = _tensors(1, seqlen_q, seqlen_k, nheads, 1, 64)
        wide = _args(q.double(), k.double(), v.double(), **call)
        out64, lse64 = cpu.attention(wide)
        assert lse64 is not None
        dout, dlse = torch.randn(q.shape).to(HALF), torch.randn(lse64.shape)
        truth = cpu.attention_backward(
            wide, out64, lse64, dout.double(), dlse.double(), needs_dbias="attn_bias" in call
        )
        results = []
        for seed, landing in ((0, "at issue"), (1, "at wait"), (2, "between")):
            grads = emulator.attention_backward(
                _args(q, k, v, **call), out64.to(HALF), lse64.float(), dout, dlse, seed, landing
            )
            results.append([x for x in grads if x is not None])
            seen |= set(emulator.faults())
            if emulator.bank_factor() > 1:
                seen.add("bank conflicts")
            wanted = [x for x in truth if x is not None]
            if not all(_close(a, b.double(), 2e-2) for a, b in zip(results[-1], wanted, strict=True)):
                seen.add("values")
        if not all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other)):
            seen.add("schedule")
    return seen


def _close(found: Tensor, truth: Tensor, tolerance: float) -> bool:
    return torch.allclose(found.double(), truth, rtol=tolerance, atol=tolerance)


PROBES = {"forward": forward_complaints, "append": append_complaints, "backward": backward_complaints}
