"""Which of several ways to reduce an array is taken, from step to step: first by prediction, then by what was measured.

A course is steered by numbers that all ranks share, predictions that rank 0 made and times agreed on, so that all ranks
turn at the same step. The time of a step is the *shortest* of all ranks': who comes early waits for the others, and
counts his waiting, but whoever came last has waited for nobody.

- The first way is the one that would be taken without a planner. At the start another one is preferred to it that is
  predicted to be faster by `DOUBT`; later only what was tried is preferred, if it was measured and is faster by
  `MARGIN`. It is gone back to as soon as it is no slower.
- A way is tried where it may be as fast, within `NEAR` of the best, and ever more rarely where it was found not to be.
  Predictions may be wrong, so what seems far from the best is tried too: once if that takes less than `FREE`, and
  later if it takes less than the share `SPEND` of the time until then; exact ways always, if they are within `FAR`.
  Measurements may be wrong, too: a way is as near as it was predicted or measured to be.
- Times are agreed on ever more rarely, and never so often that this takes more than `SHARE` of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpicomp.comm.collectives import allreduce
from mpicomp.comm.communicator import Comm

NEAR = 1.3  # times the best; higher = more is tried, at more cost
FAR = 4.0  # times the best
FREE = 0.1  # seconds
SPEND = 0.002
DOUBT = 0.15
MARGIN = 0.08  # higher = less is won, lower = noise decides
SHARE = 0.01
FIRST = 4  # steps until times are first agreed on; of those just before, SAMPLES at most count
TRIAL = 3  # steps; the first does not count: it makes buffers and meets cold caches
CONFIRM = 8  # steps of a trial that went well, before it counts: noise makes two fast steps often enough
INTERVAL, LONGEST = 16, 4096  # steps
SAMPLES = 16
KEEP = 0.5  # of an old time where a new one comes in


class Course:
    """The way taken and what is known of the others; `running` is the number of the one to take next.

    `predicted` are seconds, infinity for what is never to be taken; `agreement` is what it costs to agree, in seconds.
    The first `exact` ways lose nothing.
    """

    def __init__(self, predicted: Sequence[float], agreement: float = 0.0, exact: int = 1) -> None:
        self.predicted, self.estimates = list(predicted), list(predicted)
        self.exact = exact
        self.agreement = agreement
        fastest = min(range(len(predicted)), key=predicted.__getitem__)
        self.best = self.running = fastest if predicted[fastest] < (1 - DOUBT) * predicted[0] else 0
        self.steps = 0
        self.switches = 0
        self._waits = [0] * len(predicted)  # until which step a way is not tried again
        self._measured = [False] * len(predicted)
        self._interval = INTERVAL
        self._times: list[float] = []
        self._left = self._planned = FIRST if len(predicted) > 1 else 0

    def unwatched(self) -> bool:
        """Count a step and return true if what it takes is of no interest: then `note` is not called for it."""
        if 0 < self._left <= SAMPLES:
            return False
        self._left -= 1
        return True

    def note(self, seconds: float) -> bool:
        """Take in what a step took; return whether it is time to agree, which is so on all ranks or on none."""
        self._left -= 1
        if 0 <= self._left < SAMPLES:
            self._times.append(seconds)
        return self._left == 0

    def agree(self, comm: Comm) -> None:
        """Agree on the times since the last agreement, and decide what to do next. Collective."""
        mine = np.array(self._times)
        least = np.empty_like(mine)
        allreduce(comm, mine, least, "min")
        self.steer(least.tolist())

    def steer(self, times: Sequence[float]) -> None:
        """Decide what to do next, from the times of the last steps, on which all ranks have agreed."""
        self.steps += self._planned
        counted = sorted(times[1:] if self._planned <= FIRST else times)
        seconds = counted[(len(counted) - 1) // 4]  # what else a machine does only ever adds to a time
        if self._planned == TRIAL and self._beats_best(seconds):
            self._go_on(CONFIRM)
            return
        self._update(seconds)
        self._next()

    def _beats_best(self, seconds: float) -> bool:
        return seconds < (1 - MARGIN if self.running else 1) * self.estimates[self.best]

    def _go_on(self, steps: int) -> None:
        """Take the running way for so many steps, then agree."""
        self._left = self._planned = steps
        self._times = []

    def _update(self, seconds: float) -> None:
        here = self.running
        known = self._measured[here] and here == self.best
        self.estimates[here] = KEEP * self.estimates[here] + (1 - KEEP) * seconds if known else seconds
        self._measured[here] = True
        if here != self.best:
            distance = min(max(seconds, 1e-9) / max(self.estimates[self.best], 1e-9), 8.0)
            self._waits[here] = int((1 + max(1.0, distance)) * self.steps) + self._interval
            if self._beats_best(seconds):
                self._waits[self.best] = self._waits[here]
                self.best = here
                self.switches += 1
                self._interval = INTERVAL

    def _next(self) -> None:
        """Try the most promising way that may be tried, or go on with the best one."""
        just_tried = self.running != self.best
        rivals = [way for way in range(len(self.estimates)) if self._may_try(way, only_near=just_tried)]
        if rivals:
            self.running = min(rivals, key=self.estimates.__getitem__)
            self._go_on(TRIAL)
            return
        self.running = self.best
        seldom = self.agreement / max(SHARE * self.estimates[self.best], 1e-9)
        self._go_on(min(LONGEST, max(self._interval, math.ceil(seldom))))
        if not just_tried:
            self._interval = min(LONGEST, 2 * self._interval)

    def _may_try(self, way: int, only_near: bool) -> bool:
        """Whether a way is worth a trial now; of those that seem far from the best, one at a time is."""
        seconds, best = self.estimates[way], self.estimates[self.best]
        if way in (self.best, self.running) or self.steps < self._waits[way]:
            return False
        if min(seconds, self.predicted[way]) < NEAR * best:
            return True
        budget = max(SPEND * self.steps * best, 0.0 if self._measured[way] else FREE)
        return not only_near and (TRIAL * seconds < budget or (way < self.exact and seconds < FAR * best))
