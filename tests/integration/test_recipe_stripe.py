"""docs/recipes/stripe.md: its commands, its SQL, and the two lives that it tells."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from refresh.stripe_inbox import OUTCOMES
from tests.integration import billing
from tests.integration.billing import Price, Subscription, deliver, now
from tests.integration.recipes import PAGES, set_up, try_sql

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

PAGE = "stripe.md"


def test_the_two_lives_of_the_page(world: World, cli: Cli) -> None:
    set_up(cli, PAGE)
    ada, bob = (world.user(name, due_in="-9 days") for name in ("ada", "bob"))
    world.refresh()
    cli.says("plans", "set", "max-monthly", "--amount", "50000", "--cadence", "external", "--yes")

    monthly = Subscription(metadata={"userId": "ada"}, price=Price("price_1Pro", "pro-monthly"))
    assert deliver(world, monthly.says("created")).outcome == "plan_set"
    assert deliver(world, monthly.paid()).outcome == "granted"
    larger = replace(monthly, price=Price("price_1Max", "max-monthly"))
    assert deliver(world, larger.says("updated", at=now())).outcome == "plan_set"
    prorations = [monthly.line(proration=True), larger.line(proration=True)]
    assert deliver(world, larger.paid(reason="subscription_update", lines=prorations)).outcome == "no_period"
    ended = replace(larger, status="canceled").says("deleted", at=now() + timedelta(seconds=1))
    assert deliver(world, ended).outcome == "plan_set"
    user = world.see(ada)
    assert (user["plan_code"], user["credit_balance"], user["next_refresh_at"]) == ("free", 20_000, monthly.until)

    price = Price("price_1Year", "pro-yearly", interval="year")
    yearly = Subscription("sub_Bob", "cus_Bob", price, metadata={"userId": "bob"}, length=billing.YEAR)
    assert deliver(world, yearly.says("created")).outcome == "plan_set"
    assert deliver(world, yearly.paid()).outcome == "not_external"
    user = world.see(bob)
    assert (user["plan_code"], user["credit_refresh_day"]) == ("pro-yearly", yearly.created.day)
    assert user["next_refresh_at"] >= billing.windows(world, bob)[0][1]
    cli.says("refresh", "bob", "--force", "--reason", "subscribed")
    assert world.see(bob)["credit_balance"] == 20_000


def test_its_sql_works(world: World) -> None:
    try_sql(world, PAGE)


def test_it_names_every_outcome() -> None:
    page = (PAGES / PAGE).read_text()
    rows = [line.split("|")[1] for line in page.partition("| outcome | |")[2].splitlines() if line.startswith("|")]
    assert set(re.findall(r"`([a-z_]+)`", " ".join(rows))) == set(OUTCOMES)
