"""`credits webhooks`: what comes in and what goes out. Commands live in files of their own and are added here."""

from __future__ import annotations

import click

from cli.stripe_webhooks import link, list_, replay, show
from cli.webhook_deliveries import deliveries
from cli.webhook_endpoints import endpoints


@click.group()
def webhooks() -> None:
    """Look at the events that Stripe has sent; tell others what happens here.

    EVENT and CUSTOMER are Stripe's ids (evt_…, cus_…), USER is your app's own id of the user. `endpoints` and
    `deliveries` are about what goes out.
    """


for _command in (list_, show, replay, link, endpoints, deliveries):
    webhooks.add_command(_command)
