"""The service with one guard taken out, which the environment names in FAULTS_BREAK (breaks.py).

    celery -A tests.faults.broken worker | beat        instead of  celery -A tasks …
    python -m tests.faults.broken scan --wait          instead of  credits scan --wait

Whoever imports this has its process broken; a guard that is not there any more raises.
"""

from __future__ import annotations

import settings
from tasks import app
from tests.faults import breaks

__all__ = ["app"]

breaks.take_out(settings.environment()["FAULTS_BREAK"])

if __name__ == "__main__":
    from cli import main

    main()
