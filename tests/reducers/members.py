"""The table of members that the contract of reducers is checked over, and what all its tests need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from team import Team

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.reducers import Layout, MomentumCorrection, Reducer, State, Unit, Units, Workspace
from mpicomp.reducers.base import walk
from mpicomp.reducers.masked import exported_masks, maskable
from mpicomp.registry import parse

SIZES = [*range(1, 10), 16, 17]

CONTRACTIONS = [
    "cast(dtype=fp16)",
    "cast(dtype=bf16)",
    "topk(density=0.1)",
    "randomk(density=0.1, scaled=False)",
    "uniform(bits=1, block=32)",
    "uniform(bits=2, block=32)",
    "uniform(bits=3, block=32)",
    "uniform(bits=4, block=32)",
    "uniform(bits=8, block=32)",
    "uniform(bits=4, block=32, stochastic=True, scaled=False)",
    "sign",
]
MORE_CONTRACTIONS = [
    "fp8(format=e5m2)",
    "mxfp8",
    "mxfp4",
    "natural(block=32, scaled=False)",
    "qsgd(levels=3, bucket=32, scaled=False)",
    "dorefa(bits=3, block=32, scaled=False)",
    "ternary(scaled=False)",
    "sign(two_means=True)",
    "sign(block=32)",
    "uniform(bits=8, block=32, minmax=True)",
    "topk(density=0.1, values=bf16)",
    "blocktopk(density=0.1, block=64)",
    "randomk(density=0.2, scaled=False, values=uniform(bits=8))",
    "rotated(sign)",
    "threshold(at=1.5)",
    "sampled_topk(density=0.1)",
    "bounded(abs=0.05)",
]
"""The other families: reducers meet them at few ranks, since they differ from those above by their kernels."""
UNBIASED = ["randomk(density=0.25)", "uniform(bits=2, block=16, stochastic=True)", "cast(dtype=bf16, stochastic=True)"]

ONE_STAGE = [f"error_feedback(gather({codec}))" for codec in CONTRACTIONS]
TWO_STAGE = [f"error_feedback(two_stage({codec}))" for codec in CONTRACTIONS]
COMPRESSING = [
    *ONE_STAGE,
    *TWO_STAGE,
    "error_feedback(shared_support(randomk(density=0.1, scaled=False)))",
    "error_feedback(low_rank(rank=2))",
    "error_feedback(integer(bits=2, block=32))",
    "error_feedback(integer(block=32))",
    "error_feedback(integer(bits=4, block=32, stochastic=True))",
    "error_feedback(split(topk(density=0.1)))",
    "error_feedback(split(topk(density=0.5, values=bf16), cut=True))",
    "error_feedback(split(topk(density=0.3), dense_after=0.5, dense=uniform(bits=8, block=32)))",
    "error_feedback(tree(topk(density=0.2, values=bf16)))",
    "error_feedback(hierarchical(two_stage(topk(density=0.1))))",
    "error_feedback(masked(two_stage(uniform(bits=4, block=32))))",
    "error_feedback(joined(gather(topk(density=0.1))))",
    "error_feedback(joined(two_stage(topk(density=0.1)), normalised=True))",
]
DENSE = [
    "dense",
    "dense(algorithm=two_shot)",
    "dense(algorithm=ring)",
    "error_feedback(dense)",
    "error_feedback(dense(algorithm=ring))",
]
COMPOSED = [
    "after(error_feedback(two_stage(topk(density=0.1))), steps=3)",
    "decay(error_feedback(two_stage(sign(block=32))), factor=0.9)",
    "partition(small=dense(algorithm=two_shot), large=error_feedback(two_stage(uniform(bits=4, block=32))), "
    "min_size=30)",
    "partition(small=error_feedback(gather(sign)), "
    "large=after(error_feedback(low_rank(rank=2)), steps=2), min_size=30)",
    "momentum_correction(error_feedback(gather(topk(density=0.1))))",
    "momentum_correction(error_feedback(two_stage(topk(density=0.1, values=bf16))), momentum=0.5, nesterov=True)",
    "warmup(momentum_correction(error_feedback(two_stage(topk(density=0.1)))), densities=(0.5, 0.25), steps=2)",
    "partition(small=momentum_correction(dense(algorithm=two_shot), masking=False), "
    "large=warmup(error_feedback(tree(topk(density=0.1))), densities=(0.3,), steps=3), min_size=30)",
    "masked(dense(algorithm=two_shot))",
    "by_name({'*bias': dense(algorithm=two_shot), 'm*': error_feedback(two_stage(uniform(bits=4, block=32))), "
    "'c*': dense(algorithm=two_shot), '*': error_feedback(gather(topk(density=0.1)))})",
]
MEMBERS = COMPRESSING + DENSE + COMPOSED
REPRESENTATIVES = [
    "error_feedback(gather(topk(density=0.1)))",
    "error_feedback(gather(uniform(bits=4, block=32, stochastic=True, scaled=False)))",
    "error_feedback(two_stage(topk(density=0.1)))",
    "error_feedback(two_stage(uniform(bits=3, block=32)))",
    "error_feedback(two_stage(randomk(density=0.1, scaled=False)))",
    "error_feedback(shared_support(randomk(density=0.1, scaled=False)))",
    "error_feedback(low_rank(rank=2))",
    "error_feedback(integer(bits=4, block=32, stochastic=True))",
    "error_feedback(split(topk(density=0.1)))",
    "error_feedback(split(topk(density=0.5, values=bf16), cut=True))",
    "error_feedback(tree(topk(density=0.2, values=bf16)))",
    "error_feedback(masked(two_stage(uniform(bits=4, block=32))))",
    "error_feedback(joined(two_stage(topk(density=0.1)), normalised=True))",
    *COMPOSED,
]
"""One of each kind, for tests that take long."""

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "prime": (97,),
    "empty": (0,),
    "matrix": (13, 11),
    "one": (1,),
    "empty matrix": (0, 5),
    "conv": (3, 2, 2, 3),
    "bias": (7,),
}
"""Units of all kinds, 285 elements in all."""


def member(spec: str) -> Reducer:
    return cast(Reducer, parse(spec))


def layout_of(shapes: dict[str, tuple[int, ...]]) -> Layout:
    """Put units one after the other."""
    units, offset = [], 0
    for name, shape in shapes.items():
        units.append(Unit(name, shape, offset))
        offset += units[-1].size
    return Layout(tuple(units))


LAYOUT = layout_of(SHAPES)
FEW = layout_of({name: SHAPES[name] for name in ("empty", "prime", "one", "matrix")})
"""Fewer of them, for many ranks: their threads share two cores."""
TINY = layout_of({"three": (3,), "one": (1,), "pair": (2, 1)})
"""Six elements, fewer than there are ranks."""


def inputs(ranks: int, steps: int, size: int, dtype: str, seed: int = 0, scale: float = 1.0) -> Array:
    """Make read-only arrays, (ranks, steps, size), with some direction in common and elements of unlike magnitude."""
    rng = np.random.default_rng([seed, ranks, steps, size])
    x = rng.standard_normal((ranks, steps, size)) + rng.standard_normal(size)
    x *= np.exp(rng.standard_normal(size))
    x = (x * scale).astype(dtype)
    x.setflags(write=False)
    return x


def residual_of(reducer: Reducer, state: State) -> Array:
    """Return this rank's debt, zero where there is no feedback."""
    debt = np.zeros(state.layout.extent, state.dtype)
    exported = reducer.export(state)
    for unit in state.layout.units:
        if "residual" in exported[unit.name]:
            debt[unit.where] = exported[unit.name]["residual"]
    return debt


def corrected(reducer: Reducer, state: State, x: Array) -> Array:
    """Return what enters the sum in place of x, (n,), where a policy adds up momentum."""
    entering, exported = x.copy(), reducer.export(state)
    policies = [each for each in walk(reducer) if isinstance(each, MomentumCorrection)]
    for unit in state.layout.units:
        if "momentum" in exported[unit.name]:
            u, g, m = exported[unit.name]["momentum"], x[unit.where], x.dtype.type(policies[0].momentum)
            with np.errstate(over="ignore"):
                entering[unit.where] = m * (u + g) + g if policies[0].nesterov else m * u + g
    return entering


def masks_of(reducer: Reducer, layout: Layout) -> dict[str, Array]:
    """Make the masks of a run, (size,) bool: of every second unit that a `masked` sums a third survives."""
    able, rng = maskable(reducer, layout), np.random.default_rng(7)
    return {unit.name: rng.random(unit.size) < 1 / 3 for unit in layout.units[::2] if unit.name in able}


def begun(reducer: Reducer, layout: Layout, dtype: str, **settings: Any) -> State:
    """Return a first state, with `masks_of` where there are masks."""
    state, masks = reducer.init(layout, dtype, **settings), masks_of(reducer, layout)
    return reducer.restore(state, exported_masks(masks)) if masks else state


class History(NamedTuple):
    """What a run of several steps left: on all ranks, after every step."""

    x: Array  # (ranks, steps, n): what entered the sums
    totals: Array  # (ranks, steps, n)
    residuals: Array  # (ranks, steps + 1, n); before the first step, after the first, ...
    poisoned: Array  # (ranks, steps)
    units: list[Units]  # by rank, exported at the end
    kept: Array | bool = True  # (n,) bool, the elements that take part: what masks leave
    shares: Array | float = 1.0  # (n,): how much of an old residual counts, see `Reducer.keeps`

    @property
    def bits(self) -> list[list[bytes]]:
        """The bytes of every total, by rank and step."""
        return [[total.tobytes() for total in totals] for totals in self.totals]


def run(team: Team, reducer: Reducer, layout: Layout, x: Array, poison: Sequence[int] = (), **settings: Any) -> History:
    """Reduce x[rank, step] at all steps, on a team, where there are masks with those of `masks_of`."""

    def f(comm: Comm) -> tuple[Array, Array, Array, Array, Units]:
        return steps(comm, reducer, x[comm.rank], begun(reducer, layout, x.dtype.name, **settings))

    results = team.run(f)
    entered, totals, residuals, poisoned = (np.stack([result[part] for result in results]) for part in range(4))
    units = [result[4] for result in results]
    return History(entered, totals, residuals, poisoned, units, **taking_part(reducer, layout))


def taking_part(reducer: Reducer, layout: Layout) -> dict[str, Array]:
    """Return `kept` and `shares` of a history that began with `begun`."""
    masks, kept = masks_of(reducer, layout), np.ones(layout.extent, bool)
    for unit in layout.units:
        kept[unit.where] = masks.get(unit.name, True)
    return {"kept": kept, "shares": shares_of(reducer, layout, layout.extent)}


def shares_of(reducer: Reducer, layout: Layout, size: int) -> Array:
    """Return the share of each element's old residual that counts in a step, (size,)."""
    shares = np.ones(size)
    for unit in layout.units:
        shares[unit.where] = reducer.keeps(unit)
    return shares


def steps(comm: Comm, reducer: Reducer, x: Array, state: State) -> tuple[Array, Array, Array, Array, Units]:
    """Reduce the rows of x, (steps, n), one after the other."""
    entered = np.empty_like(x)
    totals, poisoned = np.empty_like(x), np.empty(len(x), bool)
    residuals = np.empty((len(x) + 1, x.shape[1]), x.dtype)
    residuals[0] = residual_of(reducer, state)
    work = Workspace()
    for step, row in enumerate(x):
        entered[step] = corrected(reducer, state, row)
        reduction, state = reducer.reduce(comm, row, state, work=work)
        totals[step], poisoned[step] = reduction.total, reduction.poisoned
        residuals[step + 1] = residual_of(reducer, state)
    return entered, totals, residuals, poisoned, reducer.export(state)


def check_law(history: History) -> None:
    """Check total + sum of new residuals == sum of (x + old residual) at every step, and equal totals.

    Elements that are masked are dropped: their totals and residuals are zero. A reducer that leaks says by how much: an
    old residual counts times `Reducer.keeps`.

    The error of a step may be 16 P eps (max|x| + max|residual|), and as many units of the smallest number there is.
    """
    x, totals, residuals = history.x, history.totals, history.residuals
    ranks = len(x)
    for rank in range(1, ranks):
        assert totals[rank].tobytes() == totals[0].tobytes(), f"rank {rank} has another total than rank 0"
    assert not history.poisoned.any()
    assert np.isfinite(totals).all()
    assert np.isfinite(residuals).all()
    if not x.size:
        return
    wide = np.longdouble
    received = totals[0].astype(wide) + residuals[:, 1:].astype(wide).sum(0)
    given = x.astype(wide).sum(0) * history.kept + history.shares * residuals[:, :-1].astype(wide).sum(0)
    error = np.abs(received - given).max(1)  # (steps,)
    info = np.finfo(x.dtype)
    largest = np.abs(x).max((0, 2)).astype(wide) + np.abs(residuals[:, :-1]).max((0, 2)).astype(wide)
    allowed = 16 * ranks * (info.eps * largest + info.smallest_subnormal)
    worst = int(np.argmax(error - allowed))
    assert (error <= allowed).all(), f"step {worst}: error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"


Course = tuple[list[bytes], Units]
"""What a rank is left with at the end of a run: the bytes of its totals, and its state as it is exported."""


def same_units(one: Units, two: Units) -> bool:
    return {name: sorted(kept) for name, kept in one.items()} == {
        name: sorted(kept) for name, kept in two.items()
    } and all(one[name][what].tobytes() == two[name][what].tobytes() for name in one for what in one[name])


def check_same(ones: Sequence[Course], others: Sequence[Course]) -> None:
    """Check that two runs have come to the same bits on every rank."""
    for (totals, units), (other_totals, other_units) in zip(ones, others, strict=True):
        assert totals == other_totals
        assert same_units(units, other_units)


def alike(spec: str) -> bool:
    """Whether all steps send equally many bytes."""
    return "after(" not in spec and "warmup(" not in spec


def check_bytes(team: Team, reducer: Reducer, layout: Layout, dtype: str, reductions: int) -> None:
    """Check that the bytes predicted, those the library counted, and those the team saw are the same."""
    for comm, rank in zip(team.comms, team.ranks, strict=True):
        predicted = reductions * reducer.cost(layout, dtype, comm.topology, comm.rank).nbytes
        assert (comm.traffic.counted, comm.traffic.modelled) == (rank.sent_bytes, rank.modelled_bytes)
        assert as_predicted(reducer, comm.traffic.bytes, predicted), f"rank {comm.rank}: {comm.traffic} {predicted}"


def as_predicted(reducer: Reducer, counted: int, predicted: int) -> bool:
    """Whether so many bytes were to be expected: exactly so many, or at most where sizes depend on the data."""
    return counted <= predicted if "split(" in str(reducer) or "masked" in str(reducer) else counted == predicted
