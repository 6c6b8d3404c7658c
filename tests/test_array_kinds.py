"""Every kind of array in every collective, over a team: right against NumPy, or refused on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
from array_kinds import CALLS, REFUSED, TAKEN, Case, cases, run_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from team import Team

SAME_EVERYWHERE = ("allreduce", "iallreduce", "mean", "plan", "allgather", "bcast")


def run(case: Case) -> None:
    results = Team(len(case.kinds)).run(lambda comm: run_case(comm, case))
    if case.call in SAME_EVERYWHERE:
        assert len(set(results)) == 1, "the ranks have other bits"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.integers(1, 3).flatmap(lambda ranks: cases(ranks, bad=False)))
def test_what_is_taken_is_right(case: Case) -> None:
    run(case)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.integers(1, 3).flatmap(lambda ranks: cases(ranks, bad=True)))
def test_what_is_refused_is_refused_by_all_ranks(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", TAKEN)
def test_each_kind_in_each_call(call: str, kind: str) -> None:
    """Also where no example of hypothesis comes by; the ranks have arrays in different orders."""
    for method, dtype in (("dense", "complex64"), ("bf16", "float32"), ("topk(density=1.0)", "float16")):
        outs = (kind, "none") if call == "gather" else (kind, "fortran")
        for listed in (False, True):
            run(Case(call, method, dtype, (3, 4), (kind, "contiguous"), outs, listed, 1))


@pytest.mark.parametrize("call", [call for call in CALLS if call != "plan"])
@pytest.mark.parametrize("kind", REFUSED)
def test_each_refused_kind_in_each_call(call: str, kind: str) -> None:
    for method in ("dense", "topk(density=1.0)"):
        for kinds in (("contiguous", kind), (kind, "contiguous")):
            run(Case(call, method, "float32", (3, 4), kinds, ("none", "none"), False, 1))


def test_the_oracle_finds_a_wrong_order(monkeypatch: Any) -> None:
    """The test can fail: with the memory's order in place of the logical one it does."""
    from mpicomp.api import reductions

    monkeypatch.setattr(reductions, "bits", lambda x: x.ravel(order="K"))
    with pytest.raises(AssertionError):
        run(Case("allreduce", "dense", "float32", (3, 4), ("fortran", "contiguous"), ("none", "none"), False, 1))
