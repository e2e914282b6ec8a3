"""`credits webhooks`: what comes in and what goes out. Commands live in files of their own and are added here."""

from __future__ import annotations

import click

from cli.webhook_deliveries import deliveries
from cli.webhook_endpoints import endpoints


@click.group()
def webhooks() -> None:
    """Tell others what happens: endpoints, and what was sent to them."""


webhooks.add_command(endpoints)
webhooks.add_command(deliveries)
