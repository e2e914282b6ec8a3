from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import celeryconfig
from refresh.delivery import FETCHED_MESSAGES, MESSAGE_IDS_MAX, PUSH_SECONDS_MAX, messages


@given(st.integers(0, 20_000))
def test_every_batch_is_in_exactly_one_message(count: int) -> None:
    ids = list(range(count))
    cut = messages(ids)
    assert [id_ for message in cut for id_ in message] == ids
    assert all(1 <= len(message) <= MESSAGE_IDS_MAX for message in cut)


def test_a_small_run_puts_one_batch_into_a_message_and_a_large_one_several() -> None:
    assert {len(message) for message in messages(list(range(99)))} == {1}
    assert max(len(message) for message in messages(list(range(10_000)))) == MESSAGE_IDS_MAX


def test_a_paced_run_puts_one_batch_into_a_message() -> None:
    assert messages(list(range(5_000)), paced=True) == [[id_] for id_ in range(5_000)]


def test_upkeep_knows_how_much_a_worker_fetches_ahead() -> None:
    assert celeryconfig.worker_prefetch_multiplier * celeryconfig.worker_concurrency + 1 == FETCHED_MESSAGES


def test_whoever_pushes_has_given_up_before_others_count_on_it() -> None:
    limits = celeryconfig.broker_transport_options
    assert limits["socket_timeout"] + limits["socket_connect_timeout"] <= PUSH_SECONDS_MAX
