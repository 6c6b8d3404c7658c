"""The fit of a link: what made the times comes out again."""

from __future__ import annotations

import numpy as np
import pytest

from mpicomp.planner import Link
from mpicomp.planner.fit import Sample, fit

LINKS = [Link(50e-6, 5e-6, 1 / 117e6), Link(2e-6, 1e-6, 1 / 8e9), Link(1e-3, 20e-6, 1 / 11e6)]


def samples(link: Link, noise: float = 0.0) -> list[Sample]:
    rng = np.random.default_rng(1)
    asked = [(1, 8), (3, 24), (12, 96), *((3, 3 * 4**power) for power in range(5, 12))]
    return [
        Sample(m, n, (link.latency + (m - 1) * link.overhead + n * link.byte) * (1 + noise * rng.standard_normal()))
        for m, n in asked
    ]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-9), (0.03, 0.1)])
def test_a_known_link_is_found_again(link: Link, noise: float, tolerance: float) -> None:
    found = fit(samples(link, noise))
    assert found.byte == pytest.approx(link.byte, rel=tolerance)
    assert found.latency == pytest.approx(link.latency, rel=tolerance)
    assert found.overhead == pytest.approx(link.overhead, rel=3 * tolerance)


def test_nothing_is_negative() -> None:
    """Times that fall with the number of messages would need a negative overhead."""
    found = fit([Sample(1, 8, 2e-5), Sample(4, 32, 1e-5), Sample(1, 1e6, 1e-3), Sample(1, 4e6, 4e-3)])
    assert min(found) >= 0
    assert found.byte == pytest.approx(1e-9, rel=0.05)


def test_one_sample_is_a_latency_or_a_rate() -> None:
    link = fit([Sample(1, 8, 1e-5)])
    assert link.latency + 8 * link.byte == pytest.approx(1e-5)
    with pytest.raises(ValueError, match="nothing was timed"):
        fit([])
