"""`credits why`: a user's verdict in a sentence, with the facts and dates behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.output import answer, json_option
from cli.session import session
from cli.words import counted, moment
from refresh.verdict import explain_user

if TYPE_CHECKING:
    from datetime import datetime

    from refresh.verdict import Verdict


@click.command()
@click.argument("user", metavar="USER")
@json_option
def why(*, user: str, as_json: bool) -> None:
    """Say why a user is, or is not, refreshed. USER is your app's own id of them.

    \b
    The verdict is one of
      due          the next scan refreshes them
      not_due      their date lies ahead
      held         somebody holds them: `credits release`
      inactive     the user is not active
      no_plan      they have no plan, or an inactive one
      external     their plan's windows come from a webhook
      unscheduled  they have no date: `credits users stagger`
      overflow     the credits do not fit 64 bits

    \b
    With --json: userId, at, verdict, paused, allRunsDry, active, planCode, planActive, cadence, grantMode,
    creditBalance, nextRefreshAt; next (verdict, windowStart, windowEnd, firstMissedAt, windowsPassed, amount,
    creditsAdded, alreadyGranted), hold (reason, until, ended, since, by, changedAt, changedBy), unfinishedRun
    (runId, attempts, error) and lastRefresh (at, source, runId, creditsAdded, windowStart, windowEnd), each null
    where there is none; and text, the sentences.

    \b
    Examples:
      credits why user-42
      credits why user-42 --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        verdict = explain_user(connection, user)
    text = explanation(verdict)
    answer(text, {**verdict.facts(), "text": text}, as_json=as_json)


def explanation(verdict: Verdict) -> str:
    """The verdict, what stands in its way, and what was last."""
    sentences = [_VERDICTS[verdict.verdict](verdict)]
    if verdict.verdict in ("inactive", "no_plan") and _hold_in_force(verdict):
        sentences.append(f"They are held as well, {_hold(verdict)}.")
    if verdict.held and not _hold_in_force(verdict):
        assert verdict.hold_until is not None  # noqa: S101 - only an end that has passed ends a hold
        sentences.append(f"A hold has run out {moment(verdict.hold_until)}; the next refresh clears it.")
    if verdict.batch_run_id is not None:
        sentences.append(_unfinished(verdict))
    if not verdict.enabled:
        sentences.append("The service is paused: nothing is granted before `credits resume`.")
    elif verdict.all_dry:
        sentences.append("All runs are dry: nothing is granted.")
    sentences.append(_last(verdict))
    return " ".join(sentences)


def _due(verdict: Verdict) -> str:
    due = _moment(verdict.next_refresh_at)
    if verdict.already_granted:
        return (
            f"{verdict.external_id} is due since {due}, and has been granted the {_window(verdict)} already: the next "
            f"scan moves them on to {_moment(verdict.window_end)} without credits."
        )
    return (
        f"{verdict.external_id} is due since {due}: the next scan refreshes them with {_grant(verdict)} for the "
        f"{_window(verdict)}{_missed(verdict)}."
    )


def _not_due(verdict: Verdict) -> str:
    due = _moment(verdict.next_refresh_at)
    if verdict.next_verdict == "overflow":
        return f"{verdict.external_id} is not due before {due}; {_does_not_fit(verdict)}."
    return f"{verdict.external_id} is not due before {due}; as things are, they get {_grant(verdict)} then."


def _held(verdict: Verdict) -> str:
    said = f"{verdict.external_id} is held {_hold(verdict)}"
    due = _moment(verdict.next_refresh_at)
    if verdict.next_verdict == "due" and verdict.due:
        if verdict.already_granted:
            return f"{said}; the window that fell due {due} has been granted already."
        return (
            f"{said}; the window that fell due {due} would be refreshed on release with {_grant(verdict)}"
            f"{_missed(verdict)}."
        )
    if verdict.next_verdict == "due":
        return f"{said}; their next window falls due {due} and would get {_grant(verdict)} without the hold."
    if verdict.next_verdict == "overflow":
        return f"{said}; {_does_not_fit(verdict)}."
    reason = {"external": _external, "unscheduled": _unscheduled}[verdict.next_verdict](verdict)
    return f"{said}. Without the hold: {reason}"


def _inactive(verdict: Verdict) -> str:
    return f"{verdict.external_id} is inactive: nothing is granted while `active` is false."


def _no_plan(verdict: Verdict) -> str:
    if verdict.plan_code is None:
        return f"{verdict.external_id} has no plan: nothing is granted before plan_code names one."
    return f"{verdict.external_id} is on the plan {verdict.plan_code}, which is inactive: nothing is granted by it."


def _external(verdict: Verdict) -> str:
    return (
        f"{verdict.external_id} is on the plan {verdict.plan_code}, which is external: they are refreshed when a "
        "webhook says so, and by no scan."
    )


def _unscheduled(verdict: Verdict) -> str:
    return (
        f"{verdict.external_id} has no next_refresh_at, so no scan finds them: they came with neither a date nor a "
        "grant. `credits users stagger` gives them a date."
    )


def _overflow(verdict: Verdict) -> str:
    return f"{verdict.external_id} is due since {_moment(verdict.next_refresh_at)}; {_does_not_fit(verdict)}."


_VERDICTS = {
    "due": _due,
    "not_due": _not_due,
    "held": _held,
    "inactive": _inactive,
    "no_plan": _no_plan,
    "external": _external,
    "unscheduled": _unscheduled,
    "overflow": _overflow,
}


def _hold_in_force(verdict: Verdict) -> bool:
    return verdict.held and (verdict.hold_until is None or verdict.hold_until > verdict.at)


def _hold(verdict: Verdict) -> str:
    since = f"since {moment(verdict.hold_since)} by {verdict.hold_by} " if verdict.hold_since else ""
    because = f"because {verdict.hold_reason!r} " if verdict.hold_reason else "without a reason "
    end = f"until {moment(verdict.hold_until)}" if verdict.hold_until else "until released"
    changed = ""
    if verdict.hold_changed_at:
        changed = f", changed {moment(verdict.hold_changed_at)} by {verdict.hold_changed_by}"
    return f"{since}{because}({end}{changed})"


def _grant(verdict: Verdict) -> str:
    assert verdict.credits_added is not None  # noqa: S101 - only an overflow has none
    assert verdict.target is not None  # noqa: S101 - a user who is due has an amount
    how = {
        "fill": f"fills {verdict.credit_balance:,} up to {verdict.target:,}",
        "reset": f"sets {verdict.credit_balance:,} to {verdict.target:,}",
        "add": f"adds to {verdict.credit_balance:,}",
        "rollover": f"adds {verdict.target:,} to what is left, of which at most {verdict.rollover_cap or 0:,} is kept",
    }[verdict.grant_mode or "fill"]
    return f"{counted(verdict.credits_added, 'credit')} ({how})"


def _does_not_fit(verdict: Verdict) -> str:
    return (
        f"a balance of {verdict.credit_balance:,} and an amount of {verdict.target:,} under {verdict.grant_mode} do "
        "not fit 64 bits, and each scan records a failure until one of them is changed"
    )


def _window(verdict: Verdict) -> str:
    return f"window {_moment(verdict.window_start)} to {_moment(verdict.window_end)}"


def _missed(verdict: Verdict) -> str:
    if not verdict.windows_passed:
        return ""
    return f"; it stands for {counted(verdict.windows_passed, 'missed window')} too, the first of which was due then"


def _unfinished(verdict: Verdict) -> str:
    tried = f", tried {counted(verdict.batch_attempts, 'time')}" if verdict.batch_attempts else ""
    error = f" ({verdict.batch_error})" if verdict.batch_error else ""
    return f"Run {verdict.batch_run_id} has them in a batch that is still to be done{tried}{error}."


def _last(verdict: Verdict) -> str:
    if verdict.last_at is None or verdict.last_credits is None:
        return "No refresh of theirs is on record."
    return (
        f"Last refreshed {moment(verdict.last_at)} with {counted(verdict.last_credits, 'credit')}, for the window "
        f"{_moment(verdict.last_window_start)} to {_moment(verdict.last_window_end)}."
    )


def _moment(at: datetime | None) -> str:
    return moment(at) if at is not None else "no date"
