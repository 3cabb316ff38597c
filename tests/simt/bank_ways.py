"""Bank conflicts by kernel: calls that launch every instantiation there is, small ones, and what each launch counted.

Kernels are known by the names of their functions, as ``benchmarks/gpu_static.py`` knows those of nvcc.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from sampling_cases import Case, sampling_args
from simt.emulator import HEADDIMS, Emulator
from torch import Tensor
from tree import ROOT

from fastattn.args import AttentionArgs

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_static
from gpu_tables import ways_key

TORCH_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
DROPOUT = {"dropout_p": 0.5, "rng_state": torch.tensor([5, 6])}
MODIFIED = {"softcap": 3.0}


def measured(
    emulator: Emulator, dtypes: tuple[str, ...] = tuple(TORCH_DTYPES), headdims: tuple[int, ...] = HEADDIMS
) -> dict[str, int]:
    """The worst bank conflict of every kernel that the static table knows, by ``ways_key``; others must not have any."""
    found: dict[str, int] = {}
    for _ in _launches(emulator, dtypes, headdims):
        for mangled, ways in emulator.bank_ways():
            about = _about(mangled)
            if about is None:
                assert ways == 0, f"{mangled} is in no table, and touches shared memory"
                continue
            key = ways_key(about)
            found[key] = max(found.get(key, 0), ways)
    return found


def _about(mangled: str) -> dict[str, Any] | None:
    if about := gpu_static.sampling_kernel(mangled):
        return about
    about = gpu_static.describe(mangled)
    dtype = re.search(
        r"(?:attention_forward|attention_forward_sm90|_gradients)I(?:NS_)?(f|5f16_t|6bf16_t)", mangled
    )
    return about and dtype and {**about, "dtype": gpu_static.DTYPES[dtype[1]]}


def _launches(emulator: Emulator, dtypes: tuple[str, ...], headdims: tuple[int, ...]) -> Iterator[None]:
    """Stops after every call."""
    torch.manual_seed(0)
    for name in dtypes:
        dtype = TORCH_DTYPES[name]
        for headdim in headdims:
            for capability in (80, 90):
                with emulator.compute_capability(capability):
                    for args in _calls(dtype, headdim):
                        emulator.attention(args)
                        yield
            for args in _gradient_calls(dtype, headdim):
                rows = torch.zeros(1, args.q.shape[2], args.q.shape[1])
                emulator.attention_backward(args, args.q, rows, torch.randn(args.q.shape).to(dtype))
                yield
        for draw in _draws(dtype):
            emulator.sample(draw)
            yield


def _args(dtype: torch.dtype, headdim: int, seqlen_q: int, seqlen_k: int, **call: Any) -> AttentionArgs:
    q, k, v = (torch.randn(1, n, 1, headdim).to(dtype) for n in (seqlen_q, seqlen_k, seqlen_k))
    if "block_table" in call:
        k, v = (x.view(-1, 20, 1, headdim) for x in (k, v))
    return AttentionArgs(q=q, k=k, v=v, softmax_scale=0.125, **call)


def _calls(dtype: torch.dtype, headdim: int) -> Iterator[AttentionArgs]:
    table = {"block_table": torch.arange(7, dtype=torch.int32)[None]}
    for call in ({}, MODIFIED, DROPOUT, table, table | MODIFIED):
        yield _args(dtype, headdim, 140, 140, **call)
    for call in ({}, MODIFIED):
        yield _args(dtype, headdim, 3, 600, **call)


def _gradient_calls(dtype: torch.dtype, headdim: int) -> Iterator[AttentionArgs]:
    for call in ({}, MODIFIED, DROPOUT):
        yield _args(dtype, headdim, 70, 140, causal=True, **call)


def _draws(dtype: torch.dtype) -> Iterator[Any]:
    case = Case(seed=1, vocab=4200, batch=2, plain=True)
    logits: Tensor = case.logits.to(dtype)
    seeds = {"seeds": torch.arange(2), "temperature": 3.0}
    yield sampling_args(logits, top_k=210, top_p=0.9, logprobs=30, **seeds)
    yield sampling_args(logits, min_p=0.01, **seeds)
    yield sampling_args(logits, **case.edits("pba", "sparse")[0], **seeds)
