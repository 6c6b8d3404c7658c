"""A codec, a reducer and a policy of a user: one class and one `register` each, and they do all that ours do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from codec_contract import check_all
from reducers import test_law, test_state
from reducers.members import LAYOUT, member
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.codecs import Codec, Key
from mpicomp.codecs.checks import check_finite, check_integer, little
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allgather, as_bytes
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.planner.explain import explain
from mpicomp.reducers import Layout, Reducer, Reduction, State, Workspace
from mpicomp.reducers.base import Level
from mpicomp.reducers.parts.state import poisoned_total
from mpicomp.reducers.policies import Wrapper
from mpicomp.registry import CODECS, REDUCERS, parse, register, resolve, resolve_partitioned
from mpicomp.wire import Field, Payload


@dataclass(frozen=True)
class Truncated(Codec):
    """Every element in the work dtype with its lowest `bits` bits cleared."""

    spec_name: ClassVar[str] = "truncated"
    contractive: ClassVar[bool] = True
    blockwise: ClassVar[bool] = True
    bits: int = 12

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 22)

    def relative_error(self, size: int) -> float:
        """See Codec."""
        return 2.0 ** (self.bits - 23)

    def fields(self, size: int, dtype: str) -> tuple[Field, ...]:
        """See Codec."""
        return (Field((size,), little(dtype)),)

    @np.errstate(over="ignore", invalid="ignore")  # infinity minus infinity
    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        total = x if old is None else x + old
        (values,) = payload
        word = np.dtype(f"u{x.itemsize}")
        values[...] = (total.view(word) >> word.type(self.bits) << word.type(self.bits)).view(x.dtype)
        if new is not None:
            new[...] = total - values
        return values.nbytes

    def _decode_add(self, payload: Payload, out: Array, key: Key, scale: float, fresh: bool) -> None:
        out += out.dtype.type(scale) * payload[0]

    def _check(self, payload: Payload, size: int) -> None:
        check_finite(payload[0], "elements")


@dataclass(frozen=True)
class Everyone(Reducer):
    """Every rank sends its array to all others as it is, and adds up all arrays in rank order."""

    spec_name: ClassVar[str] = "everyone"
    exact: ClassVar[bool] = True

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        peers, nbytes = topology.size - 1, layout.size * np.dtype(dtype).itemsize
        return Cost(nbytes * peers, rounds=1, messages=peers, work=(Work("add", layout.size * topology.size),))

    @np.errstate(over="ignore", invalid="ignore")
    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        layout = state.layout
        mine, owed = np.empty((2, layout.size), state.dtype)
        layout.collect(x, mine)
        if state.residual is not None:
            layout.collect(state.residual, owed)
            mine += owed
        rows = np.empty((comm.size, layout.size), state.dtype)
        comm.next_call()
        allgather(comm, as_bytes(mine), [as_bytes(row) for row in rows], str(self))
        total = rows[0].copy()
        for row in rows[1:]:
            total += row
        if state.spare is not None:
            if not np.isfinite(total).all():
                return poisoned_total(out, layout), state
            state.spare[...] = 0
        layout.spread(total, out)
        return Reduction(out), state.advanced()


@dataclass(frozen=True)
class Twice(Wrapper):
    """Send in two rounds: the second one sends what the first one left out, so the residual is that of the second."""

    spec_name: ClassVar[str] = "twice"
    level: ClassVar[Level] = Level.OUTER

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        """See Reducer."""
        once = self.reducer.cost(layout, dtype, topology, me, feedback)
        return once + once

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        """See Reducer."""
        work = work or Workspace(state.device)
        first, between = self.reducer.reduce(comm, x, state, out, work.inner("reducer"))
        if first.poisoned:
            return first, state
        if between.spare is not None:  # which is the residual of the state that was given
            between = replace(between, spare=between.spare.copy())
        second, after = self.reducer.reduce(comm, np.zeros_like(x), between, None, work.inner("reducer"))
        for unit in state.layout.units:
            first.total[unit.where] += second.total[unit.where]
        return first._replace(finite=False), after.at(state.step + 1)


TABLES: tuple[tuple[dict[str, Any], type], ...] = ((CODECS, Truncated), (REDUCERS, Everyone), (REDUCERS, Twice))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for _, cls in TABLES:
        register(cls)
    yield
    for table, cls in TABLES:
        del table[cls.spec_name]


@pytest.mark.parametrize("codec", [Truncated(), Truncated(bits=3)], ids=str)
def test_the_codec_passes_the_contract_of_codecs(codec: Truncated) -> None:
    check_all(
        codec,
        lambda codec, x: np.abs(x.astype(np.longdouble)) * codec.relative_error(x.size) + 2.0 ** (codec.bits - 149),
    )
    assert parse(str(codec)) == codec


FED = [
    "error_feedback(gather(truncated(bits=20)))",
    "error_feedback(two_stage(truncated(bits=20)))",
    "error_feedback(hierarchical(two_stage(truncated)))",
    "error_feedback(everyone)",
    "twice(error_feedback(gather(topk(density=0.1))))",
    "twice(error_feedback(two_stage(truncated(bits=20))))",
]
UNFED = [
    "everyone",
    "twice(everyone)",
    "partition(small=everyone, large=twice(error_feedback(low_rank(rank=2))), min_size=30)",
]
REDUCER_CHECKS = [
    test_law.test_fewer_elements_than_ranks,
    test_law.test_zeros_stay_zeros,
    test_law.test_a_layout_with_gaps_leaves_them_alone,
    test_law.test_the_total_may_be_written_over_the_input,
    test_law.test_a_total_belongs_to_the_caller,
    test_state.test_a_step_that_is_thrown_away_leaves_no_trace,
    test_state.test_exports_are_copies_by_unit_name,
    test_state.test_a_unit_that_was_not_exported_starts_at_zero,
]


@pytest.mark.parametrize("spec", FED + UNFED)
def test_reducers_of_them_pass_the_contract_of_reducers(spec: str) -> None:
    for ranks in (1, 3):
        test_law.test_sixty_steps_lose_nothing(spec=spec, ranks=ranks)
    for dtype in ("float32", "float64"):
        test_law.test_both_work_dtypes(spec=spec, dtype=dtype)
        test_state.test_a_state_moves_to_other_buckets(spec=spec, dtype=dtype)
    for shapes in ({}, {"a": (0, 3), "b": (2, 0)}):
        test_law.test_nothing_at_all(spec=spec, shapes=shapes)
    for check in REDUCER_CHECKS:
        check(**{"spec": spec, "ranks": 7} if check is test_law.test_fewer_elements_than_ranks else {"spec": spec})


@pytest.mark.parametrize("spec", FED)
def test_poison_leaves_no_trace(spec: str) -> None:
    test_state.test_poison_on_one_rank_shows_on_all_and_leaves_no_trace(spec=spec, value=np.nan, ranks=2)


@pytest.mark.parametrize("spec", ["truncated", "truncated(bits=3)", *FED, *UNFED])
def test_they_resolve_parse_print_and_explain(spec: str) -> None:
    found = parse(spec)
    assert parse(str(found)) == found
    reducer = resolve(spec, LAYOUT, "float32", 4)
    assert resolve(found, LAYOUT, "float32", 4) == reducer
    assert explain(reducer, LAYOUT, topology=4).startswith(str(reducer))
    partitioned = resolve_partitioned(spec, LAYOUT, "float32", 4)
    assert parse(str(partitioned)) == partitioned


@pytest.mark.parametrize("spec", ["truncated", *FED, *UNFED])
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_they_run_in_the_calls(spec: str, op: str) -> None:
    xs = [np.arange(600, dtype=np.float32).reshape(30, 20) * (rank + 1) for rank in range(3)]
    exact = np.sum(xs, axis=0) / (3 if op == "mean" else 1)

    def f(comm: Comm) -> list[Array]:
        memory = mpicomp.memory(spec, xs[0])
        found = [mpicomp.allreduce(comm, xs[comm.rank], spec, op, memory=memory) for _ in range(40)]
        return [found[0], np.mean(found, axis=0)]

    results = Team(3).run(f)
    assert all(one.tobytes() == results[0][0].tobytes() for one, _ in results)
    np.testing.assert_allclose(results[0][1], exact, atol=0.3 * exact.max())


def test_a_policy_in_the_wrong_place_is_refused_with_the_right_one() -> None:
    with pytest.raises(ValueError, match="error_feedback must stand inside twice") as caught:
        parse("error_feedback(twice(gather(topk(density=0.1))))")
    assert f"write {parse('twice(error_feedback(gather(topk(density=0.1))))')}" in str(caught.value)
    assert member("after(twice(everyone), steps=3)").inner == (Twice(Everyone()),)


def test_a_name_is_taken_once_and_by_a_member_only() -> None:
    with pytest.raises(ValueError, match="'truncated' is registered already"):
        register(Truncated)

    class Alias(Truncated):
        spec_name: ClassVar[str] = "bf16"

    with pytest.raises(ValueError, match="'bf16' is registered already"):
        register(Alias)
    with pytest.raises(TypeError, match="must inherit from Codec or Reducer"):
        register(Field)  # type: ignore[type-var]


def test_what_a_member_lacks_is_named_when_it_is_made() -> None:
    class Unfinished(Reducer):
        spec_name: ClassVar[str] = "unfinished"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # type: ignore[abstract]
