"""A quick look at every part of the CUDA kernels: what the mutants are held to, at the headdims of their builds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import torch
from oracles import attention64
from sampling_cases import Case, sampling_args
from simt.emulator import Emulator
from torch import Tensor

from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs
from fastattn.backends import cpu, reference

HALF = torch.float16


def _tensors(
    dtype: torch.dtype, batch: int, seqlen_q: int, seqlen_k: int, nheads: int, nheads_k: int, headdim: int
) -> list[Tensor]:
    shapes = ((batch, seqlen_q, nheads, headdim), *2 * ((batch, seqlen_k, nheads_k, headdim),))
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def _args(q: Tensor, k: Tensor, v: Tensor, **call: object) -> AttentionArgs:
    return AttentionArgs(q=q, k=k, v=v, softmax_scale=q.shape[3] ** -0.5, return_lse=True, **call)  # type: ignore[arg-type]


def _calls(dtype: torch.dtype) -> Iterator[tuple[AttentionArgs, Tensor, Tensor]]:
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
        q, k, v = _tensors(dtype, 1, seqlen_q, seqlen_k, nheads, 1, 64)
        yield _args(q, k, v, **call), *attention64(q, k, v, **call)
    q, k, v = _tensors(dtype, 1, 70, 100, 1, 1, 40)
    yield _args(q, k, v), *attention64(q, k, v)
    q, k, v = _tensors(dtype, 1, 20, 300, 2, 2, 64)
    pages = {name: x[0, 7:295].view(18, 16, 2, 64).flip(0) for name, x in (("k", k), ("v", v))}
    table, begin, end = (
        torch.arange(17, -1, -1, dtype=torch.int32)[None],
        torch.tensor([5]),
        torch.tensor([288]),
    )
    paged = {"block_table": table, "k_leftpad": begin.int(), "seqlens_k": end.int(), "causal": True}
    yield _args(q, pages["k"], pages["v"], **paged), *attention64(q, k[:, 12:295], v[:, 12:295], causal=True)
    packed, lengths = torch.tensor([0, 30, 130], dtype=torch.int32), ((0, 30), (30, 130))
    q, k, v = _tensors(dtype, 1, 130, 130, 2, 1, 64)
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
    q, k, v = _tensors(dtype, 1, 40, 64, 2, 1, 64)
    dropped = _args(q, k, v, dropout_p=0.5, rng_state=torch.tensor([5, 6]))
    out, lse = reference.attention(dropped)
    assert lse is not None
    yield dropped, out.double(), lse.double()


def forward_complaints(emulator: Emulator) -> set[str]:
    """The names of the checks that fail: "values", "bank conflicts", "schedule", or a fault's."""
    return _attention_complaints(emulator, HALF)


def hopper_complaints(emulator: Emulator) -> set[str]:
    """As above, on a GPU of compute capability 9.0, where the Hopper kernel takes most of the calls."""
    with emulator.compute_capability(90):
        return _attention_complaints(emulator, HALF, _long_calls())


def _long_calls() -> Iterator[tuple[AttentionArgs, Tensor, Tensor]]:
    """Calls of at least 3 tiles of 128 keys, which use each stage twice."""
    q, k, v = _tensors(HALF, 1, 140, 600, 1, 1, 64)
    for call in ({}, {"window_size": (250, 40)}, {"softcap": 3.0, "causal": True}):
        yield _args(q, k, v, **call), *attention64(q, k, v, **call)
    pages = {name: x[0].view(30, 20, 1, 64).flip(0) for name, x in (("k", k), ("v", v))}
    table, end = torch.arange(29, -1, -1, dtype=torch.int32)[None], torch.tensor([590], dtype=torch.int32)
    paged = _args(q, pages["k"], pages["v"], block_table=table, seqlens_k=end)
    yield paged, *attention64(q, k[:, :590], v[:, :590])


def float_complaints(emulator: Emulator) -> set[str]:
    """As above, in float32."""
    return _attention_complaints(emulator, torch.float32)


def _attention_complaints(
    emulator: Emulator, dtype: torch.dtype, more: Iterable[tuple[AttentionArgs, Tensor, Tensor]] = ()
) -> set[str]:
    torch.manual_seed(0)
    seen: set[str] = set()
    tolerance = 4e-3 if dtype == HALF else 2e-5
    calls = _calls(dtype)
    if dtype != HALF:  # causal, a window, split keys, headdim 40; all else is the 16-bit kernel's
        calls = (call for i, call in enumerate(calls) if i in (0, 1, 5, 7))
    for args, truth, lse64 in chain(calls, more):
        results = []
        for seed, landing in ((0, "at issue"), (1, "at wait"), (2, "between"), (3, "at wait")):
            out, lse = emulator.attention(args, seed, landing)
            assert lse is not None
            results.append((out, lse))
            seen |= set(emulator.faults())
            if emulator.bank_factor() > 1:
                seen.add("bank conflicts")
            if not _close(out, truth, tolerance) or not _close(lse, lse64, min(tolerance, 1e-3)):
                seen.add("values")
        first, *others = results
        if not all(torch.equal(a, b) for other in others for a, b in zip(first, other)):
            seen.add("schedule")
    return seen


def _appends() -> Iterator[dict[str, Tensor | bool]]:
    """Calls without their caches of 2 rows of 53 tokens, or 8 pages of 16. 3 queries of 3 heads, 2 new tokens: a warp is left over."""
    angle = torch.rand(60, 32) * 6
    lengths = {"cache_seqlens": torch.tensor([50, 17], dtype=torch.int32)}
    whole = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    part = {name: x[:, :11].contiguous() for name, x in whole.items()}
    pages = torch.tensor([[3, 0, 6, 1], [5, 2, 7, 4]], dtype=torch.int32)
    yield (
        lengths | whole | {"rotary_interleaved": False, "k_leftpad": torch.tensor([5, 0], dtype=torch.int32)}
    )
    yield (
        lengths
        | part
        | {"rotary_interleaved": True, "cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32)}
    )
    paged = {"block_table": pages, "cache_seqlens": torch.tensor([47, 16], dtype=torch.int32)}
    yield part | paged | {"rotary_interleaved": False, "rotary_per_row": False}
    yield lengths


def append_complaints(emulator: Emulator) -> set[str]:
    """As above."""
    torch.manual_seed(0)
    seen: set[str] = set()
    for call in _appends():
        room = (8, 16) if "block_table" in call else (2, 53)
        q, k, v = (torch.randn(2, *shape).to(HALF) for shape in ((3, 3, 64), (2, 1, 64), (2, 1, 40)))
        caches = [torch.randn(*room, 1, d).to(HALF) for d in (64, 40)]
        found, wanted = (
            KVAppendArgs(q=q, k=k, v=v, k_cache=caches[0].clone(), v_cache=caches[1].clone(), **call)  # type: ignore[arg-type]
            for _ in range(2)
        )
        turned, lengths = emulator.append_kv(found)
        expected, wanted_lengths = reference.append_kv(wanted)
        seen |= set(emulator.faults())
        for x, y in ((turned, expected), (found.k_cache, wanted.k_cache), (found.v_cache, wanted.v_cache)):
            if not _close(x, y.double(), 4e-3):
                seen.add("values")
        assert torch.equal(lengths, wanted_lengths)
    return seen


def _draws() -> Iterator[SamplingArgs]:
    logits = torch.randn(3, 700) * 2
    logits[1, ::3] = -math.inf
    logits[2] = (2 * logits[2]).round() / 2
    seeds = {"seeds": torch.tensor([5, -7, 1 << 40]), "positions": torch.tensor([0, 1 << 33, 3])}
    for call in (
        {"temperature": 0.7}, {"temperature": 0.0}, {"temperature": math.inf}, {"top_k": 7}, {"top_p": 0.8},
        {"top_p": 0.9999, "temperature": 3.0}, {"min_p": 0.3, "temperature": 4.0},
        {"top_k": torch.tensor([20, 400, 150]), "top_p": 0.9, "min_p": 0.01},
    ):  # fmt: skip
        yield sampling_args(logits, **seeds, **call)
    steps = torch.arange(1, 25)
    ties = torch.tensor([1.0, 0.0, 2.0, -math.inf, 1.0, -0.0, 2.0, 1.0]).repeat(5)[None].expand(24, 40)
    yield sampling_args(ties, top_k=steps, temperature=4.0, seeds=steps)
    yield sampling_args(ties, top_p=(steps / 25.0).double(), temperature=4.0, seeds=steps)
    yield sampling_args(torch.tensor([[3.4e38, -3.4e38, 1e-45, 0.0]]), temperature=1e30, top_p=0.9)
    yield sampling_args(ties, min_p=1.0, temperature=4.0, seeds=steps)
    yield sampling_args(torch.tensor([[100.0, 65.0, 1.0]]), top_p=1.0 - 1e-13)  # 65 weighs nothing
    yield sampling_args(torch.zeros(1, 700), top_k=299, top_p=0.9999)
    wide = torch.randn(2, 9000)  # several blocks a row
    wide[1, 8999] = 5.0
    yield sampling_args(wide.bfloat16()[:, 3:], top_k=60, top_p=0.9, temperature=1.3, seeds=steps[:2])
    yield sampling_args(wide, seeds=steps[1:3], temperature=2.0)


def _edited_draws() -> Iterator[SamplingArgs]:
    """top_k is where penalties move tokens across the cut."""
    for vocab in (203, 4200):  # of one slice, and of two
        case = Case(seed=vocab, vocab=vocab, batch=3, plain=True)
        for edge in (0, 202, vocab - 105, vocab - 1):  # the last tokens of slices
            case.logits[:, edge] = 5.0
            case.allowed[:2, edge] = True
            case.prompts[0].append(edge)
            case.prompt[0, edge] = True
        case.ids[1, :3], case.values[1, :3] = vocab - 1, 2.0
        draw = {"seeds": torch.arange(3), "temperature": 3.0, "top_k": vocab // 20}
        for form in ("dense", "sparse"):
            ours, _ = case.edits("pba", form)
            logits = torch.randn(3, vocab + 4)[:, 2:-2].copy_(case.logits)
            yield sampling_args(logits, **ours, **draw)
        ours, _ = case.edits("p", "sparse")
        ours["token_counts"].select([2, 1, 0])  # the first row has seen nothing
        yield sampling_args(case.logits, **ours, **draw)
        case.ids[0, :30] = (case.prompts[0] * 30)[:30]
        yield sampling_args(case.logits, **case.edits("pb", "sparse")[0], **draw)
    yield sampling_args(
        case.logits,
        repetition_penalty=9.0,
        prompt_mask=torch.from_numpy(case.prompt),
        temperature=3.0,
        top_k=210,
    )


def _logprob_complaints(emulator: Emulator) -> Iterator[str]:
    wide = torch.randn(2, 9000)
    holes = torch.full((2, 600), -math.inf)
    holes[0, ::9], holes[1, 77] = torch.randn(67), 0.5
    for args in (
        sampling_args(wide.bfloat16()[:, 3:], logprobs=5, seeds=torch.arange(2)),
        sampling_args(holes, logprobs=300, temperature=0.0),
        sampling_args(holes, logprobs=600, seeds=3),
    ):
        tokens, found = emulator.sample_with_logprobs(args, seed=1)
        yield from emulator.faults()
        expected, wanted = cpu.sample(args)
        assert found is not None
        assert wanted is not None
        if not torch.equal(tokens, expected):
            yield "tokens"
        if not torch.equal(found[1], wanted[1]):
            yield "best ids"
        if not all(torch.allclose(found[i], wanted[i], rtol=1e-6, atol=2e-6) for i in (0, 2)):
            yield "logprobs"


def _edit_complaints(emulator: Emulator) -> Iterator[str]:
    """Of rows that edits break."""
    logits = torch.randn(5, 600)
    logits[0, 4], logits[1, 4] = math.nan, math.inf
    allowed = torch.ones(5, 600).bool()
    allowed[:2, 4], allowed[2] = False, False
    ids = torch.tensor([[-1], [-1], [-1], [600], [-1]])
    args = sampling_args(logits, allowed=allowed, logit_bias=(ids, torch.ones(5, 1)), logprobs=1)
    tokens, _ = emulator.sample_with_logprobs(args)
    if tokens[:4].tolist() != [-4, -2, -6, -4] or tokens[4] != cpu.sample(sampling_args(logits[4:]))[0][0]:
        yield "errors"
    yield from emulator.faults()


def sampling_complaints(emulator: Emulator) -> set[str]:
    """As above; the truth is the CPU's tokens."""
    torch.manual_seed(0)
    seen: set[str] = set()
    for args in (*_draws(), *_edited_draws()):
        tokens = [emulator.sample(args, seed) for seed in (0, 1)]
        seen |= set(emulator.faults())
        if emulator.bank_factor() > 1:
            seen.add("bank conflicts")
        if not torch.equal(*tokens):
            seen.add("schedule")
        if not torch.equal(tokens[0], cpu.sample(args)[0]):
            seen.add("tokens")
        asked = args._replace(survivors=True)
        if not torch.equal(emulator.survivors(asked, 2), cpu.survivors(asked)):
            seen.add("kept sets")
        seen |= set(emulator.faults())
    broken = torch.randn(4, 600)
    broken[0, 599], broken[1, 300], broken[2] = math.nan, math.inf, -math.inf
    tokens = emulator.sample(sampling_args(broken, top_p=0.5))
    if (
        tokens[:3].tolist() != [-1, -2, -3]
        or tokens[3] != cpu.sample(sampling_args(broken[3:], top_p=0.5))[0]
    ):
        seen.add("errors")
    return seen | set(emulator.faults()) | {*_logprob_complaints(emulator), *_edit_complaints(emulator)}


def _trained(dtype: torch.dtype, wide: int) -> Iterator[tuple[AttentionArgs, AttentionArgs]]:
    """Calls, and the same in float64."""
    packed = torch.tensor([0, 30, 130], dtype=torch.int32)
    for seqlen_q, seqlen_k, nheads, headdim, call in (
        (131, 197, 2, wide, {"causal": True}),
        (201, 201, 1, wide, {"window_size": (45, 20)}),
        (80, 70, 2, wide, {"causal": True}),
        (40, 97, 2, wide, {"softcap": 3.0, "attn_bias": torch.randn(1, 2, 40, 97), "sinks": torch.randn(2)}),
        (70, 64, 2, wide, {"dropout_p": 0.5, "rng_state": torch.tensor([5, 6])}),
        (130, 130, 1, wide, {"cu_seqlens_q": packed, "cu_seqlens_k": packed, "max_seqlen_q": 100, "max_seqlen_k": 100}),
        (70, 70, 1, wide - 24, {}),
    ):  # fmt: skip
        q, k, v = _tensors(dtype, 1, seqlen_q, seqlen_k, nheads, 1, headdim)
        yield _args(q, k, v, **call), _args(q.double(), k.double(), v.double(), **call)


def backward_complaints(emulator: Emulator) -> set[str]:
    """As above; the truth is the CPU's kernels on the same numbers in float64."""
    return _gradient_complaints(emulator, islice(_trained(HALF, 64), 6), 2e-2)


def float_backward_complaints(emulator: Emulator) -> set[str]:
    """As above, in float32, where warps share lines: causal, modified, dropout, padded; all else is the 16-bit kernel's."""
    calls = (call for i, call in enumerate(_trained(torch.float32, 256)) if i in (2, 3, 4, 6))
    return _gradient_complaints(emulator, calls, 1e-4)


def _gradient_complaints(
    emulator: Emulator, calls: Iterable[tuple[AttentionArgs, AttentionArgs]], tolerance: float
) -> set[str]:
    torch.manual_seed(0)
    seen: set[str] = set()
    for args, wide in calls:
        out64, lse64 = cpu.attention(wide)
        assert lse64 is not None
        dtype, dlse = args.q.dtype, torch.randn(lse64.shape)
        dout = torch.randn(args.q.shape).to(dtype)
        truth = cpu.attention_backward(
            wide, out64, lse64, dout.double(), dlse.double(), needs_dbias=args.attn_bias is not None
        )
        wanted = [x for x in truth if x is not None]
        results = []
        for seed, landing in ((0, "at issue"), (1, "at wait"), (2, "between")):
            grads = emulator.attention_backward(
                args, out64.to(dtype), lse64.float(), dout, dlse, seed, landing
            )
            results.append([x for x in grads if x is not None])
            seen |= set(emulator.faults())
            if emulator.bank_factor() > 1:
                seen.add("bank conflicts")
            if not all(_close(a, b.double(), tolerance) for a, b in zip(results[-1], wanted, strict=True)):
                seen.add("values")
        if not all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other)):
            seen.add("schedule")
    return seen


def _close(found: Tensor, truth: Tensor, tolerance: float) -> bool:
    return torch.allclose(found.double(), truth, rtol=tolerance, atol=tolerance)


PROBES = {
    "forward": forward_complaints,
    "products_f32": float_complaints,
    "hopper": hopper_complaints,
    "append": append_complaints,
    "sampling": sampling_complaints,
    "backward": backward_complaints,
    "backward_f32": float_backward_complaints,
}
