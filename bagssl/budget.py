"""Time that is limited: when work must stop, and which pieces of it can still end.

Work stops at a deadline ($BAGSSL_DEADLINE). On a machine that stays, a training stops there with a checkpoint. On one
that is gone afterwards ($BAGSSL_WHOLE, set by `reproduce --whole`) what has not ended is lost: no training, embedding
or probe is then begun, or gone on with after its first seconds, that cannot end. What it takes is judged by the rate of
those seconds, and of whatever cost the same before.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Hashable, Iterator

from bagssl.errors import DoesNotFit, InputError

FIRST = 2.0  # seconds in which a piece shows its rate, after its first step has warmed up
MARGIN = 1.1  # rates vary
_rates: dict[Hashable, float] = {}  # what costs the same -> seconds per unit, in this process


def deadline(time_limit: float | None = None) -> float:
    """When to stop, on the monotonic clock: the other one may be set meanwhile. Infinity for no limit.

    Raises InputError for a $BAGSSL_DEADLINE that is no Unix time.
    """
    named = os.environ.get("BAGSSL_DEADLINE") or "inf"
    try:
        left = float(named) - time.time()
        if math.isnan(left):
            raise ValueError
        return time.monotonic() + min(left, math.inf if time_limit is None else time_limit)
    except ValueError:
        raise InputError(f"BAGSSL_DEADLINE = {named!r} is not a Unix time in seconds") from None


@contextlib.contextmanager
def piece(label: str, cost: Hashable, units: int, wait: Callable[[], object] = lambda: None,
          trial: Callable[[], float] | None = None, more: int = 0) -> Iterator[Callable[[int], None]]:
    """Around work of so many units (crops, images): yields what is to be told how many are done.

    cost: where it is equal, a unit takes equally long. wait: for the device, before a rate is believed. trial: for work
    that cannot tell, the seconds that a unit of a sample takes. more: units that must follow for these to be of use:
    there must be time for them as well. Raises DoesNotFit where pieces must be whole and this one cannot end in time;
    elsewhere it does nothing.
    """
    if not os.environ.get("BAGSSL_WHOLE") or units <= 0:
        yield lambda done: None
        return
    if trial and cost not in _rates:
        _rates[cost] = trial()
    work = _Piece(label, cost, units + more, wait)
    if cost in _rates:
        work.judge((units + more) * _rates[cost])
    elif (left := work.end - time.monotonic()) < FIRST:
        raise DoesNotFit(f"{label} was not begun, {max(left, 0):.0f} s are left")
    yield work.told
    _slow_down(work.begun, units)
    wait()
    _rates[cost] = (time.monotonic() - work.begun) / units


class _Piece:
    def __init__(self, label: str, cost: Hashable, units: int, wait: Callable[[], object]):
        self.label, self.cost, self.units, self.wait = label, cost, units, wait
        self.end, self.begun = deadline(), time.monotonic()
        self.warm: tuple[float, int] | None = None  # when the first step had been done, and how many units with it
        self.judged = False

    def judge(self, seconds: float) -> None:
        left = max(self.end - time.monotonic(), 0)
        if seconds * MARGIN > left:
            raise DoesNotFit(f"{self.label} takes {seconds:.0f} s more, and {left:.0f} s are left")

    def told(self, done: int) -> None:
        _slow_down(self.begun, done)
        now = time.monotonic()
        if now > self.end:
            raise DoesNotFit(f"{self.label} has not ended in time")
        if self.warm is None:
            self.warm = now, done
        elif not self.judged and now - self.warm[0] > FIRST:
            self.wait()
            rate = (time.monotonic() - self.warm[0]) / max(done - self.warm[1], 1)
            _rates[self.cost] = rate  # for the next of its kind, should this one not fit
            self.judge((self.units - done) * rate)
            self.judged = True


def _slow_down(begun: float, done: int) -> None:
    """In a rehearsal: no more than $BAGSSL_PACE units a second, so that time runs out as on a larger task."""
    if pace := float(os.environ.get("BAGSSL_PACE") or 0):
        time.sleep(max(0.0, begun + done / pace - time.monotonic()))
