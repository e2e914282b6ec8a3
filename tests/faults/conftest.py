"""The mark of the tests that run the fault suite: minutes each, on servers of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: runs the fault suite; -m 'not faults' leaves these out")
