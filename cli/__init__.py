"""The `credits` command: Click commands, thin over `refresh/`."""

from cli.main import main

__all__ = ["main"]
