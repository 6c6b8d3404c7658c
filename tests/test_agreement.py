"""Fail on all ranks or on none: what agreement costs, and what each rank raises when the ranks part ways."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from team import Team

from mpicomp import agreement
from mpicomp.agreement import REFUSAL, agree, digest_of
from mpicomp.collectives import Comm
from mpicomp.errors import ConfigMismatch

SIZES = [*range(1, 10), 16, 17]


@pytest.mark.parametrize("ranks", SIZES)
def test_agreement_costs_sixteen_bytes(ranks: int) -> None:
    team = Team(ranks)
    team.run(lambda comm: agree(comm, "allreduce(dense), 7 float32, sum"))
    expected = math.ceil(2 * 16 * (ranks - 1) / ranks)
    assert [comm.traffic.bytes for comm in team.comms] == [expected] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 9, 17])
def test_all_ranks_raise_and_name_those_that_differ(ranks: int) -> None:
    odd = ranks - 1

    def f(comm: Comm) -> None:
        agree(comm, "topk(density=0.1)" if comm.rank == odd else "topk(density=0.01)")

    for error in Team(ranks).attempt(f):
        assert isinstance(error, ConfigMismatch)
        title, *lines = str(error).splitlines()
        assert title == "the ranks disagree on this operation:"
        said = {re.sub(r" \[[0-9a-f]{16}\]$", "", line) for line in lines}
        others = ", ".join(map(str, range(odd)))
        assert said == {
            f"  rank {odd}: topk(density=0.1)",
            f"  rank{'s' if odd > 1 else ''} {others}: topk(density=0.01)",
        }


def test_a_long_list_of_ranks_is_cut() -> None:
    errors = Team(24).attempt(lambda comm: agree(comm, "a" if comm.rank else "b"))
    text = str(errors[5])
    assert "rank 0: b" in text
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 and 7 more: a" in text


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_any_difference_is_seen(ranks: int) -> None:
    """The maximum of (digest, ~digest) shows every disagreement, whichever digest is larger."""
    for odd in range(ranks):
        for text in ("x", "y", "a longer one", ""):
            errors = Team(ranks).attempt(
                lambda comm, odd=odd, text=text: agree(comm, text if comm.rank == odd else "-")
            )
            assert [type(error) for error in errors] == [ConfigMismatch] * ranks


def test_descriptions_that_differ_late_are_told_apart() -> None:
    """Of a description longer than what is gathered, the ranks that differ are still named."""
    late = "layout " + "w" * agreement.DESCRIPTION
    errors = Team(3).attempt(lambda comm: agree(comm, late + str(comm.rank == 1)))
    for error in errors:
        assert isinstance(error, ConfigMismatch)
        assert "rank 1: " in str(error)
        assert "ranks 0, 2: " in str(error)


def test_a_cut_in_the_middle_of_a_character_is_harmless() -> None:
    late = "é" * agreement.DESCRIPTION
    errors = Team(2).attempt(lambda comm: agree(comm, f"{'a' * comm.rank}{late}"))
    assert [type(error) for error in errors] == [ConfigMismatch] * 2


@pytest.mark.parametrize("refusing", [0, 2])
def test_a_rank_that_refuses_raises_its_own_error_and_the_others_hear_why(refusing: int) -> None:
    def f(comm: Comm) -> None:
        agree(
            comm, "allreduce(dense)", ValueError("density must be in (0, 1], got 2") if comm.rank == refusing else None
        )

    errors = Team(3).attempt(f)
    for rank, error in enumerate(errors):
        assert type(error) is (ValueError if rank == refusing else ConfigMismatch)
        assert "density must be in (0, 1], got 2" in str(error)
        assert rank == refusing or f"rank {refusing}: refused its arguments" in str(error)


def test_all_refuse() -> None:
    errors = Team(3).attempt(lambda comm: agree(comm, "", TypeError(str(comm.rank))))
    assert [str(error) for error in errors] == ["0", "1", "2"]
    assert all(isinstance(error, TypeError) for error in errors)


def test_a_rank_alone_agrees_and_refuses_at_no_cost() -> None:
    team = Team(1)
    team.run(lambda comm: agree(comm, "anything"))
    with pytest.raises(ValueError, match="mine"):
        team.run(lambda comm: agree(comm, "anything", ValueError("mine")))
    assert team.comms[0].traffic.bytes == 0


@given(st.text())
def test_no_digest_is_that_of_a_refusal(text: str) -> None:
    assert 0 <= digest_of(text) < REFUSAL
    assert digest_of(text) == digest_of(text)
