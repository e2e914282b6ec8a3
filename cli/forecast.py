"""`credits forecast`: refreshes and credits by day and plan, as things are and as they would be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import click
from rich.bar import Bar
from rich.markup import escape
from rich.table import Table

from cli.chart import LINES
from cli.output import answer, json_option, out, progress, table
from cli.session import session
from cli.words import moment
from refresh import forecast as domain
from refresh.errors import RefusedError
from refresh.outlook import Total

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from refresh.forecast import Forecast
    from refresh.outlook import Outlook

PLANS_SHOWN = 4
"""So many plans have a column of their own in the chart; the smaller ones share one."""
BAR_WIDTH = 24

OTHERS = "(others)"
"""No plan's code has brackets."""

_APART = {
    "later": "later than that",
    "held": "held without end",
    "inactive": "inactive",
    "no_plan": "without an active plan",
    "external": "by webhook only",
    "unscheduled": "unscheduled",
    "overflow": "overflowing 64 bits",
}
# What the checks of a plan's values call them, after the options of `credits plans set`.
_OPTIONS = {"--rollover-cap": "rollover_cap", "--interval-days": "interval_days", "--day": "day_of_month"}
_OPTIONS |= {"--time": "time_of_day"}


@dataclass(slots=True)
class _Line:
    """A line of the chart: from this day on, the refreshes of each plan and the credits at most of all."""

    day: date
    refreshes: Counter[str]
    credits_most: int = 0


@click.command()
@click.option(
    "--days",
    type=click.IntRange(1, domain.DAYS_MAX),
    default=domain.DAYS,
    show_default=True,
    metavar=f"1..{domain.DAYS_MAX}",
    help="How many days, in UTC. The first is today.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PLAN.NAME=VALUE",
    help="What if the plan were like that? May be given several times; nothing is written.",
)
@json_option
def forecast(*, days: int, changes: Sequence[str], as_json: bool) -> None:
    """Show how many refreshes and credits each day ahead brings, by plan.

    A refresh counts on the day (UTC) on which it falls due, and what is overdue counts today; of a user who missed
    several windows, it is one. A hold with an end is taken to end then; held users without one are left out.

    Credits are two numbers, and the truth lies between them. At least: nobody spends anything from now on, so that the
    next refresh adds what the balance of now lacks, and under fill and reset the ones after it add nothing. At most:
    everybody has spent everything by each refresh that lies ahead, which then adds the plan's whole amount. What hosts
    add or take by hand, and users who come or go, are not foreseen.

    With --set, the plans are taken to change now, and both forecasts are shown with their difference. Another cadence,
    day, time or zone moves users as `credits plans set` would.

    \b
    Names for --set:  amount · grant_mode · rollover_cap · cadence · interval_days · day_of_month · time_of_day
                      timezone · active

    \b
    With --json: at, firstDay, lastDay, paused, allRunsDry; asItIs (users, refreshes, creditsLeast, creditsMost;
    plans, the same by planCode; days: day, planCode, refreshes, creditsLeast, creditsMost, without empty ones;
    notRefreshed: later, held, inactive, noPlan, external, unscheduled, overflow); and with --set, else null,
    changes (before, after, usersMoved), whatIf like asItIs, and difference (users, refreshes, creditsLeast,
    creditsMost).

    \b
    Examples:
      credits forecast
      credits forecast --days 90 --json
      credits forecast --set pro.amount=25000
      credits forecast --set free.cadence=monthly --set free.day_of_month=1 --set pro.active=false
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    parsed = [domain.parse_change(text) for text in changes]
    with session() as opened, progress() as bar:
        bar.add_task("Reading users", total=None)
        with opened.database.transaction() as connection:
            try:
                found = domain.forecast(connection, days=days, changes=parsed)
            except RefusedError as error:
                raise RefusedError(_renamed(str(error))) from error
    if as_json:
        answer("", found.facts(), as_json=True)
        return
    _show(found)


def _renamed(text: str) -> str:
    for option, name in _OPTIONS.items():
        text = text.replace(option, f"--set …{name}")
    return text


def _show(found: Forecast) -> None:
    shown = [("As it is", found.as_it_is)] + ([("What if", found.what_if)] if found.what_if else [])
    _show_charts(found, shown)
    if found.what_if is None:
        if found.as_it_is.plans:
            out.print(table(f"{found.first_day} to {found.last_day}", _totals(found.as_it_is)))
    else:
        for draft in found.drafts:
            assert draft.before is not None  # noqa: S101 - a forecast makes no plan
            out.print(f"What if: {_change(draft.before.facts(), draft.after.facts())}", soft_wrap=True, markup=False)
        out.print(table(f"{found.first_day} to {found.last_day}", _compared(found.as_it_is, found.what_if)))
    for title, outlook in shown:
        apart = ", ".join(f"{users:,} {_APART[state]}" for state, users in outlook.apart.items() if users)
        if apart:
            out.print(f"{title}, not refreshed in these days: {apart}.", soft_wrap=True)
    out.print(
        f"As of {moment(found.at)}. At least: nothing is spent from now on. At most: everything is spent by each "
        "refresh that lies ahead.",
        soft_wrap=True,
    )
    if found.paused:
        out.print("The service is paused: nothing of this comes before `credits resume`.", soft_wrap=True)
    elif found.all_dry:
        out.print("All runs are dry: nothing of this is granted.", soft_wrap=True)


def _show_charts(found: Forecast, shown: Sequence[tuple[str, Outlook]]) -> None:
    """A chart for each outlook, with the same columns and the same scale."""
    days = -(-((found.last_day - found.first_day).days + 1) // LINES)
    own = _own_columns(found, [outlook for _, outlook in shown])
    charts = [(title, _lines(found, outlook, own, days)) for title, outlook in shown]
    others = any(line.refreshes[OTHERS] for _, lines in charts for line in lines)
    scale = max(line.credits_most for _, lines in charts for line in lines)
    for title, lines in charts:
        if any(line.refreshes for line in lines):
            out.print(f"{title}: refreshes a day (UTC) by plan, and credits at most", style="bold")
            out.print(_chart(lines, [*own, OTHERS] if others else own, days, scale))
        else:
            out.print(f"{title}: nobody is refreshed from {found.first_day} to {found.last_day}.")


def _own_columns(found: Forecast, outlooks: Iterable[Outlook]) -> list[str]:
    """The plans that have a column of their own in each chart: those that are changed, then the largest."""
    sizes: Counter[str] = Counter()
    for outlook in outlooks:
        for code, total in outlook.plans.items():
            sizes[code] += total.refreshes
    changed = {draft.after.code for draft in found.drafts}
    codes = sorted(sizes, key=lambda code: (code not in changed, -sizes[code], code))
    return sorted(codes if len(codes) <= PLANS_SHOWN else codes[: PLANS_SHOWN - 1])


def _lines(found: Forecast, outlook: Outlook, own: Sequence[str], days: int) -> list[_Line]:
    """A line for so many days each, from the first day to the last."""
    lines = [
        _Line(found.first_day + timedelta(days=place * days), Counter())
        for place in range((found.last_day - found.first_day).days // days + 1)
    ]
    for day in outlook.days:
        line = lines[(day.day - found.first_day).days // days]
        line.refreshes[day.plan_code if day.plan_code in own else OTHERS] += day.refreshes
        line.credits_most += day.credits_most
    return lines


def _chart(lines: Sequence[_Line], columns: Sequence[str], days: int, scale: int) -> Table:
    chart = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    chart.add_column("day" if days == 1 else f"{days} days from", no_wrap=True)
    for heading in (*columns, "credits"):
        chart.add_column(escape(heading), justify="right", no_wrap=True)
    chart.add_column(width=BAR_WIDTH)
    for line in lines:
        chart.add_row(
            str(line.day),
            *(f"{line.refreshes[code]:,}" for code in columns),
            f"{line.credits_most:,}",
            Bar(max(scale, 1), 0, line.credits_most, width=BAR_WIDTH),
        )
    return chart


def _totals(outlook: Outlook) -> list[dict[str, Any]]:
    totals = {**outlook.plans, **({"all": outlook.total} if len(outlook.plans) > 1 else {})}
    return [
        {
            "plan": code,
            "users": total.users,
            "refreshes": total.refreshes,
            "credits at least": total.credits_least,
            "at most": total.credits_most,
        }
        for code, total in totals.items()
    ]


def _compared(before: Outlook, after: Outlook) -> list[dict[str, Any]]:
    """Both totals and the difference: of all, and of each plan that differs."""
    zero = Total()
    codes = sorted({*before.plans, *after.plans})
    pairs = {code: (before.plans.get(code, zero), after.plans.get(code, zero)) for code in codes}
    pairs = {code: pair for code, pair in pairs.items() if pair[0] != pair[1]}
    return [
        {
            "plan": code,
            "": what,
            "as it is": getattr(was, name),
            "what if": getattr(would, name),
            "difference": getattr(would, name) - getattr(was, name),
        }
        for code, (was, would) in {**pairs, "all": (before.total, after.total)}.items()
        for what, name in (
            ("users", "users"),
            ("refreshes", "refreshes"),
            ("credits at least", "credits_least"),
            ("credits at most", "credits_most"),
        )
    ]


def _change(before: dict[str, object], after: dict[str, object]) -> str:
    changed = [f"{name} {before[name]} → {value}" for name, value in after.items() if before[name] != value]
    return f"{after['code']} with {', '.join(changed)}." if changed else f"{after['code']} as it is."
