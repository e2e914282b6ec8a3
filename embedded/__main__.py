"""`python -m embedded remove`: remove every instance in the state folder, for `make clean`."""

from __future__ import annotations

import sys

import settings
from embedded import EmbeddedError, remove


def main() -> int:
    """Remove the instances and return the exit code."""
    if sys.argv[1:] != ["remove"]:
        sys.stderr.write("usage: python -m embedded remove\n")
        return 2
    try:
        state_dir = settings.load().credits_state_dir
        for lock in state_dir.glob("*/lock"):
            remove(lock.parent.name, state_dir)
    except (EmbeddedError, settings.SettingsError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
