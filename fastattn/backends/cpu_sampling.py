"""Sampling on the C++ kernels: addresses, strides and numbers of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.calls import DTYPES, FLOAT_DTYPES, number_or_address, sampling_call

try:
    from fastattn import _C
except ImportError:  # cpu.py says so
    _C = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from fastattn.args import SamplingArgs

_EDITED = " after penalties, logit_bias and allowed"
_PROBLEMS = {
    1: "has NaN",
    2: "has +inf",
    3: "has no finite logit",
    4: "has NaN" + _EDITED,
    5: "has +inf" + _EDITED,
    6: "has no finite logit" + _EDITED,
}  # csrc/params.h, SamplingError
_BAD_BIAS_ID = 7


def sample(args: SamplingArgs) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """One token per row, (batch,) int64; and log-probabilities (batch,), the best ids (batch, n) and theirs."""
    batch, n = args.logits.shape[0], args.logprobs
    if not n:
        return _sample(args), None
    logprobs = (torch.empty(batch), torch.empty(batch, n, dtype=torch.int64), torch.empty(batch, n))
    return _sample(args, logprobs=(n, *(x.data_ptr() for x in logprobs))), logprobs


def survivors(args: SamplingArgs) -> Tensor:
    """Which tokens the filters keep, (batch, vocab) bool; a greedy row keeps one."""
    kept = torch.empty(args.logits.shape, dtype=torch.bool)
    _sample(args, kept=kept.data_ptr())
    return kept


def speculative_sample(
    draft_probs: Tensor,
    draft_tokens: Tensor,
    target_probs: Tensor,
    seeds: int | Tensor,
    positions: int | Tensor,
) -> tuple[Tensor, Tensor] | None:
    """``fastattn.sampling.speculative_sample`` as one kernel: tokens (batch, n + 1) and accepted (batch,), int64.

    None where the probabilities are float64, or cannot be drawn from, or a token cannot have been drawn: whose message
    that needs is not known here.

    Args:
        draft_probs: (batch, n, vocab).
        draft_tokens: (batch, n) int32 or int64.
        target_probs: (batch, n + 1, vocab).
        seeds, positions: a number or a contiguous (batch,) int64.
    """
    dtype = torch.promote_types(draft_probs.dtype, target_probs.dtype)
    if dtype not in FLOAT_DTYPES:
        return None
    draft, target = (_probabilities(x, dtype) for x in (draft_probs, target_probs))
    drafted = draft_tokens.to(torch.int64).contiguous()
    batch, n, vocab = draft.shape
    totals = torch.empty(batch, 2 * n + 1, dtype=torch.float64)
    tokens = torch.empty(batch, n + 1, dtype=torch.int64)
    accepted = torch.empty(batch, dtype=torch.int64)
    done = _C.speculate(
        (draft.data_ptr(), draft.stride(0), draft.stride(1)),
        (target.data_ptr(), target.stride(0), target.stride(1)),
        drafted.data_ptr(),
        number_or_address(seeds),
        number_or_address(positions),
        totals.data_ptr(),
        tokens.data_ptr(),
        accepted.data_ptr(),
        batch,
        n,
        vocab,
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    return (tokens, accepted) if done else None


def _probabilities(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, with unit stride along the vocabulary."""
    x = x.to(dtype)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def count_tokens(ids: Tensor, counts: Tensor, lengths: Tensor, unseen: Tensor, tokens: Tensor) -> bool:
    """One more token (batch,) int64 into the lists of ``TokenCounts``, in place; False where there is no kernel."""
    if _C is None or ids.device.type != "cpu":
        return False
    tokens = tokens.contiguous()
    batch, capacity = ids.shape
    _C.count_tokens(
        ids.data_ptr(), counts.data_ptr(), lengths.data_ptr(), unseen.data_ptr(), tokens.data_ptr(), batch, capacity,
        unseen.shape[1],
    )  # fmt: skip
    return True


def _sample(args: SamplingArgs, kept: int = 0, logprobs: tuple[int, ...] | None = None) -> Tensor:
    batch, vocab = args.logits.shape
    tokens = torch.empty(batch, dtype=torch.int64)
    failed = _C.sample(*sampling_call(args), tokens.data_ptr(), kept, logprobs, torch.get_num_threads())
    if failed >= 0:
        problem = -int(tokens[failed])
        if problem == _BAD_BIAS_ID:
            assert args.edits is not None
            assert args.edits.logit_bias is not None
            ids = args.edits.logit_bias[0][failed]
            wrong = ids[(ids < -1) | (ids >= vocab)][0]
            raise ValueError(f"logit_bias: expected ids in [-1, {vocab}), got {int(wrong)} in row {failed}")
        raise ValueError(f"logits: row {failed} {_PROBLEMS[problem]}")
    return tokens
