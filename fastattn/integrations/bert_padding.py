"""``flash_attn.bert_padding``: padded batches (batch, seqlen, ...) to packed tokens (total, ...) and back.

Names, arguments and results are those of flash_attn 2.8 (Dao-AILab/flash-attention, flash_attn/bert_padding.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices (total,)`` of ``input (rows, ...)``; differentiable."""
    return input.index_select(0, indices)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, and ``input`` itself without a gradient."""
    return index_first_axis(input, indices), input.detach()


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...): ``values (total, ...)`` at rows ``indices (total,)``, zeros elsewhere; differentiable."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that count, one sequence after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or integer, 1 where a token counts.
        unused_mask: the same, 1 where room is kept for a token that does not count.

    Returns:
        Tokens (total, ...); their places in the flattened batch (total,) int64; cu_seqlens (batch + 1,) int32; the
        longest sequence; and how many tokens of each sequence count, (batch,) int32.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)  # (batch,)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()  # (total,)
    cu_seqlens = pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``unpad_input`` of rows that hold several sequences each.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), the lengths of a row's sequences, then zeros.
    """
    total = attention_mask_in_length.sum(dim=-1)  # (batch,)
    seqlen = attention_mask_in_length.shape[-1]
    kept = torch.arange(seqlen, device=total.device) < total[:, None]  # (batch, seqlen)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    flat = attention_mask_in_length.flatten()
    lengths = flat[flat > 0].to(torch.int32)  # (sequences,)
    cu_seqlens = pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(batch, seqlen, ...) of packed tokens (total, ...) and their places (total,); zeros elsewhere."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))  # type: ignore[no-untyped-call,no-any-return]
