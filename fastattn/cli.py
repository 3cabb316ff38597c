"""The command ``fastattn``: runs ``commands.py``, and turns what users can cause into one line on stderr."""

from __future__ import annotations

import sys

# What a user's file, prompt or machine can raise; anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


def main() -> None:
    """Run the command line; the exit status is 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""
    try:
        from fastattn import commands
    except ImportError as error:
        _without_typer(error)
        return
    try:
        commands.app()
    except EXPECTED as error:
        fail(str(error) or type(error).__name__)


def fail(message: str) -> None:
    """One line on stderr, exit status 1."""
    print(f"fastattn: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _without_typer(error: ImportError) -> None:
    """A core install has no typer; ``fastattn doctor`` works all the same."""
    if error.name not in ("typer", "click"):
        raise error
    if sys.argv[1:2] != ["doctor"]:
        fail("the command line needs typer: pip install 'fastattn[model]'")
    from fastattn import doctor

    doctor.main(sys.argv[2:])
