"""`credits plans`: what the tiers grant and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, err, json_option, out, table
from cli.publishing import publish, require_broker, summary, wait_for_run
from cli.session import Session, actor, session
from cli.types import WallTime
from cli.words import confirm, counted, window_rows, yes_option
from refresh import plans as domain
from refresh import runs, totals
from refresh.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

Function = TypeVar("Function", bound="Callable[..., Any]")

_FIELDS = (
    click.option("--name", help="For people."),
    click.option("--amount", type=int, metavar="N", help="The credits that a refresh aims at, 1 or more."),
    click.option("--mode", "grant_mode", type=click.Choice(domain.GRANT_MODES), help="What a refresh does."),
    click.option("--rollover-cap", type=int, metavar="N", help="The most that rollover carries over, 0 or more."),
    click.option("--cadence", type=click.Choice(domain.CADENCES), help="When a refresh comes."),
    click.option("--interval-days", type=int, metavar="1..3660", help="Rolling: every so many times 24 hours."),
    click.option("--day", "day_of_month", type=int, metavar="1..31", help="Monthly: the day, or a month's last."),
    click.option("--time", "time_of_day", type=WallTime(), metavar="HH:MM", help="Monthly and daily: the local time."),
    click.option(
        "--timezone", metavar="IANA", help="Whose local time, such as Europe/Berlin; a user's own goes first."
    ),
    click.option("--active/--inactive", default=None, help="An inactive plan grants nothing."),
    click.option("--atomic/--no-atomic", default=None, help="Bulk runs over the plan: all of the users or none."),
)


def _fields(function: Function) -> Function:
    """The options for a plan's values; one that is not given is None."""
    for option in reversed(_FIELDS):
        function = option(function)
    return function


@click.group()
def plans() -> None:
    """Show, preview and change plans: what a tier grants, and when."""


@plans.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """Show all plans with the number of their users."""
    with session() as opened, opened.database.statements() as connection:
        found = domain.list_plans(connection)
    if as_json:
        answer("", {"plans": [{**plan.facts(), "users": users} for plan, users in found]}, as_json=True)
        return
    rows = [
        {
            "code": plan.code,
            "name": plan.name,
            "amount": plan.amount,
            "mode": _mode(plan),
            "when": _when(plan),
            "users": users,
            "": ", ".join(word for word, said in (("inactive", not plan.active), ("atomic", plan.atomic)) if said),
        }
        for plan, users in found
    ]
    out.print(table("Plans", rows))


@plans.command()
@click.argument("code")
@_fields
@json_option
def preview(*, code: str, as_json: bool, **values: Any) -> None:
    """Show the next six windows of a user who starts now on the plan CODE. Nothing is written.

    With options, the plan is shown as it would be with these values: it may be a new one.

    \b
    Examples:
      credits plans preview pro
      credits plans preview pro --cadence monthly --day 31 --time 09:00 --timezone Europe/Berlin
      credits plans preview trial --amount 50 --cadence daily --time 00:00
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened:
        draft = _draft(opened, code, values)
    if as_json:
        answer("", draft.facts(), as_json=True)
        return
    _show(draft, out)


@plans.command("set")
@click.argument("code")
@_fields
@yes_option
@click.option("--wait", is_flag=True, help="Stay until all users have moved, and show progress.")
@json_option
@click.pass_context
def set_(ctx: click.Context, /, *, code: str, yes: bool, wait: bool, as_json: bool, **values: Any) -> None:
    """Create the plan CODE, or change the values that are given.

    Shows the next six windows of a user who starts now, and how many users the change moves, and asks before it saves.
    A new plan needs an --amount; by default it fills up every 30 days.

    Another cadence, day, time or zone moves the plan's users to the new grid, in a run over batches: each to its first
    boundary at or after the end of the window they have now. Nobody is granted anything for time that was granted
    already, and until a user has moved they keep their date.

    \b
    Modes:     fill (raise to the amount) · reset (set to it) · add · rollover (keep at most the cap, then add)
    Cadences:  rolling (every --interval-days) · monthly (--day, --time) · daily (--time) · external (by webhook)

    \b
    Examples:
      credits plans set pro --amount 25000
      credits plans set pro --cadence monthly --day 31 --time 09:00 --timezone Europe/Berlin
      credits plans set team --name Team --amount 5000 --mode rollover --rollover-cap 2000 --yes
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session(broker=True) as opened:
        draft = _draft(opened, code, values)
        if draft.after == draft.before:
            answer(
                f"Plan {code} is like that already.", {**draft.facts(), "changed": False, "run": None}, as_json=as_json
            )
            return
        if draft.users_moved:  # before anything is saved: a command that fails has done nothing
            _check_can_move(opened)
        if not yes or not as_json:
            _show(draft, err)
        confirm(_question(draft), yes=yes)
        with opened.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            size = opened.settings.credit_refresh_batch_size
            run = domain.save(connection, draft, actor=actor(), batch_size=size)
        done = _move(opened, run, wait=wait and not draft.paused)
        text = f"Plan {code} is {'changed' if draft.before else 'created'}."
        if done:
            text += f" {summary(done)}"
        elif run:
            text += f" Run {run.run_id} moves {counted(run.users_selected, 'user')} to the new grid"
            text += " once `credits resume` ends the pause." if draft.paused else "."
        facts = done.facts() if done else run.facts() if run else None
        answer(text, {**draft.facts(), "changed": True, "run": facts}, as_json=as_json)
        if done and done.users_failed:
            ctx.exit(FINISHED_WITH_FAILURES)


def _draft(opened: Session, code: str, values: dict[str, Any]) -> domain.Draft:
    changes = {name: value for name, value in values.items() if value is not None}
    # Counting the users who would move may take longer than the limit of a batch.
    with opened.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        return domain.draft(connection, code, changes)


def _check_can_move(opened: Session) -> None:
    if not opened.settings.credit_refresh_enabled:
        raise RefusedError("CREDIT_REFRESH_ENABLED is false, and the change would open a run that moves users")
    require_broker(opened)


def _move(opened: Session, run: runs.Opened | None, *, wait: bool) -> totals.Progress | None:
    if run is None:
        return None
    publish(opened, run.run_id)
    return wait_for_run(opened, run.run_id, "Moving") if wait else None


def _question(draft: domain.Draft) -> str:
    verb = "Change" if draft.before else "Create"
    moves = f", and move {counted(draft.users_moved, 'user')}" if draft.users_moved else ""
    return f"{verb} plan {draft.after.code}{moves}?"


def _show(draft: domain.Draft, console: Console) -> None:
    before = draft.before.facts() if draft.before else {}
    changes = [
        {"value": name, "before": before.get(name), "after": value}
        for name, value in draft.after.facts().items()
        if not draft.before or before[name] != value
    ]
    if changes:
        console.print(table(f"Plan {draft.after.code}" + ("" if draft.before else " (new)"), changes))
    said = f"{draft.after.code}: {draft.after.amount:,} credits, {_mode(draft.after)}, {_when(draft.after)}."
    console.print(
        said + ("" if draft.after.active else " It is inactive and grants nothing."), soft_wrap=True, markup=False
    )
    if draft.windows:
        console.print(table("The next windows of a user who starts now", window_rows(draft.windows)))
    if draft.before:
        console.print(f"Users who move to another date: {draft.users_moved:,}.")


def _mode(plan: domain.Plan) -> str:
    return f"rollover up to {plan.rollover_cap or 0:,}" if plan.grant_mode == "rollover" else plan.grant_mode


def _when(plan: domain.Plan) -> str:
    at = f"{plan.time_of_day:%H:%M}" if plan.time_of_day else "00:00"
    return {
        "rolling": f"every {counted(plan.interval_days, 'day')}",
        "monthly": f"monthly on day {plan.day_of_month} at {at} {plan.timezone}",
        "daily": f"daily at {at} {plan.timezone}",
        "external": "when a webhook says so",
    }[plan.cadence]
