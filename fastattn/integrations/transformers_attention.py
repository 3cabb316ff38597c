"""The attention function in transformers' terms: what arrives there, in the terms of ``fastattn.attention``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import plain
from fastattn.args import top_left
from fastattn.attention import attention
from fastattn.backends.reference import bias_by_score

_called: set[int] | None = None
_collector: Any = None  # transformers' own list of what a forward pass shall return besides its result
_warned = False


def watch(collector: Any) -> None:
    """Listen to who asks for attention weights; ``collector.get()`` is None or a dict with their names as keys."""
    global _collector
    _collector = collector


@contextmanager
def called_modules() -> Iterator[set[int]]:
    """The ids of the modules whose attention was computed here meanwhile."""
    global _called
    _called = set()
    try:
        yield _called
    finally:
        _called = None


def interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What ``AttentionInterface`` calls.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: (batch, nheads, seqlen_q, headdim).
        key: (batch, nheads_k, seqlen_k, headdim); value the same with headdim_v.
        attention_mask: None; or broadcastable to (batch, nheads, seqlen_q, seqlen_k), bool (True = may attend) or
            float (added). With None a causal layer's corner is top-left, as an empty static cache needs it.
        position_bias: T5's, added to the scores, broadcastable likewise; or of an adapter that ``biases_by_distance``,
            (1, nheads, 1, seqlen_q + seqlen_k - 1), and nothing in it where there is none.
        s_aux, sinks: (nheads,) logits of attention sinks, by GPT-OSS's name and by others'.
        kwargs: windows, positions, ...: the mask has them.

    Returns:
        (batch, seqlen_q, nheads, headdim_v), and None: weights are never in memory.
    """
    wanted = None if _collector is None else _collector.get()
    if wanted is not None and any("attentions" in name for name in wanted):
        warn_about_weights()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = attend(
        module, query, key, value, attention_mask, bias=position_bias,
        bias_is_relative=getattr(module, "biases_by_distance", False), is_causal=is_causal, dropout=dropout,
        scaling=scaling, softcap=softcap or 0.0, sinks=s_aux if s_aux is not None else sinks,
    )  # fmt: skip
    return out, None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    bias_is_relative: bool = False,
    is_causal: bool = True,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """``interface`` with names for what adapters pass; (batch, seqlen_q, nheads, headdim_v)."""
    if _called is not None:
        _called.add(id(module))
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    relative = None
    if bias is not None and bias_is_relative:
        if bias.numel() == 0:
            bias = None
        elif seqlen_q > 1:  # of one query it is a bias as any other
            bias, relative = None, bias
    causal = mask is None and bool(is_causal) and seqlen_q > 1
    if dropout == 0.0 and relative is None:
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[3] > seqlen_k:
            mask = mask[..., :seqlen_k]
        quick = plain.attention(
            plain.TRANSFORMERS, query, key, value, causal, scaling, True, plain.NO_WINDOW, softcap, bias, mask, None,
            sinks, False,
        )  # fmt: skip
        if quick is not None:
            return quick  # type: ignore[no-any-return]
    window = plain.NO_WINDOW
    if mask is not None:
        check_mask(module, mask, seqlen_q, seqlen_k)
        mask = mask[..., :seqlen_k]
        if mask.dtype != torch.bool:
            if relative is not None:
                bias, relative = bias_by_score(relative, seqlen_q, seqlen_k), None
            bias, mask = (mask if bias is None else bias + mask), None
    elif causal:
        used, causal, window = top_left(seqlen_q, seqlen_k)
        key, value = key[:, :, :used], value[:, :, :used]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :used]
        relative = None if relative is None else relative[..., : seqlen_q + used - 1]
    try:
        out = attention(
            query.transpose(1, 2),  # (batch, seqlen_q, nheads, headdim)
            key.transpose(1, 2),  # (batch, seqlen_k, nheads_k, headdim)
            value.transpose(1, 2),  # (batch, seqlen_k, nheads_k, headdim_v)
            causal=causal, softmax_scale=scaling, window_size=window, softcap=softcap, attn_bias=bias,
            relative_bias=None if relative is None else relative[:, :, 0], attn_mask=mask, sinks=sinks,
            dropout_p=dropout,
        )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(f"{name_of(module)}: {error}") from error
    assert isinstance(out, Tensor)
    return out


def check_mask(module: nn.Module, mask: object, seqlen_q: int, seqlen_k: int) -> None:
    """A mask that some rule covers, or an error that names the layer."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"{name_of(module)}: attention_mask: expected a tensor or None, got {type(mask).__name__}"
        )
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(
            f"{name_of(module)}: attention_mask: expected a bool or float dtype, got {mask.dtype}"
        )
    if mask.dim() != 4 or mask.shape[2] not in (1, seqlen_q) or 1 != mask.shape[3] < seqlen_k:
        raise ValueError(
            f"{name_of(module)}: attention_mask: expected (batch, 1 or nheads, seqlen_q={seqlen_q}, "
            f"seqlen_k={seqlen_k}), got {tuple(mask.shape)}"
        )


def name_of(module: nn.Module) -> str:
    """A layer as errors call it: the model is not known here, its classes say which it is."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if index is None else f" of layer {index}")


def warn_about_weights() -> None:
    """Once per process."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "output_attentions: fastattn never holds attention weights in memory, and returns none. For weights call "
            'fastattn.integrations.transformers.disable(model) or model.set_attn_implementation("eager")',
            stacklevel=3,
        )
