"""`credits runs rollback`: take back what a run granted."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from cli.asking import key_option, pace_option, reason_option, refuse
from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, err, facts, json_option
from cli.publishing import carry_out, prepare_broker
from cli.session import actor, session
from cli.user_list import load, opened_list, unknown_option, users_option
from cli.words import confirm, counted, yes_option
from db import transaction
from refresh import rollback as domain
from refresh import runs
from refresh.run_detail import read_run
from refresh.run_list import find_run

if TYPE_CHECKING:
    from pathlib import Path

    import psycopg

    from cli.publishing import Carried
    from cli.session import Session
    from refresh.run_detail import TakenBack


@click.command()
@click.argument("run", metavar="RUN")
@users_option
@unknown_option
@click.option(
    "--reopen",
    is_flag=True,
    help="Give the windows back as well: the users are due again, for the amount less what they have spent of it.",
)
@click.option("--allow-negative", is_flag=True, help="Take all of it, also below zero; without, no more than is there.")
@click.option("--dry-run", is_flag=True, help="Record what would be taken back, row by row, and change no user.")
@reason_option
@key_option
@pace_option
@click.option("--wait", is_flag=True, help="Stay, and show progress to the end.")
@yes_option
@json_option
@click.pass_context
def rollback(ctx: click.Context, /, *, run: str, wait: bool, yes: bool, as_json: bool, **options: Any) -> None:
    """Take back what RUN granted, as far as it is still there; a run that is still running is cancelled first.

    What users have spent since stays spent: no balance goes below zero unless --allow-negative says so, and what is
    missing is recorded as the shortfall. Who was refreshed again since is left alone and reported. Dates go back where
    the run had restarted them (--force); any other window stays closed, so that no scan and no spend repeats the
    mistake. --reopen gives it back.

    A run is rolled back once. It shows what would happen, and asks; the exit code with --wait is 3 when users failed.

    \b
    With --json: what `credits runs list --json` says of the rollback; existing (the idempotency key had opened it),
    rolledBackRunId, reopen, allowNegative, usersReversed, creditsTakenBack, shortfall and usersRefreshedSince so far
    (with --wait: in the end); preview (users, creditsTaken, shortfall, refreshedSince, deleted, failing, running), null
    where it existed; and of --users, users (file, rows, duplicates, known, unknown, unknownSample), null without.

    \b
    Examples:
      credits runs rollback 3f2a91c0 --dry-run --wait --reason 'wrong amount'
      credits runs rollback 3f2a91c0 --reopen --wait --reason 'wrong amount'
      credits runs rollback 3f2a91c0 --users refunded.csv --yes --reason chargebacks
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with ExitStack() as stack:
        path: Path | None = options["users_file"]
        unknown_file: Path | None = options["unknown_file"]
        if unknown_file is not None and path is None:
            raise click.UsageError("--unknown is for --users")
        users = stack.enter_context(opened_list(path, unknown_file)) if path is not None else None
        opened = stack.enter_context(session(broker=True))
        prepare_broker(opened)
        connection = stack.enter_context(opened.database.statements())
        run_id = find_run(connection, run)
        listed = load(connection, users, unknown_file) if users is not None else None
        asked = domain.Asked(
            run_id=run_id,
            reopen=options["reopen"],
            allow_negative=options["allow_negative"],
            listed=listed.content() if listed is not None else None,
        )
        begun, shown = _open(connection, _request(opened, asked, options), asked, show=not (yes and as_json), yes=yes)
        carried = carry_out(opened, begun, wait=wait, doing="Rolling back")
        known = {"preview": shown and shown.facts(), "users": listed and listed.facts()}
        _answer(connection, carried, asked, known, as_json=as_json)
    if carried.done and carried.done.users_failed:
        ctx.exit(FINISHED_WITH_FAILURES)


def _request(opened: Session, asked: domain.Asked, options: dict[str, Any]) -> runs.Request:
    return asked.request(
        runs.Request(
            "cli",
            actor(),
            opened.settings.credit_refresh_batch_size,
            dry_run=options["dry_run"] or opened.settings.credit_refresh_dry_run,
            reason=options["reason"],
            idempotency_key=options["idempotency_key"],
            max_users_per_second=options["max_users_per_second"],
        )
    )


def _open(
    connection: psycopg.Connection[Any], request: runs.Request, asked: domain.Asked, *, show: bool, yes: bool
) -> tuple[runs.Opened, domain.Expected | None]:
    """Show, ask and open; nothing is shown and asked again for a key that has its run."""
    # Looking at millions of users may take longer than the limit of a batch. The question stands in no transaction.
    with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
        admitted = domain.admit(connection, request, asked)
        if isinstance(admitted, runs.NotOpened):
            raise refuse(admitted)
        if isinstance(admitted, runs.Opened):
            return admitted, None
        shown = domain.expect(connection, asked)
    if show:
        title = "Dry run of a rollback" if admitted.dry_run else "Rollback"
        err.print(facts(title, {"of run": asked.run_id, **_lines(shown)}))
    if not admitted.dry_run:
        confirm(_question(shown, asked), yes=yes)
    with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
        begun = domain.open_rollback(connection, request, asked)
    if isinstance(begun, runs.NotOpened):
        raise refuse(begun)
    return begun, shown


def _lines(shown: domain.Expected) -> dict[str, Any]:
    apart = {
        "refreshed since, left alone": shown.refreshed_since,
        "deleted": shown.deleted,
        "balance would not fit 64 bits": shown.failing,
    }
    return {
        "users to take back": shown.users,
        "credits to take back": shown.credits_taken,
        "spent already (shortfall)": shown.shortfall,
        **{name: users for name, users in apart.items() if users},
        **({"the run": "is still running, and is cancelled first"} if shown.running else {}),
    }


def _question(shown: domain.Expected, asked: domain.Asked) -> str:
    cancels = "Cancel the run, and take" if shown.running else "Take"
    whom = f"{counted(shown.credits_taken, 'credit')} back from {counted(shown.users, 'user')}"
    return f"{cancels} {whom}{', and make them due again' if asked.reopen else ''}?"


def _answer(
    connection: psycopg.Connection[Any], carried: Carried, asked: domain.Asked, known: dict[str, Any], *, as_json: bool
) -> None:
    detail = read_run(connection, carried.line.run_id, failures=0)
    assert detail.taken_back is not None  # noqa: S101 - of a run that takes back
    said = {
        **detail.line.facts(),
        "existing": carried.existing,
        "rolledBackRunId": str(asked.run_id),
        "reopen": asked.reopen,
        "allowNegative": asked.allow_negative,
        **detail.taken_back.facts(),
        **known,
    }
    text = _summary(carried, detail.taken_back) if carried.done else _begun(carried, asked)
    answer(text, said, as_json=as_json)


def _begun(carried: Carried, asked: domain.Asked) -> str:
    line = carried.line
    if carried.existing:
        return f"Run {line.run_id} was opened with this key before: it rolls back run {asked.run_id}."
    verb = "plans to roll back" if line.dry_run else "rolls back"
    return f"Run {line.run_id} {verb} run {asked.run_id}: {counted(line.users_selected, 'user')}."


def _summary(carried: Carried, taken: TakenBack) -> str:
    line = carried.line
    would = "would be " if line.dry_run else ""
    # A plan has no rows for those who would be left alone.
    since = taken.users_refreshed_since or 0
    rest = [
        *([f"{since:,} left alone, refreshed since"] if since else []),
        *([f"{line.users_skipped - since:,} skipped"] if line.users_skipped - since else []),
        *([f"{line.users_failed:,} failed"] if line.users_failed else []),
    ]
    return (
        f"Run {line.run_id} {line.status} in {line.seconds:.1f} s: {counted(taken.credits_taken_back, 'credit')} "
        f"{would}taken back from {counted(taken.users_reversed, 'user')}, shortfall {taken.shortfall:,}"
        f"{''.join(f'; {part}' for part in rest)}."
    )
