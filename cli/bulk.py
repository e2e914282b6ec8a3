"""`credits bulk-refresh`: many users at once, because somebody asks for it."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime  # noqa: TC003 - the dataclass is read by people who look at its types
from typing import TYPE_CHECKING, Any

import click

from cli.asking import key_option, pace_option, reason_option, refuse
from cli.output import err, facts, json_option
from cli.publishing import answer_run, carry_out, prepare_broker
from cli.session import actor, session
from cli.types import Instant
from cli.user_list import load, opened_list, unknown_option, users_option
from cli.words import confirm, counted, moment, yes_option
from db import transaction
from refresh import runs
from refresh.errors import RefusedError
from refresh.preview import Preview, preview
from refresh.selection import Selection

if TYPE_CHECKING:
    from pathlib import Path

    import psycopg

    from cli.session import Session

CONDITIONS = "plan=CODE, next-refresh<T, balance<N, active=yes, active=no"
_CONDITION = re.compile(r"\s*(plan|active|next-refresh|balance)\s*([=<])\s*(.*?)\s*", re.DOTALL)
_COMPARED = {"plan": "=", "active": "=", "next-refresh": "<", "balance": "<"}
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,19}")
_FORCEABLE = {"not_due", "external", "unscheduled"}


class Condition(click.ParamType[tuple[str, Any]]):
    """One of `CONDITIONS`: the name of an attribute of `Selection`, and its value."""

    name = "condition"

    def convert(
        self, value: str | tuple[str, Any], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Parse."""
        if isinstance(value, tuple):
            return value
        found = _CONDITION.fullmatch(value)
        if found is None or found[2] != _COMPARED[found[1]] or not found[3]:
            self.fail(f"{value!r} is no condition; allowed are: {CONDITIONS}", param, ctx)
        key, text = found[1], found[3]
        if key == "plan":
            return "plan", text
        if key == "next-refresh":
            return "next_refresh_before", Instant().convert(text, param, ctx)
        if key == "active":
            if text not in {"yes", "no"}:
                self.fail(f"{value!r}: active is yes or no", param, ctx)
            return "active", text == "yes"
        if _WHOLE_NUMBER.fullmatch(text) is None or not -(2**63) <= int(text) < 2**63:
            self.fail(f"{value!r}: {text!r} is not a whole number of 64 bits", param, ctx)
        return "balance_below", int(text)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the options say; their names are Click's."""

    everyone: bool
    plan: str | None
    users_file: Path | None
    unknown_file: Path | None
    where: tuple[tuple[str, Any], ...]
    force: bool
    keep_window: bool
    dry_run: bool
    as_of: datetime | None
    atomic: bool
    max_users_per_second: int | None
    idempotency_key: str | None
    reason: str

    def selection(self) -> Selection:
        """Whom they select, a file's users aside.

        Raises:
            UsageError: they contradict one another.
        """
        named = [bool(self.everyone), self.plan is not None, self.users_file is not None]
        if sum(named) > 1:
            raise click.UsageError("--all, --plan and --users exclude one another: --where narrows the latter two down")
        if not any(named) and not self.where:
            raise click.UsageError("say whom: --all, --plan CODE, --users FILE, or one --where at least")
        if self.everyone and self.where:
            raise click.UsageError("--all means everybody: leave it out, and --where alone selects")
        if self.keep_window and not self.force:
            raise click.UsageError("--keep-window is for --force: any other refresh ends at its window's end")
        if self.unknown_file is not None and self.users_file is None:
            raise click.UsageError("--unknown is for --users")
        conditions: list[tuple[str, Any]] = [("plan", self.plan)] if self.plan is not None else []
        conditions += self.where
        if len({name for name, _ in conditions}) < len(conditions):
            raise click.UsageError("each condition may be given once")
        return Selection(**dict(conditions))

    def request(self, opened: Session) -> runs.Request:
        """What they ask for."""
        return runs.Request(
            "cli",
            actor(),
            opened.settings.credit_refresh_batch_size,
            dry_run=self.dry_run or opened.settings.credit_refresh_dry_run,
            as_of=self.as_of,
            reason=self.reason,
            force=self.force,
            keep_window=self.keep_window,
            atomic=self.atomic,
            max_users_per_second=self.max_users_per_second,
            idempotency_key=self.idempotency_key,
        )


@click.command("bulk-refresh")
@click.option("--all", "everyone", is_flag=True, help="All who are due; with --force, all users.")
@click.option("--plan", metavar="CODE", help="The users of a plan.")
@users_option
@click.option(
    "--where", type=Condition(), multiple=True, metavar="CONDITION", help=f"Users of whom it holds: {CONDITIONS}."
)
@click.option("--force", is_flag=True, help="Those too who are not due, have no date, or are refreshed by a webhook.")
@click.option("--keep-window", is_flag=True, help="With --force: leave everybody's next date where it is.")
@click.option("--dry-run", is_flag=True, help="Record what would be granted, row by row, and change no user.")
@click.option("--as-of", type=Instant(), metavar="T", help="Decide as of this instant (in the future: dry runs alone).")
@click.option("--atomic", is_flag=True, help=f"All of them or none; {runs.ATOMIC_USERS_MAX:,} users at most.")
@pace_option
@reason_option
@key_option
@unknown_option
@click.option("--wait", is_flag=True, help="Stay, and show progress to the end.")
@yes_option
@json_option
@click.pass_context
def bulk_refresh(ctx: click.Context, /, *, wait: bool, yes: bool, as_json: bool, **options: Any) -> None:
    """Refresh many users at once: all who are due, a plan's, a file's, or those of whom --where holds.

    Shows how many users match, how many would be refreshed and with how many credits, and asks; a dry run does not
    ask. Whom the run is for is decided once, when it opens; each batch decides again over each of its users, and looks
    for no others. Nobody is refreshed who is held, inactive, without a plan, or in a batch of an unfinished run.

    --where may be given several times, alone or with --plan or --users: all of it has to hold. Put conditions with <
    into quotes.

    With --force, users who are not due are granted a window that begins now, by their plan's amount and mode; a
    rolling interval starts anew from here, a monthly or daily date stays on its grid. Who is due anyway is refreshed
    as ever.

    \b
    With --json: what `credits runs list --json` says of a run; existing (the idempotency key had opened it), preview
    (usersMatching, usersRefreshed, credits, notRefreshed by reason), and of --users, users (file, rows, duplicates,
    known, unknown, unknownSample); each null where there is none.

    Exit codes: 0 opened, or with --wait done; 2 refused, nobody matches, or paused; 3 waited for, with failed users.

    \b
    Examples:
      credits bulk-refresh --all --reason 'scan was down' --wait
      credits bulk-refresh --plan pro --force --keep-window --reason 'outage of 2026-11-20' --dry-run
      credits bulk-refresh --all --max-users-per-second 500 --reason 'a busy evening'
      credits bulk-refresh --users ids.csv --unknown unknown.txt --force --reason 'launch bonus' --yes
      credits bulk-refresh --where 'balance<100' --where plan=free --force --reason goodwill --idempotency-key gw-7
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    asked = _Asked(**options)
    wanted = asked.selection()
    with ExitStack() as stack:
        users = None
        if asked.users_file is not None:
            users = stack.enter_context(opened_list(asked.users_file, asked.unknown_file))
        opened = stack.enter_context(session(broker=True))
        prepare_broker(opened)
        connection = stack.enter_context(opened.database.statements())
        listed = load(connection, users, asked.unknown_file) if users is not None else None
        if listed is not None:
            wanted = replace(wanted, listed=listed.content())
        run, shown = _open(connection, asked.request(opened), wanted, show=not (yes and as_json), yes=yes)
        carried = carry_out(opened, run, wait=wait)
        known = {"preview": shown and shown.facts(), "users": listed and listed.facts()}
        answer_run(ctx, carried, _sentence(run, carried.published, asked.idempotency_key), known, as_json=as_json)


def _open(
    connection: psycopg.Connection[Any], request: runs.Request, wanted: Selection, *, show: bool, yes: bool
) -> tuple[runs.Opened, Preview | None]:
    """Show, ask and open; nothing is shown and asked again for a key that has its run."""
    # Looking at millions of users may take longer than the limit of a batch. The question stands in no transaction.
    with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
        admitted = runs.admit(connection, request, wanted)
        if isinstance(admitted, runs.NotOpened):
            raise refuse(admitted)
        if isinstance(admitted, runs.Opened):
            return admitted, None
        shown = preview(connection, admitted, wanted)
    if show:
        err.print(_title(admitted, wanted), soft_wrap=True, markup=False)
        err.print(facts("", _lines(shown)))
    if not shown.users_refreshed:
        raise RefusedError(_nobody(shown, force=request.force))
    if not admitted.dry_run:
        confirm(_question(shown, force=request.force), yes=yes)
    with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
        run = runs.open_run(connection, request, wanted)
    if isinstance(run, runs.NotOpened):
        raise refuse(run)
    return run, shown


def _title(request: runs.Request, wanted: Selection) -> str:
    parts = [
        f"plan {wanted.plan}" if wanted.plan is not None else "",
        "users of the file" if wanted.listed is not None else "",
        f"next refresh before {moment(wanted.next_refresh_before)}" if wanted.next_refresh_before else "",
        f"balance below {wanted.balance_below:,}" if wanted.balance_below is not None else "",
        "" if wanted.active is None else "active" if wanted.active else "inactive",
    ]
    whom = ", ".join(part for part in parts if part) or ("all users" if request.force else "all who are due")
    return ("Dry run" if request.dry_run else "Bulk refresh") + (", forced: " if request.force else ": ") + whom


def _lines(shown: Preview) -> dict[str, Any]:
    return {
        "users who match": shown.users_matching,
        "would be refreshed": shown.users_refreshed,
        "credits": shown.credits,
        **{_APART[outcome]: users for outcome, users in shown.apart.items()},
    }


_APART = {
    "not_due": "not due",
    "held": "held",
    "inactive": "inactive",
    "no_plan": "without an active plan",
    "external": "refreshed by a webhook",
    "unscheduled": "without a date",
    "overflow": "credits do not fit 64 bits",
    "already_granted": "granted already",
    "unfinished": "in an unfinished run",
}


def _nobody(shown: Preview, *, force: bool) -> str:
    if not shown.users_matching:
        return "nobody matches: no run was opened"
    why = ", ".join(f"{users:,} {_APART[outcome]}" for outcome, users in shown.apart.items())
    way_out = "; --force refreshes users who are not due" if not force and _FORCEABLE & {*shown.apart} else ""
    return f"nobody would be refreshed of {counted(shown.users_matching, 'user')} ({why}): no run was opened{way_out}"


def _question(shown: Preview, *, force: bool) -> str:
    what = f"{counted(shown.users_refreshed, 'user')} with {counted(shown.credits, 'credit')}"
    return f"Refresh {what}, due or not?" if force else f"Refresh {what}?"


def _sentence(run: runs.Opened, published: int, key: str | None) -> str:
    kind = "Dry run" if run.dry_run else "Run"
    if run.existing:
        return f"{kind} {run.run_id} is there already, opened with the key {key!r}: no other was opened."
    batches = f"{run.batches_total:,} {'batch' if run.batches_total == 1 else 'batches'}"
    later = f", {published:,} of them so far: upkeep publishes the others" if published < run.batches_total else ""
    return f"{kind} {run.run_id}: {counted(run.users_selected, 'user')}, {batches} published{later}."
