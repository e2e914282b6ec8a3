"""`credits webhooks`: what comes in by webhook. What each command does lives in files of its own."""

from __future__ import annotations

import click

from cli.stripe_webhooks import link, list_, replay, show


@click.group()
def webhooks() -> None:
    """Look at the events that Stripe has sent, process them again, and say which user a customer is.

    EVENT and CUSTOMER are Stripe's ids (evt_…, cus_…), USER is your app's own id of the user.
    """


for _command in (list_, show, replay, link):
    webhooks.add_command(_command)
