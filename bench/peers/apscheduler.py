"""APScheduler: an interval job in one process that loops over ORM objects, as the systems did that we replace."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import TYPE_CHECKING
from uuid import uuid4

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED
from apscheduler.schedulers.background import BackgroundScheduler
from sqlalchemy import select
from sqlalchemy.orm import Session

from bench.bare import BATCH_SIZE
from db import Database
from models.audit_log import AuditLog
from models.history import History
from models.plan import Plan
from models.user import User

if TYPE_CHECKING:
    from uuid import UUID


def refresh_by_apscheduler(url: str) -> float:
    """Refresh everybody; returns the seconds from the job's first firing to its end."""
    ended = Event()
    scheduler = BackgroundScheduler(timezone=UTC)
    scheduler.add_listener(lambda _: ended.set(), EVENT_JOB_EXECUTED | EVENT_JOB_ERROR)
    scheduler.start()
    try:
        with Database(url, "credits").connect() as connection, Session(connection) as session:
            started = time.perf_counter()
            scheduler.add_job(_refresh_due, "interval", hours=1, args=[session], next_run_time=datetime.now(UTC))
            ended.wait()
            return time.perf_counter() - started
    finally:
        scheduler.shutdown()


def _refresh_due(session: Session) -> None:
    """All who are due as objects; each computed in Python; a commit for each hundred."""
    now = datetime.now(UTC)
    run_id = uuid4()
    plans = {plan.code: plan for plan in session.scalars(select(Plan).where(Plan.active))}
    due = select(User).where(User.next_refresh_at <= now, User.active, ~User.credit_refresh_hold).order_by(User.id)
    users = session.scalars(due).all()
    session.expire_on_commit = False  # or each commit would have the next hundred read again, one by one
    for at in range(0, len(users), BATCH_SIZE):
        for user in users[at : at + BATCH_SIZE]:
            _refresh(session, user, plans[user.plan_code or ""], now, run_id)
        session.commit()


def _refresh(session: Session, user: User, plan: Plan, now: datetime, run_id: UUID) -> None:
    """The rolling cadence and the mode `fill`, as leanest.sql has them."""
    due_at = user.next_refresh_at or now
    step = timedelta(days=plan.interval_days)
    window_start = due_at + (now - due_at) // step * step
    old_balance = user.credit_balance
    added = max(plan.amount - old_balance, 0)
    session.add(
        History(
            run_id=run_id, user_id=user.id, status="refreshed", window_start=window_start,
            window_end=window_start + step, plan_code=plan.code, grant_mode=plan.grant_mode, target=plan.amount,
            old_balance=old_balance, credits_added=added, new_balance=old_balance + added,
            previous_next_refresh_at=due_at, previous_last_refresh=user.last_credit_refresh, reason="bench",
        )
    )  # fmt: skip
    session.add(
        AuditLog(
            actor="bench", action="refreshed", user_id=user.id, run_id=run_id, balance_before=old_balance,
            balance_after=old_balance + added, credits=added,
        )
    )  # fmt: skip
    user.credit_balance = old_balance + added
    user.last_credit_refresh = user.updated_at = now
    user.next_refresh_at = window_start + step
