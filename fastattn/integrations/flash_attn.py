"""An importable ``flash_attn`` on this library's kernels, so that code written for it runs on a CPU.

    from fastattn.integrations.flash_attn import install

    install()
    from flash_attn import flash_attn_func          # fastattn.flash_attn's

There are ``flash_attn`` and ``flash_attn.flash_attn_interface`` with the seven functions of ``fastattn.flash_attn``,
``flash_attn.bert_padding``, and ``flash_attn.layers.rotary`` with ``apply_rotary_emb``. ``__version__`` says which
version's signatures they have; no package of that name is installed, and its own kernels are not there.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from fastattn import flash_attn
from fastattn.integrations import bert_padding, rotary

__all__ = ["install", "uninstall"]

VERSION = "2.8.3"
_PUBLIC = {  # module: where its names come from, and whether it is a package
    "flash_attn": (flash_attn, True),
    "flash_attn.flash_attn_interface": (flash_attn, False),
    "flash_attn.bert_padding": (bert_padding, False),
    "flash_attn.layers": (None, True),
    "flash_attn.layers.rotary": (rotary, False),
}


def install() -> None:
    """Put ``flash_attn`` and its modules into ``sys.modules``; again is nothing.

    Raises:
        RuntimeError: the real package is installed, or imported.
    """
    if _is_ours(sys.modules.get("flash_attn")):
        return
    found = importlib.util.find_spec("flash_attn") if "flash_attn" not in sys.modules else None
    if found is not None or "flash_attn" in sys.modules:
        place = found.origin if found is not None else getattr(sys.modules["flash_attn"], "__file__", None)
        raise RuntimeError(f"flash_attn: expected no package of that name, got the one at {place}")
    for name, (source, is_package) in _PUBLIC.items():
        module = ModuleType(name, f"fastattn in the place of {name}.")
        module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=is_package)
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = []
        for public in getattr(source, "__all__", ()):
            setattr(module, public, getattr(source, public))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["flash_attn"].__version__ = VERSION  # type: ignore[attr-defined]


def uninstall() -> None:
    """Take them out again; what was imported from them goes on working."""
    if _is_ours(sys.modules.get("flash_attn")):
        for name in _PUBLIC:
            sys.modules.pop(name, None)


def _is_ours(module: ModuleType | None) -> bool:
    return module is not None and getattr(module.__spec__, "origin", None) == __file__
