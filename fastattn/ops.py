"""The operators behind the public functions: who computes, and what PyTorch's own machinery sees.

A plain eager call goes straight to a backend. Everything that watches calls (autograd, torch.compile, vmap and the
other function transforms, dispatch modes, tensor subclasses) gets ``torch.ops.fastattn.*`` instead: functional
operators that never return an alias, with fakes, derivatives of any order and batching rules.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastattn.args import AttentionArgs, KVAppendArgs
from fastattn.backends import reference, resolve
from fastattn.checks import Shapes, check_dtype, check_range, check_tensor

_LIBRARY = torch.library.Library("fastattn", "DEF")  # type: ignore[no-untyped-call]
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_count_modes = torch._C._len_torch_dispatch_stack

# AttentionArgs as an operator's arguments, in order. What is not here: return_lse (an operator always does) and
# needs_grad (the dispatcher knows).
_TENSORS = (
    "q", "k", "v", "alibi_slopes", "attn_bias", "attn_mask", "sinks", "rng_state", "cu_seqlens_q", "cu_seqlens_k",
    "seqlens_k", "k_leftpad", "cache_batch_idx", "block_table", "k_scale", "v_scale",
)  # fmt: skip
_DIFFERENTIABLE = ("q", "k", "v", "attn_bias", "sinks")
_SCHEMA = ", ".join(
    [
        *(f"Tensor{'' if name in 'qkv' else '?'} {name}" for name in _TENSORS),
        "float softmax_scale, bool bias_is_relative, bool causal, int window_left, int window_right",
        "float softcap, float dropout_p",
        "SymInt max_seqlen_q, SymInt max_seqlen_k, str backend",
    ]
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"attention({_SCHEMA}) -> (Tensor out, Tensor lse)"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"attention_backward(Tensor dout, Tensor dlse, Tensor out, Tensor lse, bool needs_dbias, {_SCHEMA})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "append_kv(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k, Tensor? v,"
    " Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, bool rotary_per_row, Tensor? k_leftpad,"
    " Tensor? cache_batch_idx, Tensor? block_table, Tensor(c!)? k_scale, Tensor(d!)? v_scale, str backend) -> Tensor"
)


def is_watched() -> bool:
    """Whether somebody watches every call: values may not be looked at, and only operators may compute."""
    return (
        is_compiling()
        or _innermost_transform() is not None
        or _count_modes() > 0
        or forward_ad._current_level >= 0
    )


def is_tracing(*tensors: Tensor) -> bool:
    """Whether somebody watches this call: every call, or one of its tensors is of a subclass."""
    return is_watched() or not _PLAIN.issuperset(map(type, tensors))


def attention(args: AttentionArgs, backend: str) -> tuple[Tensor, Tensor | None]:
    """``out`` and, with ``args.return_lse``, ``lse``: by the backend itself, or through the operator.

    Raises:
        NotImplementedError: the forced backend, or every backend, lacks a feature of this call.
    """
    tracing = is_tracing(args.q, args.k, args.v)
    if forward_ad._current_level >= 0:
        _check_no_tangents(args)
    if not args.needs_grad and not tracing:
        direct: tuple[Tensor, Tensor | None] = resolve(backend, args).attention(args)
        return direct
    call: Any = torch.ops.fastattn.attention
    if not tracing:
        resolve(backend, args)  # a refusal comes now, not in the middle of the backward pass
        call = _Eager.apply
    elif torch._C._functorch.peek_interpreter_stack() is not None and not torch.compiler.is_compiling():
        # torch.func's transforms want an autograd.Function: they do not see through an operator's derivative.
        call = _Transformed.apply
    out, lse = call(*_flat(args, backend))
    return out, (lse if args.return_lse else None)


def _check_no_tangents(args: AttentionArgs) -> None:
    """Derivatives in forward mode are not defined, and must not get lost."""
    for name in _DIFFERENTIABLE:
        x = getattr(args, name)
        if x is None:
            continue
        if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            given = "relative_bias" if name == "attn_bias" and args.bias_is_relative else name
            raise NotImplementedError(f"{given}: attention has no forward-mode derivative, use backward mode")


def attention_backward(
    args: AttentionArgs, dout: Tensor, out: Tensor, lse: Tensor, *, needs_dbias: bool
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias and dsinks, the last two empty where there are none, of a call whose lse nobody used.

    Recorded, where autograd records.
    """
    flat = _flat(args, "auto")
    if not torch.is_grad_enabled():
        return _attention_backward(dout, None, out, lse, needs_dbias, *flat)
    found: tuple[Tensor, ...] = torch.ops.fastattn.attention_backward(
        dout, torch.zeros_like(lse), out, lse, needs_dbias, *flat
    )
    return found


def check_served(args: AttentionArgs, backend: str) -> None:
    """Refuse now what ``attention`` would refuse."""
    if not is_tracing(args.q, args.k, args.v):
        resolve(backend, args)


def append_kv(args: KVAppendArgs, backend: str) -> tuple[Tensor, Tensor]:
    """Rotated q and the new lengths (batch,); k, v are written into the cache."""
    if not is_tracing(args.q, args.k_cache, args.v_cache):
        direct: tuple[Tensor, Tensor] = resolve(backend, args).append_kv(args)
        return direct
    turned = torch.ops.fastattn.append_kv(
        *(getattr(args, f.name) for f in fields(args) if f.name != "needs_grad"), backend
    )
    seqlens = args.cache_seqlens if args.k is None else args.cache_seqlens + args.k.shape[1]
    return (args.q if args.rotary_cos is None else turned), seqlens


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Inside ``torch.autocast("cpu")``: float32 and 16-bit tensors in its dtype, as torch's own attention gets them."""
    dtype = torch.get_autocast_dtype("cpu")
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(
        x if not isinstance(x, Tensor) or x.dtype not in eligible or x.device.type != "cpu" else x.to(dtype)
        for x in tensors
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd wants to hear of a call with these."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def new_rng_state() -> Tensor:
    """(2,) int64, seed and offset of one dropout mask, from torch's default generator."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64)


def checked_rng_state(dropout_p: float, given: Tensor | None, device: torch.device) -> Tensor | None:
    """The state that a call with this dropout uses, both checked."""
    check_range("dropout_p", dropout_p, 0.0, 1.0)
    if given is not None:
        check_tensor("rng_state", given, device)
        Shapes().match("rng_state", given, "seed_and_offset")
        check_dtype("rng_state", given, (torch.int64,))
        if given.shape[0] != 2:
            raise ValueError(f"rng_state: expected (2,), got {tuple(given.shape)}")
    if not dropout_p > 0:
        return None
    return new_rng_state() if given is None else given


def _flat(args: AttentionArgs, backend: str) -> tuple[Any, ...]:
    return (
        *(getattr(args, name) for name in _TENSORS),
        args.softmax_scale,
        args.bias_is_relative,
        args.causal,
        *args.window_size,
        args.softcap,
        args.dropout_p,
        args.max_seqlen_q,
        args.max_seqlen_k,
        backend,
    )


def _args(flat: tuple[Any, ...]) -> tuple[AttentionArgs, str]:
    tensors = dict(zip(_TENSORS, flat))
    scale, relative, causal, left, right, softcap, dropout_p, max_q, max_k, backend = flat[len(_TENSORS) :]
    args = AttentionArgs(
        **tensors,
        softmax_scale=scale,
        bias_is_relative=relative,
        causal=causal,
        window_size=(left, right),
        softcap=softcap,
        dropout_p=dropout_p,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        return_lse=True,
    )
    return args, backend


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attention(*flat: Any) -> tuple[Tensor, Tensor]:
    args, backend = _args(flat)
    out, lse = resolve(backend, args).attention(args)
    assert lse is not None
    return out, lse


def _attention_fake(*flat: Any) -> tuple[Tensor, Tensor]:
    args, _ = _args(flat)
    batch, seqlen_q, nheads, _ = args.q.shape
    out = args.q.new_empty((batch, seqlen_q, nheads, args.v.shape[3]))
    shape = (nheads, seqlen_q) if args.cu_seqlens_q is not None else (batch, nheads, seqlen_q)
    return out, args.q.new_empty(shape, dtype=_statistics(args.q))


def _attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs_dbias: bool, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args, backend = _args(flat)
    module = resolve(backend, replace(args, needs_grad=True))
    # autograd hands in zeros where nobody used lse: as good as none, and cheaper. A GPU is not asked: it would stop.
    given = dlse if dlse is not None and (dlse.device.type != "cpu" or dlse.any()) else None
    dq, dk, dv, dbias, dsinks = module.attention_backward(
        args, out, lse, dout, given, needs_dbias=needs_dbias
    )
    nothing = args.q.new_empty(0)
    return (
        dq.contiguous(),
        dk.contiguous(),
        dv.contiguous(),
        nothing if dbias is None else dbias.contiguous(),
        nothing.clone() if dsinks is None else dsinks.contiguous(),
    )


def _attention_backward_fake(
    dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, needs_dbias: bool, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args, _ = _args(flat)
    nothing = args.q.new_empty(0)
    return (
        args.q.new_empty(args.q.shape),
        args.k.new_empty(args.k.shape),
        args.v.new_empty(args.v.shape),
        args.attn_bias.new_empty(args.attn_bias.shape)
        if needs_dbias and args.attn_bias is not None
        else nothing,
        torch.empty_like(nothing) if args.sinks is None else args.sinks.new_empty(args.sinks.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[: len(_TENSORS)], *output)
    ctx.numbers = inputs[len(_TENSORS) :]


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, backward: Any = None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    if dlse is None and backward is None:
        dlse = torch.zeros_like(lse)
    flat = (*tensors, *ctx.numbers)
    wanted = dict(zip((*_TENSORS, "softmax_scale"), ctx.needs_input_grad))
    backward = backward or torch.ops.fastattn.attention_backward
    dq, dk, dv, dbias, dsinks = backward(dout, dlse, out, lse, wanted["attn_bias"], *flat)
    grads = {"q": dq, "k": dk, "v": dv, "attn_bias": dbias, "sinks": dsinks}
    return tuple(grads[name] if wanted[name] and name in grads else None for name in _TENSORS) + (None,) * (
        len(flat) - len(_TENSORS)
    )


_GIVEN = 5  # dout, dlse, out, lse, needs_dbias stand before the arguments of the forward pass


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *inputs[_GIVEN : _GIVEN + len(_TENSORS)])
    ctx.numbers = inputs[_GIVEN + len(_TENSORS) :]
    ctx.needs_dbias = inputs[4]


def _double_backward(ctx: Any, *given: Tensor) -> tuple[Any, ...]:
    """Through the definition: the gradients of the gradients as plain PyTorch computes them, to any order.

    ``out`` and ``lse`` are functions of the other inputs, so their own derivative is in those of q, k and v. Each
    input counts by itself, though dout may come from q: torch.func's levels keep them apart and history goes on.
    """
    dout, dlse, _, _, *tensors = ctx.saved_tensors
    args, _ = _args((*tensors, *ctx.numbers))
    names = [n for n in _DIFFERENTIABLE if getattr(args, n) is not None]

    def forward(*leaves: Tensor) -> tuple[Tensor, Tensor | None]:
        given_leaves: dict[str, Any] = dict(zip(names, leaves))
        return reference.attention(replace(args, **given_leaves))

    def first(dout: Tensor, dlse: Tensor, *leaves: Tensor) -> Any:
        return torch.func.vjp(forward, *leaves)[1]((dout, dlse))

    leaves = [getattr(args, n) for n in names]
    up = dict(zip(_DIFFERENTIABLE, given))
    if args.attn_bias is not None and not ctx.needs_dbias:
        up["attn_bias"] = torch.zeros_like(args.attn_bias)
    second = torch.func.vjp(first, dout, dlse, *leaves)[1](tuple(up[n] for n in names))
    found = dict(zip(["dout", "dlse", *names], second))
    head = (found["dout"], found["dlse"], None, None, None)
    return (*head, *(found.get(name) for name in _TENSORS), *(None for _ in ctx.numbers))


def _append_kv(*flat: Any) -> Tensor:
    *values, backend = flat
    names = [f.name for f in fields(KVAppendArgs) if f.name != "needs_grad"]
    args = KVAppendArgs(**dict(zip(names, values)))
    q, _ = resolve(backend, args).append_kv(args)
    result: Tensor = q.new_empty(0) if q is args.q else q
    return result


def _append_kv_fake(*flat: Any) -> Tensor:
    q, rotary_cos = flat[0], flat[6]
    fake: Tensor = q.new_empty(0 if rotary_cos is None else q.shape)
    return fake


def _batched(operator: Any, foldable: Any) -> Any:
    """A batching rule: one bigger batch where ``foldable`` can make one, else one call per element."""

    def rule(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        n = info.batch_size
        moved = [
            x if d is None or not isinstance(x, Tensor) else x.movedim(d, 0) for x, d in zip(flat, in_dims)
        ]
        mapped = [isinstance(x, Tensor) and d is not None for x, d in zip(flat, in_dims)]
        if foldable is not None and (folded := foldable(n, moved, mapped)) is not None:
            outputs = operator(*folded)
            return tuple(x.unflatten(0, (n, -1)) for x in outputs), (0,) * len(outputs)
        rows = [operator(*(x[i] if m else x for x, m in zip(moved, mapped))) for i in range(n)]
        return tuple(torch.stack(column) for column in zip(*rows)), (0,) * len(rows[0])

    return rule


def _fold(n: int, flat: list[Any], mapped: list[bool]) -> list[Any] | None:
    """The mapped dimension joins the batch; None where a call cannot say that in one batch."""
    values, is_mapped = dict(zip(_TENSORS, flat)), dict(zip(_TENSORS, mapped))
    foldable = {"q", "k", "v", "alibi_slopes", "attn_bias", "attn_mask", "seqlens_k"}
    if any(values[name] is not None for name in set(_TENSORS) - foldable - {"sinks"}) or is_mapped["sinks"]:
        return None
    batch = values["q"].shape[1 if is_mapped["q"] else 0]
    if n == 0 or batch == 0:
        return None
    for name in foldable:
        x = values[name]
        if x is None:
            continue
        x = x if is_mapped[name] else x.expand(n, *x.shape)
        if name == "alibi_slopes" and x.dim() == 2:
            x = x[:, None].expand(-1, batch, -1)
        if name in ("attn_bias", "attn_mask"):
            x = x.reshape(n, *(1,) * (5 - x.dim()), *x.shape[1:])
            x = x.expand(-1, batch, -1, -1, -1)
        values[name] = x.flatten(0, 1)
    return [*values.values(), *flat[len(_TENSORS) :]]


class _Eager(torch.autograd.Function):
    """The operator's body and derivative without the dispatcher, which takes 0.2 ms to say the same."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor]:
        output = _attention(*flat)
        _setup(ctx, flat, output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, dout, dlse, None if torch.is_grad_enabled() else _attention_backward)


class _Transformed(torch.autograd.Function):
    """The operator under torch.func's transforms."""

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.fastattn.attention(*flat)
        return out, lse

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, dout, dlse, _TransformedBackward.apply)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
        return _batched(_Transformed.apply, _fold)(info, in_dims, *flat)


class _TransformedBackward(torch.autograd.Function):
    """Its derivative, likewise."""

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fastattn.attention_backward(*flat))

    setup_context = staticmethod(_setup_double)
    backward = staticmethod(_double_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
        return _batched(_TransformedBackward.apply, None)(info, in_dims, *flat)


def _seen_through(mode: Any, operator: Any, types: Any, given: tuple[Any, ...], named: Any = None) -> Any:
    """torch.compile gets Triton's kernels themselves, not an operator around them, where they serve."""
    body = _attention if operator is torch.ops.fastattn.attention.default else _attention_backward
    args, backend = _args(given if body is _attention else given[_GIVEN:])
    if body is _attention_backward:
        args = replace(args, needs_grad=True)
    if args.q.device.type == "cpu" or resolve(backend, args).NAME != "triton":
        return mode.__torch_dispatch__(operator, types, given, named)
    with mode:
        return body(*given)


for _name, _body, _fake in (
    ("attention", _attention, _attention_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
    ("append_kv", _append_kv, _append_kv_fake),
):
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _body, _device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastattn::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("fastattn::attention", _backward, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "fastattn::attention_backward", _double_backward, setup_context=_setup_double, lib=_LIBRARY
)
torch.library.register_vmap(
    "fastattn::attention", _batched(torch.ops.fastattn.attention, _fold), lib=_LIBRARY
)
torch.library.register_vmap(
    "fastattn::attention_backward", _batched(torch.ops.fastattn.attention_backward, None), lib=_LIBRARY
)
for _name in ("attention", "attention_backward"):
    torch.library.register_torch_dispatch(
        f"fastattn::{_name}", FunctionalTensorMode, _seen_through, lib=_LIBRARY
    )
