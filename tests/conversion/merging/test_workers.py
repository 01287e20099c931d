import time

import pytest

from conversion.merging.workers import InTurn, Workers


def test_turns_are_taken_in_the_order_of_the_items():
    """Whoever comes first; each thing has an order of its own."""
    turns, seen = InTurn(), {"a": [], "b": []}

    def work(number: int) -> None:
        time.sleep(0.01 * (number % 3 == 0))
        for what, order in seen.items():
            with turns.turn(what, number):
                order.append(number)

    Workers(4, turns.stop).for_each(work, range(12))
    assert seen == {"a": [*range(12)], "b": [*range(12)]}


def test_nobody_waits_for_a_thread_that_failed():
    turns = InTurn()

    def work(number: int) -> None:
        if number == 0:
            time.sleep(0.05)
            raise ValueError("no")
        with turns.turn("a", number):
            pass

    with pytest.raises(ValueError, match="no"):
        Workers(3, turns.stop).for_each(work, range(9))
