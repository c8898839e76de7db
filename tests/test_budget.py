"""Whole pieces of work in the time that is left: none is begun, or gone on with, that cannot end."""

import math
import time as real

import pytest

from bagssl import budget
from bagssl.errors import DoesNotFit, InputError


class Clock:
    """Time that passes when somebody sleeps, and not otherwise."""

    def __init__(self):
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """A rehearsal's clock, for a box that is gone in 60 seconds; nothing is known of its rates."""
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    monkeypatch.setattr(budget, "_rates", {})
    monkeypatch.setenv("BAGSSL_WHOLE", "1")
    monkeypatch.setenv("BAGSSL_DEADLINE", "1060")
    monkeypatch.setenv("BAGSSL_PACE", "10")
    return clock


def work(units: int, cost="a", step: int = 5, **options) -> None:
    with budget.piece("the work", cost, units, **options) as told:
        for done in range(step, units + 1, step):
            told(done)


@pytest.mark.parametrize("units, fits", [(500, True), (540, True), (560, False), (5000, False)])
def test_the_first_seconds_tell_what_cannot_end(clock, units, fits):
    """At 10 a second 60 seconds are 600 units, or 545 with the margin."""
    if fits:
        work(units)
        assert clock.now == 1000 + units / 10
        return
    with pytest.raises(DoesNotFit, match=r"the work takes \d+ s more, and 57 s are left"):
        work(units)
    assert clock.now <= 1000 + budget.FIRST + 1.0, "no more than its first seconds is lost"
    with pytest.raises(DoesNotFit):  # of what costs the same, not even these
        work(units)
    assert clock.now <= 1000 + budget.FIRST + 1.0
    work(50, cost="b")
    work(50)


def test_what_warms_up_is_judged_by_what_comes_after(clock):
    """Ten seconds until the first unit, as a compiler takes; then 10 a second."""
    with budget.piece("the work", "a", 400) as told:
        clock.sleep(10)
        for done in range(1, 401):
            clock.now += 0.1
            told(done)
    assert clock.now == pytest.approx(1050)
    with pytest.raises(DoesNotFit, match="takes 50 s more, and 10 s are left"):
        work(400)


def test_work_that_slows_down_is_given_up_at_the_deadline(clock):
    with pytest.raises(DoesNotFit, match="has not ended in time"), budget.piece("the work", "a", 500) as told:
        for done in range(5, 500, 5):
            clock.sleep(3 if done > 200 else 0)
            told(done)
    assert 1060 < clock.now < 1064


def test_work_that_cannot_tell_is_tried_on_a_sample(clock):
    tried = []

    def trial() -> float:
        tried.append(1)
        return 0.2  # seconds a unit

    with pytest.raises(DoesNotFit, match="takes 80 s more, and 60 s are left"):
        work(400, trial=trial)
    work(100, step=100, trial=trial)
    assert len(tried) == 1 and budget._rates["a"] == 0.1, "what was measured replaces what was tried"


def test_the_device_is_waited_for_once(clock):
    waits = []
    work(500, wait=lambda: waits.append(clock.now))
    assert len(waits) == 2 and waits[0] < 1004 and waits[1] == 1050, "before the rate is believed, and at the end"


def test_elsewhere_nothing_is_judged_slowed_down_or_waited_for(clock, monkeypatch):
    monkeypatch.delenv("BAGSSL_WHOLE")
    work(10_000, wait=lambda: 1 / 0, trial=lambda: 1 / 0)
    assert clock.now == 1000 and not budget._rates
    monkeypatch.setenv("BAGSSL_WHOLE", "1")
    work(0, wait=lambda: 1 / 0)


def test_without_a_deadline_everything_fits(clock, monkeypatch):
    monkeypatch.delenv("BAGSSL_DEADLINE")
    work(10_000)
    assert clock.now == 2000


def test_the_deadline_is_the_nearer_of_two(monkeypatch):
    monkeypatch.delenv("BAGSSL_DEADLINE", raising=False)
    assert budget.deadline() == math.inf
    assert 99 < budget.deadline(100) - real.monotonic() <= 100
    monkeypatch.setenv("BAGSSL_DEADLINE", str(real.time() + 50))
    assert 49 < budget.deadline(100) - real.monotonic() < 51 and 9 < budget.deadline(10) - real.monotonic() <= 10
    monkeypatch.setenv("BAGSSL_DEADLINE", "noon")
    with pytest.raises(InputError, match="BAGSSL_DEADLINE = 'noon'"):
        budget.deadline()


def test_there_must_be_time_for_what_makes_a_piece_useful_as_well(clock):
    with pytest.raises(DoesNotFit, match="takes 8"):
        work(400, more=500)
    work(400, more=100, cost="b")
    assert budget._rates["b"] == 0.1, "the rate is that of the piece alone"


def test_of_what_nothing_is_known_nothing_is_begun_in_the_last_seconds(clock):
    clock.sleep(59)
    with pytest.raises(DoesNotFit, match="was not begun, 1 s are left"):
        work(5)
    budget._rates["a"] = 0.1
    work(5)
