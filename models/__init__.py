"""The tables, one per file, and nothing but tables.

`Base.metadata` is what `alembic check` compares with a migrated database. The schema is not named
here: connections set `search_path` (db.py), so that one build serves any `DATABASE_SCHEMA`.
"""

from models.api_key import ApiKey
from models.audit_log import AuditLog
from models.base import Base
from models.batch import Batch
from models.history import History
from models.plan import Plan
from models.run import Run
from models.setting import Setting
from models.stripe_customer import StripeCustomer
from models.stripe_event import StripeEvent
from models.stripe_subscription import StripeSubscription
from models.timezone import Timezone
from models.user import User
from models.webhook_delivery import WebhookDelivery
from models.webhook_endpoint import WebhookEndpoint

__all__ = [
    "ApiKey",
    "AuditLog",
    "Base",
    "Batch",
    "History",
    "Plan",
    "Run",
    "Setting",
    "StripeCustomer",
    "StripeEvent",
    "StripeSubscription",
    "Timezone",
    "User",
    "WebhookDelivery",
    "WebhookEndpoint",
]
