"""PyTorch's own attention, switched to our kernels: one call for whole programs, and one back.

    import fastattn.integrations.torch as switch

    switch.enable()                 # until switch.disable()
    with switch.enable(): ...       # or as long as a block lasts

While enabled, on CPU tensors, eager and compiled, forward and backward:

* ``F.scaled_dot_product_attention`` is ``fastattn.scaled_dot_product_attention``, whoever calls it and however it was
  imported: the operator itself is overridden, at the dispatcher.
* ``nn.MultiheadAttention`` is computed by ``fastattn.nn.multi_head_attention``, with weights or without, and
  ``nn.TransformerEncoderLayer`` and its relatives through the two; their fused inference paths are off.

What stays torch's own: other devices, nested tensors, ``torch.func`` transforms, and calls inside
``sdpa_kernel(SDPBackend.MATH)``, which ask for it. The switch holds for the whole process; compiled functions are
compiled anew after it. Where torch has a registry of flash attention implementations, ``"fastattn"`` is in it:
``torch.nn.attention.activate_flash_attention_impl("fastattn")`` is the same as ``enable()``.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from fastattn.nn import MultiheadAttention
from fastattn.sdpa import scaled_dot_product_attention

__all__ = ["disable", "enable", "is_enabled"]

NAME = "fastattn"
_KEYS = ("AutogradCPU", "CPU")  # with autograd, and in inference mode
_HAS_REGISTRY = hasattr(torch_attention, "register_flash_attention_impl")


class _Override:
    """What is changed while enabled, and how it was before."""

    def __init__(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        for key in _KEYS:
            self.library.impl("scaled_dot_product_attention", _sdpa, key)  # type: ignore[no-untyped-call]
        self.forward = torch.nn.MultiheadAttention.forward
        torch.nn.MultiheadAttention.forward = MultiheadAttention.forward  # type: ignore[method-assign,assignment]
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self.cache_tag = _tag_caches(None)

    def remove(self) -> None:
        """Everything as it was."""
        global _active
        if _active is not self:
            return
        _active = None
        self.library._destroy()  # type: ignore[no-untyped-call]
        torch.nn.MultiheadAttention.forward = self.forward  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        _tag_caches(self.cache_tag)


_active: _Override | None = None
_displaced: str | None = None  # the implementation of torch's registry that enable() took the place of


class _Enabled:
    """What ``enable`` returns: leaving its block undoes what entering it did, and no more."""

    def __init__(self, was_enabled: bool) -> None:
        self._was_enabled = was_enabled

    def __enter__(self) -> _Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._was_enabled:
            disable()


def enable() -> _Enabled:
    """Switch to our kernels, see the module; a context manager, or in force until ``disable``.

    Enabling what is enabled changes nothing, and the inner of two blocks leaves it to the outer one to switch back.
    """
    global _displaced
    if is_enabled():
        return _Enabled(was_enabled=True)
    if _HAS_REGISTRY:
        _displaced = torch_attention.current_flash_attention_impl()
        torch_attention.activate_flash_attention_impl(NAME)
    else:
        _activate()
    return _Enabled(was_enabled=False)


def disable() -> None:
    """PyTorch as it was before ``enable``; nothing if it was not enabled."""
    global _displaced
    if _active is None:
        return
    if _HAS_REGISTRY and torch_attention.current_flash_attention_impl() == NAME:
        torch_attention.restore_flash_attention_impl()
        if _displaced is not None:
            torch_attention.activate_flash_attention_impl(_displaced)
    else:
        _active.remove()
    _displaced = None


def is_enabled() -> bool:
    """Whether PyTorch's attention is ours now."""
    return _active is not None


def _activate() -> _Override:
    global _active
    if _active is None:
        _active = _Override()
    return _active


def _tag_caches(tag: str | None) -> str | None:
    """What was compiled with the other attention must not be used: not in this process, not from the disk.

    Nor what calls our operators as an earlier version had them.

    Returns:
        The tag of compiled code before, to be handed in when switching back.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    # What Python's own dispatcher, which traces, remembers of who computes the operator.
    getattr(torch.ops.aten.scaled_dot_product_attention.default, "_dispatch_cache", {}).clear()
    config: Any = getattr(torch.compiler, "config", None)
    if not hasattr(config, "cache_key_tag"):
        return None
    before: str = config.cache_key_tag
    config.cache_key_tag = f"{before}+{torch.ops.fastattn.attention.default._schema}" if tag is None else tag
    return before


def _sdpa(*args: Any, **kwargs: Any) -> Tensor:
    """aten::scaled_dot_product_attention, with its arguments."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
        out, _ = torch._scaled_dot_product_attention_math(*args, **kwargs)
        return out
    return scaled_dot_product_attention(*args, **kwargs)


if _HAS_REGISTRY:
    torch_attention.register_flash_attention_impl(NAME, register_fn=_activate)
