"""What is lost of a run is found while the run goes on, and what waits for its turn is not called lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refresh import delivery
from tests.integration.test_pacing import attempts, paced, waits

if TYPE_CHECKING:
    from tests.integration.world import World

ENDED = "UPDATE credit_refresh_batches SET finished_at = finished_at - interval '31 seconds' WHERE status = 'done'"
STALLED = "UPDATE credit_refresh_runs SET paced_until = now() - interval '31 seconds'"
EARLIER = "UPDATE credit_refresh_batches SET published_at = published_at - interval '31 seconds'"


def lost(world: World, *, scheduled: bool = False, queue_empty: bool = False) -> list[int]:
    """What upkeep counts as lost; it is claimed at once, as it does."""
    with world.database.statements() as connection:
        delivery.record_losses(connection, scheduled=scheduled, queue_empty=queue_empty)
    return world.claim()


def test_what_others_have_overtaken_is_lost_though_the_queue_is_long(world: World) -> None:
    _, ids = paced(world, 6, 10)
    world.work([ids[1], ids[3]])
    assert lost(world) == []  # a moment ago: the others may be in workers' hands
    world.sql.execute(ENDED)
    assert lost(world) == [ids[0], ids[2]]
    assert attempts(world) == [1, 0, 1, 0, 0, 0]
    # Published anew, they are behind the others.
    assert lost(world) == []
    world.work(ids)
    assert attempts(world) == [1, 0, 1, 0, 0, 0]


def test_the_same_holds_without_a_pace(world: World) -> None:
    world.users(3)
    run = world.scan(batch_size=1)
    ids = world.claim(run)
    world.work([ids[2]])
    world.sql.execute(ENDED)
    assert lost(world, scheduled=True) == []  # another queue
    assert lost(world) == ids[:2]


def test_a_run_of_one_batch_is_overtaken_by_others(world: World) -> None:
    """It has nothing later of its own, and the others fill the queue for long."""
    world.users(1)
    small = world.claim(world.scan())
    for number in range(3):
        world.user(f"other-{number}")
    large = world.claim(world.scan(batch_size=1))
    world.work(large[:1])
    world.sql.execute(ENDED)
    assert lost(world) == []  # whoever published it may have been slower than the others' publisher
    apart = "UPDATE credit_refresh_batches SET published_at = published_at - %s * interval '1 second' WHERE id = %s"
    world.sql.execute(apart, (delivery.PUSH_SECONDS_MAX + 1, *small))
    assert lost(world) == small


def test_what_is_lost_again_is_rung_for_after_a_backoff(world: World) -> None:
    """A worker that dies as it starts, again and again, must not use up all attempts in a minute."""
    _, ids = paced(world, 2, 10)
    waits_seconds = []
    for _ in range(4):
        world.sql.execute("UPDATE credit_refresh_batches SET published_at = now() - interval '1 hour'")
        world.sql.execute("UPDATE credit_refresh_batches SET next_attempt_at = NULL")
        with world.database.statements() as connection:
            delivery.record_losses(connection, scheduled=False, queue_empty=True)
        wait = "SELECT extract(epoch FROM next_attempt_at - now())::float FROM credit_refresh_batches WHERE id = %s"
        waits_seconds.append(round(world.value(wait, ids[0])))
    assert waits_seconds == [0, 10, 20, 40]


def test_nothing_is_lost_before_its_time(world: World) -> None:
    _, ids = paced(world, 1, 10)
    earlier = "UPDATE credit_refresh_batches SET published_at = now() - %s * interval '1 second'"
    world.sql.execute(earlier, (delivery.LOST_AFTER_SECONDS - 1,))
    assert lost(world, queue_empty=True) == []
    world.sql.execute(earlier, (delivery.LOST_AFTER_SECONDS + 1,))
    assert lost(world, queue_empty=True) == ids


def test_who_was_published_later_is_not_overtaken(world: World) -> None:
    _, ids = paced(world, 3, 10)
    world.sql.execute("UPDATE credit_refresh_batches SET published_at = now() + interval '1 ms' WHERE id = %s", ids[:1])
    world.work(ids[1:])
    world.sql.execute(ENDED)
    assert lost(world) == []


def test_a_batch_that_was_lost_and_is_done_says_nothing_of_the_queue(world: World) -> None:
    """Its old message may have been the one that was worked off, from far ahead of its new one."""
    _, ids = paced(world, 5, 10)
    world.work([ids[1]])
    world.sql.execute(ENDED)
    assert lost(world) == [ids[0]]
    world.work([ids[0]])
    world.sql.execute(ENDED)
    assert lost(world) == []
    assert attempts(world) == [1, 0, 0, 0, 0]


def test_a_batch_in_a_workers_hands_is_not_lost_though_others_overtake(world: World) -> None:
    _, ids = paced(world, 2, 10)
    world.work(ids[1:])
    world.sql.execute(ENDED)
    with world.host() as worker:
        worker.execute("SELECT FROM credit_refresh_batches WHERE id = %s FOR UPDATE", ids[:1])
        assert lost(world) == []
    assert lost(world) == ids[:1]


def test_who_waits_his_turn_is_not_lost(world: World) -> None:
    """The queue is empty, published was long ago, and the last batches lie with the workers."""
    _, ids = paced(world, 3, 10)
    world.sql.execute(EARLIER)
    waits(world, ids[0])
    assert lost(world, queue_empty=True) == []
    world.sql.execute(STALLED)
    assert lost(world, queue_empty=True) == ids
    assert attempts(world) == [1, 1, 1]


def test_before_the_first_turn_the_usual_time_holds(world: World) -> None:
    _, ids = paced(world, 2, 10)
    assert lost(world, queue_empty=True) == []
    world.sql.execute(EARLIER)
    assert lost(world, queue_empty=True) == ids


def test_what_is_unpublished_is_not_lost(world: World) -> None:
    world.users(2)
    world.scan(max_users_per_second=10)
    world.sql.execute(STALLED)
    with world.database.statements() as connection:
        assert delivery.record_losses(connection, scheduled=False) == 0


def test_others_wait_with_the_workers_that_wait(world: World) -> None:
    """A worker has fetched messages of both queues; while it waits for its turn in one run, the other's wait too."""
    world.users(1)
    ids = world.claim(world.scan())
    world.user("slow")
    world.scan(max_users_per_second=1)
    world.sql.execute(EARLIER)
    world.sql.execute("UPDATE credit_refresh_runs SET paced_until = now() + '10 s' WHERE max_users_per_second = 1")
    with world.database.statements() as connection:
        assert delivery.record_losses(connection, scheduled=False) == 0
    world.sql.execute("UPDATE credit_refresh_runs SET paced_until = now() WHERE max_users_per_second = 1")
    with world.database.statements() as connection:
        assert delivery.record_losses(connection, scheduled=False) == 1
    assert world.value("SELECT attempts FROM credit_refresh_batches WHERE id = %s", *ids) == 1


def test_a_paced_run_is_not_rung_for_again_while_its_turns_are_taken(world: World) -> None:
    _, ids = paced(world, 3, 10)
    world.sql.execute("UPDATE credit_refresh_batches SET published_at = now() - interval '11 minutes'")
    waits(world, ids[0])
    assert world.claim(ring_again=True) == []
    world.sql.execute("UPDATE credit_refresh_runs SET paced_until = now() - interval '11 minutes'")
    assert world.claim(ring_again=True) == ids
    assert attempts(world) == [0, 0, 0]
