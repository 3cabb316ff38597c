"""One build of the kernels, in a process of its own, which a sanitizer ends if it finds something.

``python tests/simt/sanitized.py probe MODULE FAMILY...``: ``probes.py`` on a build with AddressSanitizer and
UndefinedBehaviorSanitizer. The emulator looks after the kernels' accesses itself; they look after the arithmetic of
indices and shifts, the launches, the bindings and the emulator. Fibers run on stacks that AddressSanitizer does not
know, so it leaves stacks alone.

``python tests/simt/sanitized.py call MODULE FAMILY...``: the calls of ``races.py`` on a build for ThreadSanitizer, which
looks after the kernels' accesses by means of its own: ``happens_before.h``.
"""

from __future__ import annotations

import sys
from pathlib import Path

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param=asan-stack=0", "-g1")


def probe(module: Path, families: list[str]) -> None:
    """Fails if a probe or a sanitizer complains."""
    from simt.emulator import Emulator
    from simt.probes import PROBES

    emulator = Emulator(module)
    for family in families:
        seen = PROBES[family](emulator)
        assert not seen, f"{family}: {seen}"
    print("clean:", *families)


def call(module: Path, families: list[str]) -> None:
    """Fails if ThreadSanitizer complains."""
    import torch
    from simt.emulator import Emulator
    from simt.races import CALLS

    emulator = Emulator(module)
    for family in families:
        torch.manual_seed(0)
        CALLS[family](emulator)
    print("no races:", *families)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    {"probe": probe, "call": call}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
