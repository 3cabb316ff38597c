"""The table of backends and the one rule of choice.

``auto`` takes the first row that can do what the call asks; a forced backend (``backend=`` or
``FASTATTN_BACKEND``) does it or raises, and never falls back.
A row is a module with ``NAME``, ``FEATURES``, ``unavailable()``, ``is_misforced()`` (an environment variable asks it
for what it cannot do: an error even for ``auto``), ``supports(args)`` and the operations
``attention(args)``, ``append_kv(args)``, ``sample(args)``, ``survivors(args)``. ``cpu`` also has
``speculative_sample``, which the others leave to ``sampling/speculative.py``.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs
from fastattn.backends import cpu, cuda, reference, triton

# Best first: the order in which "auto" asks.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (cuda, cpu, triton, reference)}


def available_backends() -> dict[str, str | None]:
    """Every backend by name; the value is None where it can run here, else the reason why it cannot."""
    return {name: module.unavailable() for name, module in BACKENDS.items()}


def resolve(name: str, args: AttentionArgs | KVAppendArgs | SamplingArgs) -> ModuleType:
    """The backend that serves this call.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: a forced backend, or a forced instruction set, cannot run on this machine.
        NotImplementedError: the forced backend, or every backend, lacks what the call needs.
    """
    if name == "auto":
        name = os.environ.get("FASTATTN_BACKEND") or "auto"
    if name != "auto":
        return _forced(name, args)
    reasons = []
    for module in BACKENDS.values():
        if reason := module.unavailable():
            if module.is_misforced():
                raise RuntimeError(f"backend {module.NAME!r} cannot run here: {reason}")
        elif (reason := module.supports(args)) is None:
            return module
        reasons.append(f"{module.NAME}: {reason}")
    raise NotImplementedError("no backend can serve this call (" + "; ".join(reasons) + ")")


def cpu_serves(tensor: Tensor) -> bool:
    """Whether the CPU kernels do the model's own operations (linear, norms), which elsewhere are PyTorch's.

    Raises:
        RuntimeError: ``FASTATTN_BACKEND=cpu``, and the kernels cannot run on this machine.
    """
    name = os.environ.get("FASTATTN_BACKEND") or "auto"
    if name not in ("auto", cpu.NAME) or tensor.device.type != "cpu":
        return False
    reason = cpu.unavailable()
    if reason and (name == cpu.NAME or cpu.is_misforced()):
        raise RuntimeError(f"backend {cpu.NAME!r} cannot run here: {reason}")
    return reason is None


def _forced(name: str, args: AttentionArgs | KVAppendArgs | SamplingArgs) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    module = BACKENDS[name]
    if reason := module.unavailable():
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    if reason := module.supports(args):
        able = [n for n, m in BACKENDS.items() if not (m.unavailable() or m.supports(args))]
        raise NotImplementedError(
            f"backend {name!r} {reason}; backends that have it: {', '.join(able) or 'none'}"
        )
    return module
