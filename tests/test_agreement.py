"""Fail on all ranks or on none: what agreement costs, and what each rank raises when the ranks disagree."""

from __future__ import annotations

import ctypes
import math
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from team import Team

from mpicomp.codecs import Sign
from mpicomp.comm import agreement
from mpicomp.comm.agreement import REFUSAL, agree, confirm, digest_of, float_mode, mixed, mode_text, refuse
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers import Gather
from mpicomp.registry import arithmetic

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
        assert isinstance(error, ConfigMismatchError)
        title, *lines = str(error).splitlines()
        assert title == "the ranks disagree on this operation:"
        found = {re.sub(r" \[[0-9a-f]{16}\]$", "", line) for line in lines}
        others = ", ".join(map(str, range(odd)))
        assert found == {
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
            assert [type(error) for error in errors] == [ConfigMismatchError] * ranks


def test_descriptions_that_differ_late_are_told_apart() -> None:
    """Of a description longer than what is gathered, the ranks that differ are still named."""
    late = "layout " + "w" * agreement.DESCRIPTION
    errors = Team(3).attempt(lambda comm: agree(comm, late + str(comm.rank == 1)))
    for error in errors:
        assert isinstance(error, ConfigMismatchError)
        assert "rank 1: " in str(error)
        assert "ranks 0, 2: " in str(error)


def test_a_cut_in_the_middle_of_a_character_is_harmless() -> None:
    late = "é" * agreement.DESCRIPTION
    errors = Team(2).attempt(lambda comm: agree(comm, f"{'a' * comm.rank}{late}"))
    assert [type(error) for error in errors] == [ConfigMismatchError] * 2


@pytest.mark.parametrize("refusing", [0, 2])
def test_a_rank_refuses_and_the_others_raise_its_reason(refusing: int) -> None:
    def f(comm: Comm) -> None:
        if comm.rank == refusing:
            refuse(comm, ValueError("density must be in (0, 1], got 2"))
        else:
            agree(comm, "allreduce(dense)")

    for rank, error in enumerate(Team(3).attempt(f)):
        if rank == refusing:
            assert error is None
            continue
        assert type(error) is ConfigMismatchError
        assert f"rank {refusing}: refused its arguments: density must be in (0, 1], got 2" in str(error)


def test_all_refuse() -> None:
    assert Team(3).attempt(lambda comm: refuse(comm, TypeError(str(comm.rank)))) == [None] * 3


def test_a_rank_alone_agrees_and_refuses_at_no_cost() -> None:
    team = Team(1)
    team.run(lambda comm: agree(comm, "anything"))
    team.run(lambda comm: refuse(comm, ValueError("mine")))
    assert team.comms[0].traffic.bytes == 0


@given(st.text())
def test_no_digest_is_that_of_a_refusal(text: str) -> None:
    assert 0 <= digest_of(text) < REFUSAL
    assert digest_of(text) == digest_of(text)


@given(st.integers(0, REFUSAL - 1), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_mixed_digest_is_none_of_a_refusal_and_depends_on_every_number(digest: int, step: int, number: int) -> None:
    assert 0 <= mixed(digest, step, number) < REFUSAL
    assert len({mixed(digest, step, number + more) for more in range(100)}) == 100
    assert len({mixed(digest, step + more, number) for more in range(100)}) == 100


def test_a_description_is_asked_for_only_where_ranks_disagree() -> None:
    def never() -> str:
        raise AssertionError("the description is not needed")

    Team(3).run(lambda comm: confirm(comm, 7, never))
    errors = Team(3).attempt(lambda comm: confirm(comm, 7 + comm.rank // 2, lambda: f"plan {comm.rank // 2}"))
    for error in errors:
        assert isinstance(error, ConfigMismatchError)
        assert "ranks 0, 1: plan 0" in str(error)
        assert "rank 2: plan 1" in str(error)


def test_ranks_at_different_operations_hear_of_it() -> None:
    def f(comm: Comm) -> None:
        if comm.rank == 1:
            comm.next_call()
        confirm(comm, 7, lambda: "dense")

    for error in Team(3).attempt(f):
        assert "ranks 0, 2: dense (operation 1)" in str(error)
        assert "rank 1: dense (operation 2)" in str(error)


ROUNDING = {"upward": 0x800, "downward": 0x400, "toward zero": 0xC00}  # as in fenv.h of x86


@contextmanager
def rounding(direction: str | None) -> Iterator[None]:
    """Set this thread's rounding."""
    libm = ctypes.CDLL("libm.so.6")
    assert libm.fesetround(0 if direction is None else ROUNDING[direction]) == 0
    try:
        yield
    finally:
        libm.fesetround(0)


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86_64")


@needs_x86
@pytest.mark.parametrize("direction", ROUNDING)
def test_another_rounding_on_one_rank_is_found_at_the_call(direction: str) -> None:
    def f(comm: Comm) -> None:
        agree(comm, "dense")
        with rounding(direction if comm.rank == 1 else None):
            agree(comm, "dense")

    for error in Team(3).attempt(f):
        assert isinstance(error, ConfigMismatchError)
        off = "flush-to-zero off, denormals-are-zero off, rounding"
        assert f"rank 1: dense ({off} {direction})" in str(error)
        assert f"ranks 0, 2: dense ({off} to nearest)" in str(error)


@needs_x86
def test_the_same_rounding_on_all_ranks_is_no_mismatch() -> None:
    def f(comm: Comm) -> str:
        with rounding("upward"):
            agree(comm, "dense")
            return mode_text(float_mode())

    assert Team(2).run(f) == ["flush-to-zero off, denormals-are-zero off, rounding upward"] * 2


def test_flush_to_zero_on_one_rank_is_found_at_the_call() -> None:
    torch = pytest.importorskip("torch")

    def f(comm: Comm) -> None:
        agree(comm, "dense")
        torch.set_flush_denormal(comm.rank == 1)
        try:
            with pytest.raises(ConfigMismatchError) as caught:
                agree(comm, "dense")
        finally:
            torch.set_flush_denormal(False)
        assert "rank 1: dense (flush-to-zero on, denormals-are-zero on, rounding to nearest)" in str(caught.value)
        assert "torch.set_flush_denormal" in str(caught.value)
        agree(comm, "dense")

    Team(3).run(f)


def test_what_kernels_make_of_numbers_is_found_anew_in_another_mode() -> None:
    """Or a rank that began with denormals flushed to zero would differ from others for good."""
    torch = pytest.importorskip("torch")
    torch.set_flush_denormal(True)
    try:
        flushed = arithmetic(Gather(Sign()))
    finally:
        torch.set_flush_denormal(False)
    assert arithmetic(Gather(Sign())) != flushed
