"""``python -m fastattn`` is the command ``fastattn``."""

from __future__ import annotations

from fastattn.cli import main

if __name__ == "__main__":
    main()
