"""Which way is taken: the fastest in the end, whatever was predicted, and without wavering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from team import Team

from mpicomp.comm.communicator import Comm
from mpicomp.planner.course import LONGEST, MARGIN, Course


def sail(
    course: Course, truth: Sequence[float], steps: int, noise: float = 0.0, seed: int = 0
) -> tuple[list[int], int]:
    """Take steps that last as long as `truth` says; return the ways taken, and how often times were agreed on."""
    rng, times, taken, agreed = np.random.default_rng(seed), [], [], 0
    for _ in range(steps):
        taken.append(course.running)
        times.append(truth[course.running] * float(np.exp(noise * abs(rng.standard_normal()))))
        if course.note(times[-1]):
            agreed += 1
            course.steer(times[-len(course._times) :])
    return taken, agreed


@pytest.mark.parametrize(
    ("predicted", "truth", "best"),
    [
        ([1, 2, 3], [1, 2, 3], 0),
        ([3, 1, 2], [3, 1, 2], 1),
        ([1, 1.2, 3], [1, 0.7, 3], 1),  # tried since near
        ([1, 3], [4, 3], 1),  # predicted far too well
        ([1, 1.1, 1.2], [1.5, 1.4, 1], 2),
        ([1.2, 1, 5], [1, 10, 5], 0),
        ([1.1, 1, 1], [1.02, 1, 1], 0),  # the first is left for what is faster by far
    ],
)
def test_the_fastest_is_found(predicted: list[float], truth: list[float], best: int) -> None:
    for noise in (0.0, 0.1, 0.3):
        course = Course([each * 1e-3 for each in predicted], 1e-5)
        taken, _ = sail(course, [each * 1e-3 for each in truth], 300, noise)
        assert course.best == best
        assert taken[-200:].count(best) > 180


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_a_wrong_prediction_is_found_out_sooner_where_that_costs_little(scale: float) -> None:
    """A way that is half as long, but was predicted to be 20 times as long."""
    course = Course([scale, 20 * scale], 1e-5)
    taken, _ = sail(course, [scale, scale / 2], 50)
    assert (1 in taken) == (scale < 1)
    sail(course, [scale, scale / 2], 50_000)
    assert course.best == 1


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_equal_ways_do_not_alternate(noise: float) -> None:
    switches = []
    for seed in range(20):
        course = Course([1e-3, 1e-3, 1e-3], 1e-5)
        sail(course, [1e-3, 1e-3 * (1 - MARGIN / 2), 1e-3], 2000, noise, seed)
        switches.append(course.switches)
    assert np.mean(switches) < 2


@pytest.mark.parametrize("slower", [1.05, 1.15, 1.29, 3.0, 10.0])
def test_trials_and_agreements_cost_little(slower: float) -> None:
    """In the long run, and at the 50th step already in the median."""
    truth, agreement = [1e-3, slower * 1e-3, slower * 1e-3, 5e-3, 50e-3], 1e-4
    course = Course([1e-3, 1.05e-3, 1.2e-3, 5e-3, 50e-3], agreement)
    taken, agreed = sail(course, truth, 10_000)
    assert sum(truth[way] for way in taken) + agreed * agreement < 1.02 * 10_000 * truth[0]
    assert taken[:50].count(0) > 35


def test_tiny_steps_are_seldom_agreed_on() -> None:
    _, agreed = sail(Course([1e-5, 9e-5], 2e-5), [1e-5, 9e-5], 10_000)
    assert agreed <= 3 + 10_000 // 200
    _, agreed = sail(Course([0.0, 0.0], 2e-5), [0.0, 0.0], 10 * LONGEST)
    assert agreed < 30


def test_a_machine_that_changes_is_followed() -> None:
    course = Course([1e-3, 1.2e-3], 1e-5)
    sail(course, [1e-3, 1.2e-3], 500)
    assert course.best == 0
    sail(course, [3e-3, 1.2e-3], 3000)
    assert course.best == 1


def test_one_way_is_never_questioned() -> None:
    taken, agreed = sail(Course([1.0]), [1.0], 1000)
    assert (set(taken), agreed) == ({0}, 0)


def test_ranks_that_see_other_times_take_the_same_way() -> None:
    """Some wait for others, and one lies; what counts is the shortest time of every step."""

    def f(comm: Comm) -> list[int]:
        rng, course, taken = np.random.default_rng(comm.rank), Course([1e-3, 1.1e-3, 1.2e-3], 1e-5), []
        for _ in range(200):
            taken.append(course.running)
            if course.note([1.5e-3, 1e-3, 0.5e-3][course.running] * (1 + comm.rank * rng.random())):
                course.agree(comm)
        return taken

    results = Team(4).run(f)
    assert results[1:] == results[:-1]
    assert results[0][-1] == 2
