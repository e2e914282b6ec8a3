"""Read by Python at its start, where clocks.py puts this folder into PYTHONPATH: under libfaketime alone.

It takes the absolute instant of the monotonic clock that `time.sleep` waits for as one of the clock that it fakes, and
refuses. `select` waits for a number of seconds.
"""

from __future__ import annotations

import select
import time
from typing import SupportsIndex


def _sleep(seconds: float | SupportsIndex, /) -> None:
    select.select([], [], [], float(seconds))


time.sleep = _sleep
