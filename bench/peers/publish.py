"""What a scan does with a peer: `python -m bench.peers.publish MODULE IDS_A_MESSAGE` opens a run and publishes it."""

from __future__ import annotations

import sys
from importlib import import_module
from unittest.mock import patch

from bench.bare import open_due
from bench.peers import work
from db import Database
from refresh import delivery


def main(module: str, ids_a_message: int) -> None:
    """The clock begins with the run; by then the peer is imported and connected."""
    with import_module(f"bench.peers.{module}").publisher() as publish:
        batch_ids = open_due(Database(work.database_url(), "credits"))
        with patch.object(delivery, "MESSAGE_IDS_MAX", ids_a_message):
            publish(delivery.messages(batch_ids))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
