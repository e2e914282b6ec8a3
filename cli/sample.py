"""Sample users for the demo: the same ones every time, their dates relative to now."""

from __future__ import annotations

import csv
import random
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

SEED = 2026
COLUMNS = (
    "external_id",
    "email",
    "plan_code",
    "credit_balance",
    "next_refresh_at",
    "credit_refresh_hold",
    "hold_reason",
    "custom_credit_amount",
)
AMOUNTS = {"free": 1_000, "pro": 20_000}
WINDOW = timedelta(days=30)
DUE_SHARE = 1 / 3
HELD_SHARE = 0.01
CUSTOM_SHARE = 0.02


def write_sample(path: Path, users: int, now: datetime) -> None:
    """Write a CSV of users of both tiers, about a third of whom are due at `now`.

    Some have an amount of their own, some are held, and balances lie anywhere between nothing and the full amount.
    """
    dice = random.Random(SEED)  # noqa: S311 - samples, not secrets
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(1, users + 1):
            plan = dice.choices(("free", "pro"), weights=(4, 1))[0]
            held = dice.random() < HELD_SHARE
            custom = dice.choice((5_000, 50_000)) if dice.random() < CUSTOM_SHARE else ""
            due_in = WINDOW * (dice.random() - DUE_SHARE)
            writer.writerow(
                (
                    f"user-{number:05}",
                    f"user{number}@example.com",
                    plan,
                    dice.randrange(AMOUNTS[plan] + 1),
                    (now + due_in).isoformat(timespec="seconds"),
                    str(held).lower(),
                    "payment failed" if held else "",
                    custom,
                )
            )
