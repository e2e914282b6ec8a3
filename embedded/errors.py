"""The one error of this package, in a file of its own so that every module can raise it."""

from __future__ import annotations


class EmbeddedError(RuntimeError):
    """An embedded server or a child process cannot be had. Its text is one line for people."""
