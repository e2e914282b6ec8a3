"""The Celery app and its tasks: thin over `refresh/`. `celery -A tasks worker | beat | flower` finds `app` here."""

from tasks.app import app
from tasks.batch import batch
from tasks.deliver import deliver
from tasks.retention import retention
from tasks.scan import scan
from tasks.upkeep import upkeep
from tasks.verify import verify

__all__ = ["app", "batch", "deliver", "retention", "scan", "upkeep", "verify"]
