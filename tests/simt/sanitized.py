"""The probes on one build of the kernels, in a process of its own: ``python tests/simt/sanitized.py MODULE``.

For builds with AddressSanitizer and UndefinedBehaviorSanitizer. The emulator looks after the kernels' accesses itself; they
look after the arithmetic of indices and shifts, the launches, the bindings and the emulator. Fibers run on stacks that
AddressSanitizer does not know, so it leaves stacks alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param=asan-stack=0", "-g1")


def main(module: Path) -> None:
    """Fails if a probe or a sanitizer complains."""
    from simt.emulator import Emulator
    from simt.probes import PROBES

    emulator = Emulator(module)
    for family, complaints in PROBES.items():
        seen = complaints(emulator)
        assert not seen, f"{family}: {seen}"
    print("clean:", *PROBES)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(Path(sys.argv[1]))
