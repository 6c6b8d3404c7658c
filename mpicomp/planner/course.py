"""Which of several candidates reduces an array, from step to step: first by predicted times, then by measured ones.

Decisions depend on numbers that all ranks share, rank 0's predictions and the times on which the ranks agree, so all
ranks change at the same step. The time of a step is the *shortest* of all ranks: the time of every other rank includes
the wait for the last one.

- Candidate 0 is the default. At the start another one is preferred if it is predicted to be faster by `DOUBT`, later
  only if it was measured to be faster by `MARGIN`. The default is taken again as soon as it is no slower.
- A candidate is tried if its time may be within `NEAR` of the best, and the more rarely the slower it was. Predictions
  may be wrong, so slower candidates are tried too: once if a trial takes less than `FREE`, and later if it takes less
  than the share `SPEND` of the time so far; exact ones whenever they are within `FAR`. Measurements may be wrong, too:
  the lower of the predicted and the measured time counts.
- Agreements become rarer with time, and never take more than `SHARE` of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce

NEAR = 1.3  # times the best time; higher = more trials, at more cost
FAR = 4.0  # times the best time
FREE = 0.1  # seconds
SPEND = 0.002  # share of the time
DOUBT = 0.15  # share of the default's time
MARGIN = 0.08  # share of the best time; higher = less is won, lower = noise decides
SHARE = 0.01  # of the time
FIRST = 4  # steps until the first agreement
TRIAL = 3  # steps; the first one does not count: it makes buffers and finds cold caches
CONFIRM = 8  # further steps that confirm a fast trial: noise often makes two fast steps
INTERVAL, LONGEST = 16, 4096  # steps between agreements, at first and at most
SAMPLES = 16  # steps before an agreement whose times count
KEEP = 0.5  # weight of the old estimate when a new time comes in


class Course:
    """The candidate that runs, `running`, and the times of all.

    `predicted` has seconds per step, infinity for a candidate that must not run; `agreement` is the time of an
    agreement in seconds. The first `exact` candidates lose nothing.
    """

    def __init__(self, predicted: Sequence[float], agreement: float = 0.0, exact: int = 1) -> None:
        self.predicted, self.estimates = list(predicted), list(predicted)
        self.exact = exact
        self.agreement = agreement
        fastest = min(range(len(predicted)), key=predicted.__getitem__)
        self.best = self.running = fastest if predicted[fastest] < (1 - DOUBT) * predicted[0] else 0
        self.steps = 0
        self.switches = 0
        self._waits = [0] * len(predicted)  # the step until which a candidate is not tried again
        self._measured = [False] * len(predicted)
        self._interval = INTERVAL
        self._times: list[float] = []
        self._left = self._planned = FIRST if len(predicted) > 1 else 0

    def resume(self, number: int) -> None:
        """Begin with the candidate that ran before a restart, unless a step was measured here or it cannot run here."""
        if not self.steps and not self._times and self.predicted[number] < math.inf:
            self.best = self.running = number

    def unwatched(self) -> bool:
        """Count a step; return whether its time does not count, so that `note` is not called for it."""
        if 0 < self._left <= SAMPLES:
            return False
        self._left -= 1
        return True

    def note(self, seconds: float) -> bool:
        """Add the time of a step; return whether the ranks must agree now, the same on all of them."""
        self._left -= 1
        if 0 <= self._left < SAMPLES:
            self._times.append(seconds)
        return self._left == 0

    def agree(self, comm: Comm) -> None:
        """Agree on the times since the last agreement, and decide what runs next. Collective."""
        mine = np.array(self._times)
        least = np.empty_like(mine)
        allreduce(comm, mine, least, "min")
        self.steer(least.tolist())

    def steer(self, times: Sequence[float]) -> None:
        """Decide what runs next, from the times of the last steps, on which all ranks have agreed."""
        self.steps += self._planned
        counted = sorted(times[1:] if self._planned <= FIRST else times)
        seconds = counted[(len(counted) - 1) // 4]  # other load on the machine only adds to a time
        if self._planned == TRIAL and self._beats_best(seconds):
            self._go_on(CONFIRM)
            return
        self._update(seconds)
        self._next()

    def _beats_best(self, seconds: float) -> bool:
        return seconds < (1 - MARGIN if self.running else 1) * self.estimates[self.best]

    def _go_on(self, steps: int) -> None:
        """Run the same candidate for so many steps, then agree."""
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
        """Try the most promising candidate that may be tried, or go on with the best one."""
        just_tried = self.running != self.best
        rivals = [number for number in range(len(self.estimates)) if self._may_try(number, only_near=just_tried)]
        if rivals:
            self.running = min(rivals, key=self.estimates.__getitem__)
            self._go_on(TRIAL)
            return
        self.running = self.best
        seldom = self.agreement / max(SHARE * self.estimates[self.best], 1e-9)
        self._go_on(min(LONGEST, max(self._interval, math.ceil(seldom))))
        if not just_tried:
            self._interval = min(LONGEST, 2 * self._interval)

    def _may_try(self, number: int, only_near: bool) -> bool:
        """Whether a candidate is worth a trial now; of the slow ones, one at a time."""
        seconds, best = self.estimates[number], self.estimates[self.best]
        if number in (self.best, self.running) or self.steps < self._waits[number]:
            return False
        if min(seconds, self.predicted[number]) < NEAR * best:
            return True
        budget = max(SPEND * self.steps * best, 0.0 if self._measured[number] else FREE)
        return not only_near and (TRIAL * seconds < budget or (number < self.exact and seconds < FAR * best))
