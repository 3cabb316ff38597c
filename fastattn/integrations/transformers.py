"""Hugging Face transformers on our kernels.

    from fastattn.integrations.transformers import enable, disable, register

    enable(model)                   # any model; proves by a dry forward pass that every layer was switched
    register()                      # from then on attn_implementation="fastattn" names us
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastattn")

Models that look their attention up in transformers' interface are switched there. BLOOM, Falcon, MPT and GPT-J write
it out themselves: ``enable`` gives their layers the adapters of ``transformers_adapters``, and so T5's, which then need
no matrix of biases. Everything else is refused.
The key-value cache, masks, windows and positions stay transformers' own; dropout draws from our generator.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastattn.args import AttentionArgs
from fastattn.backends import BACKENDS, reference, resolve
from fastattn.integrations.transformers_attention import called_modules, interface, warn_about_weights, watch

__all__ = ["disable", "enable", "register"]

NAME = "fastattn"


class _Before(NamedTuple):
    """What ``disable`` puts back."""

    implementations: list[tuple[Any, str | None]]  # configs
    classes: list[tuple[nn.Module, type[nn.Module]]]
    hooks: list[Any]


_enabled: WeakKeyDictionary[nn.Module, _Before] = WeakKeyDictionary()


def register() -> None:
    """Make ``attn_implementation="fastattn"`` known to transformers, for models and their masks.

    Only models that use transformers' attention interface listen to it; others ignore the name, some of them silently:
    ``enable`` finds out.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, interface)
    # Without a mask function of this name models drop padding and windows without a word.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # older ones hand the question on to the layers
        return
    watch(_active_collector)


def enable(model: nn.Module, example: dict[str, Any] | None = None) -> nn.Module:
    """Switch every attention layer of ``model`` to our kernels, and make sure of it by one dry forward pass.

    Args:
        model: a ``transformers.PreTrainedModel``.
        example: keyword arguments of a forward pass that goes through all of its layers. The default is a few token
            ids, Whisper's silence or a black image, by the model's main input.

    Returns:
        The model itself. ``disable(model)`` takes it back.

    Raises:
        TypeError: not a model of transformers.
        ValueError: enabled already; or no example is known for its main input.
        NotImplementedError: some layer is not switched, with its name, its class and the reason. The model is then as
            it was.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    if model in _enabled or any(m in _enabled for m in model.modules()):
        raise ValueError(f"model: {type(model).__name__} is enabled already")
    _check_tensors(model)
    layers = dict(_attention_layers(model))
    example = _example(model) if example is None else example
    register()
    before = _switch(model, layers)
    try:
        _prove(model, layers, example)
    except BaseException:
        _restore(before)
        raise
    _enabled[model] = before
    switched: nn.Module = model
    return switched


def disable(model: nn.Module) -> nn.Module:
    """The model as it was before ``enable``.

    Raises:
        ValueError: it is not enabled.
    """
    if model not in _enabled:
        raise ValueError(f"model: {type(model).__name__} is not enabled")
    _restore(_enabled.pop(model))
    return model


def _check_tensors(model: nn.Module) -> None:
    """Kernels for the model's dtype and device: to run on the reference is nobody's wish, unless it is forced."""
    seen = set()
    for name, p in model.named_parameters():
        if not p.is_floating_point() or (p.device, p.dtype) in seen:
            continue
        seen.add((p.device, p.dtype))
        x = p.new_empty((1, 1, 1, 8))
        args = AttentionArgs(x, x, x, 1.0)
        if resolve("auto", args) is not reference or os.environ.get("FASTATTN_BACKEND") == reference.NAME:
            continue
        kernels = {n: module for n, module in BACKENDS.items() if module is not reference}
        reasons = "; ".join(f"{n}: {m.unavailable() or m.supports(args)}" for n, m in kernels.items())
        raise NotImplementedError(
            f"{type(model).__name__}: no kernel for {name}, {str(p.dtype).removeprefix('torch.')} on "
            f"{p.device} ({reasons})"
        )


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that compute attention, by what their source says."""
    for name, module in model.named_modules():
        if "Attention" in type(module).__name__ and _kind(type(module)) is not None:
            yield name, module


def _kind(cls: type[nn.Module]) -> str | None:
    """``interface`` where transformers' table is asked, ``own`` where a softmax is written out, else None."""
    for base in cls.__mro__:
        if base is nn.Module:
            return None
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            return "own"
        if "ALL_ATTENTION_FUNCTIONS" in source:
            return "interface"
        if "softmax(" in source or "scaled_dot_product_attention(" in source:
            return "own"
    return None


def _switch(model: Any, layers: dict[str, nn.Module]) -> _Before:
    from fastattn.integrations.transformers_adapters import ADAPTERS

    refused, adapters, keeps_eager = [], [], False
    for name, module in layers.items():
        adapter = ADAPTERS.get(type(module).__name__)
        if adapter is not None:
            cls = adapter(type(module))
            adapters.append((module, cls))
            keeps_eager |= cls.implementation == "eager"
        elif _kind(type(module)) == "own":
            refused.append(f"{name} ({type(module).__name__}) computes attention itself, and has no adapter")
    if not layers:
        refused.append("no attention layer was found")
    if refused:
        raise NotImplementedError(f"{type(model).__name__} cannot be switched: " + "; ".join(refused))
    configs = _configs(model)
    before = _Before(
        [(config, config._attn_implementation_internal) for config in configs],
        [(module, type(module)) for module, _ in adapters],
        [model.register_forward_pre_hook(_notice_weights, with_kwargs=True)],
    )
    for config in configs:
        config._attn_implementation_internal = "eager" if keeps_eager else NAME
    for module, cls in adapters:
        module.__class__ = cls
    return before


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration in which a layer may look up who computes."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
            found[id(config)] = config
            for key in getattr(config, "sub_configs", {}):
                add(getattr(config, key, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _restore(before: _Before) -> None:
    for config, implementation in before.implementations:
        config._attn_implementation_internal = implementation
    for module, cls in before.classes:
        module.__class__ = cls
    for hook in before.hooks:
        hook.remove()


def _notice_weights(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if asked or (asked is None and getattr(model.config, "output_attentions", False)):
        warn_about_weights()


def _prove(model: Any, layers: dict[str, nn.Module], example: dict[str, Any]) -> None:
    """One forward pass, after which each layer must have called us."""
    with _quiet(model), called_modules() as called:
        try:
            model(**example)
        except Exception as error:
            raise NotImplementedError(
                f"{type(model).__name__} cannot be switched, its forward pass fails: {type(error).__name__}: {error}"
            ) from error
    missing = [f"{name} ({type(m).__name__})" for name, m in layers.items() if id(m) not in called]
    if missing:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be switched: after a forward pass with {', '.join(example)} these layers "
            f"had not called fastattn: {', '.join(missing)}. If they need other inputs, pass them as example="
        )


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """A forward pass that leaves no trace: no gradients, no dropout, the same random numbers after it."""
    training = [m for m in model.modules() if m.training]
    state = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_rng_state(state)
        for module in training:
            module.training = True


def _example(model: Any) -> dict[str, Any]:
    """Small inputs by the model's main one."""
    config = model.config
    text = getattr(config, "get_text_config", lambda: config)()
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    ids = torch.arange(1, 5, device=device)[None] % getattr(text, "vocab_size", 2)  # (1, 4)
    main = getattr(model, "main_input_name", None)
    shapes: dict[str, Callable[[], tuple[int, ...]]] = {
        "input_features": lambda: (1, config.num_mel_bins, 2 * config.max_source_positions),
        "pixel_values": lambda: (1, config.num_channels, config.image_size, config.image_size),
    }
    example: dict[str, Any] = {}
    if main == "input_ids":
        example["input_ids"] = ids
    elif main in shapes:
        try:
            example[main] = torch.zeros(shapes[main](), dtype=dtype, device=device)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"example: expected the inputs of {type(model).__name__}, got None") from error
    else:
        raise ValueError(
            f"example: expected the inputs of {type(model).__name__} (its main one is {main!r}), got None"
        )
    if getattr(config, "is_encoder_decoder", False):
        example["decoder_input_ids"] = ids
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        example["use_cache"] = False
    return example
