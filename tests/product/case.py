"""What a program of the suite computes with, and how it is judged: nothing here asks the library for a number.

Inputs are gathered by mpi4py on the user's communicator and summed in long double. A step is right if

- all ranks have the same bits;
- `total + sum of new residuals == sum of (input + old residual)`, where there is a residual, to rounding; under `decay`
  the old residual counts times its factor;
- the error of a sum is within the bound of its codec, and that of a mean within a P-th of it;
- what is not finite on some rank is not finite on any, and leaves the residual finite and as it was;
- a mean or a sum that the dtype holds is finite, one that it does not hold is not a number that looks right;
- the input is as it was.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from product.bounds import conserving, unit_error

from mpicomp.errors import ConfigMismatchError
from mpicomp.reducers import Layout
from mpicomp.reducers.base import walk
from mpicomp.registry import resolve

Arrays = Any  # one array or a list
REFUSALS = (ValueError, TypeError, ConfigMismatchError)
BAD = ("nan", "inf")
WIDE = np.longdouble


class Wrong(AssertionError):
    """A result is not what it must be."""


class Skip(Exception):
    """The library has not yet what this program needs."""


class Said(NamedTuple):
    """What one rank has of a step, as flat arrays by unit; residuals None where it keeps none."""

    x: list[np.ndarray]
    result: list[np.ndarray]
    old: list[np.ndarray] | None
    new: list[np.ndarray] | None


def nodes(comm: Any, how: str) -> Any:
    """Tell the library that the ranks are on one node, that each has a node, or that two share one; return comm."""
    if how != "one":
        from mpicomp.comm.communicator import Comm
        from mpicomp.comm.topology import Topology

        wide = 1 if how == "each" else 2
        ranks = range(comm.size)
        Comm.of(comm).topology = Topology(tuple(tuple(ranks[first : first + wide]) for first in ranks[::wide]))
    return comm


def flats(arrays: Arrays) -> list[np.ndarray]:
    """The arrays, flat; the parts of complex numbers side by side."""
    each = arrays if isinstance(arrays, list) else [arrays]
    return [x.reshape(-1).view(x.real.dtype) if x.dtype.kind == "c" else x.reshape(-1) for x in each]


class Case:
    """The inputs of a program by step, and the judge of its results."""

    def __init__(
        self,
        spec: str,
        op: str = "sum",
        dtype: str = "float32",
        shapes: Sequence[tuple[int, ...]] = ((97,),),
        listed: bool = False,
        data: str = "normal",
        seed: int = 0,
        memory: bool = False,
    ) -> None:
        self.spec, self.op, self.dtype = spec, op, np.dtype(dtype)
        self.shapes, self.listed, self.data, self.seed, self.memory = tuple(shapes), listed, data, seed, memory
        self.real = np.dtype(dtype).type(0).real.dtype if self.dtype.kind == "c" else self.dtype
        self.work = "float64" if self.real.itemsize == 8 else "float32"
        self.owed: list[np.ndarray] | None = None  # what the last step left, of this rank
        self.steps: list[tuple[bytes, bytes]] = []
        self.given: tuple[Any, list[bytes]] | None = None

    @property
    def like(self) -> Arrays:
        """Arrays of these shapes, and of no meaning."""
        return self.returned([np.zeros(shape, self.dtype) for shape in self.shapes])

    def returned(self, arrays: list[np.ndarray]) -> Arrays:
        return arrays if self.listed else arrays[0]

    def other(self, **changes: Any) -> Case:
        """A case that differs."""
        same = {"spec": self.spec, "op": self.op, "dtype": self.dtype.name, "shapes": self.shapes, "data": self.data}
        return Case(**{**same, "listed": self.listed, "seed": self.seed + 1, "memory": self.memory, **changes})

    def x(self, comm: Any, step: int) -> Arrays:
        """This rank's input of a step."""
        made = [self._unit(shape, number, comm, step) for number, shape in enumerate(self.shapes)]
        return self.returned(made)

    def _unit(self, shape: tuple[int, ...], number: int, comm: Any, step: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, comm.rank, step, number])
        info, parts = ml_dtypes.finfo(self.real), 2 if self.dtype.kind == "c" else 1
        size = math.prod(shape) * parts
        most, last = float(info.max), comm.rank == comm.size - 1
        # Sums are formed in float32 or float64: beyond their range they are infinite, as IEEE 754 has it.
        room = 1 if self.real.itemsize == 2 else 4 * comm.size
        near = {"near dtype": 0.7 * most / room, "near 16": min(40_000.0, 0.7 * most), "near 8": 300.0}
        x = rng.standard_normal(size)
        if self.data in near:
            x = near[self.data] * rng.uniform(0.9, 1.0, size)
        elif self.data == "zeros":
            x[...] = 0
        elif self.data == "denormal":
            x = rng.integers(-7, 8, size) * float(info.smallest_subnormal)
        elif self.data == "huge" and size and last:
            x[size // 3] = min(most / (4 * comm.size), 1e30)
        elif self.data in BAD and size and last and step == 1:
            x[size // 2] = float(self.data)
        with np.errstate(under="ignore"):
            x = x.astype(self.real)
        return (x.view(self.dtype) if parts == 2 else x).reshape(shape)

    # --------------------------------------------------------------------------------------------------- judging

    def before(self, x: Arrays) -> Arrays:
        """Note what an input is, so that `check` sees whether it stays so; return it."""
        self.given = (x, [part.tobytes() for part in flats(x)])
        return x

    def check(self, comm: Any, x: Arrays, result: Arrays, old: Arrays | None = None, new: Arrays | None = None) -> None:
        """Judge a step, by all ranks alike: raises Wrong on all or on none. Collective on the user's communicator."""
        mine = self._said(x, result, old, new)
        changed = self.given is not None and self.given[0] is x and [p.tobytes() for p in flats(x)] != self.given[1]
        lost = self.owed is not None and (mine.old is None or not _same(mine.old, self.owed))
        everyone = comm.gather((mine, changed, lost), 0)
        self.owed = mine.new
        self.steps.append((b"".join(part.tobytes() for part in mine.result), _bytes(mine.new)))
        verdict = comm.bcast(
            self._verdict(everyone) if comm.rank == 0 else "", 0
        )  # one judges, the others have no core
        if verdict:
            raise Wrong(verdict)

    def _verdict(self, everyone: list[tuple[Said, bool, bool]]) -> str:
        """What is wrong with what all ranks say; "" for nothing."""
        if any(changed for _, changed, _ in everyone):
            return "the input was changed"
        if any(lost for *_, lost in everyone):
            return "the residual is not the one that the last step left"
        try:
            self._judge([said for said, *_ in everyone], len(everyone))
        except Wrong as wrong:
            return str(wrong)
        except Exception as error:  # the other ranks wait for a verdict
            return f"the judge failed: {type(error).__name__}: {error}"
        return ""

    def _said(self, x: Arrays, result: Arrays, old: Arrays | None, new: Arrays | None) -> Said:
        if isinstance(result, list) != self.listed or len(flats(result)) != len(self.shapes):
            raise Wrong(f"{type(result).__name__} for {'a list' if self.listed else 'an array'}")
        for given, found in zip(x if self.listed else [x], result if self.listed else [result], strict=True):
            if (given.shape, given.dtype) != (found.shape, found.dtype):
                raise Wrong(f"{found.dtype}{found.shape} for {given.dtype}{given.shape}")
        of_new = None if new is None else flats(new)
        nothing = None if of_new is None else [np.zeros_like(part) for part in of_new]
        return Said(flats(x), flats(result), nothing if old is None else flats(old), of_new)

    def _judge(self, ranks: list[Said], size: int) -> None:
        count = len(self.shapes)
        for rank, said in enumerate(ranks):
            for unit in range(count):
                if said.result[unit].tobytes() != ranks[0].result[unit].tobytes():
                    raise Wrong(f"rank {rank} has other bits than rank 0")
            if (said.new is None) != (ranks[0].new is None):
                raise Wrong(f"rank {rank} has {'no' if said.new is None else 'a'} residual, rank 0 not so")
            if said.new is not None and not all(np.isfinite(part).all() for part in said.new):
                raise Wrong(f"the residual of rank {rank} is not finite")
        judged = [self._unit_of(ranks, unit, size) for unit in range(count)]
        excused = any(unit.excused for unit in judged)  # some element may be no number, and so may be all
        spoiled = any(not unit.finite.all() for unit in judged)
        for unit in judged:
            unit.judge(excused, spoiled)

    def _unit_of(self, ranks: list[Said], unit: int, size: int) -> Unit:
        xs = np.stack([said.x[unit] for said in ranks]).astype(WIDE)
        result = ranks[0].result[unit].astype(WIDE)
        if ranks[0].new is None:
            debts = None
        else:
            debts = tuple(
                np.stack([part[unit] for part in (said.old, said.new)]) for said in ranks if said.old and said.new
            )
        layout = Layout.of({str(number): shape for number, shape in enumerate(self.shapes)})
        member = resolve(self.spec, layout, self.real.name, size, memory=self.memory)
        joined = any(each.joins_units for each in walk(member))
        whole = _joined(ranks) if joined else None
        return Unit(self, member, xs, result, debts, size, member.keeps(layout.units[unit]), whole)


class Unit:
    """One array of a step, on all ranks."""

    def __init__(
        self, case: Case, member: Any, xs: Any, result: Any, debts: Any, size: int, keeps: float, whole: Any = None
    ) -> None:
        """`whole`, (ranks, n): what all units hold, where they are encoded as one."""
        self.case, self.xs, self.result, self.size = case, xs, result, size
        self.divisor = size if case.op == "mean" else 1
        self.old, self.new = (None, None) if debts is None else (np.stack([d[k] for d in debts]) for k in (0, 1))
        self.feedback = debts is not None and bool(self.old.any() or self.new.any())
        given = xs if debts is None else xs + keeps * self.old.astype(WIDE)
        self.bad = ~np.isfinite(given).all(0)
        given = np.where(np.isfinite(given), given, 0)
        self.total = given.sum(0)
        self.debt = 0 if debts is None else keeps * self.old.astype(WIDE).sum(0)
        self.finite = np.isfinite(result)
        self.conserves = conserving(member)
        work, info = np.finfo(case.work), ml_dtypes.finfo(case.real)
        tops = [float(top) for top in np.abs(given).max(1, initial=0)]
        sizes = np.abs(np.where(np.isfinite(xs), xs, 0)).max(initial=0)
        debt = 0 if debts is None else np.abs(self.old).max(initial=0)
        self.law = 16 * size * (WIDE(work.eps) * (sizes + WIDE(debt)) + WIDE(work.smallest_subnormal))
        self.rounding: Any = 0  # of a sum to its dtype
        if case.real.itemsize < 4:
            least = WIDE(float(info.smallest_subnormal))
            self.rounding = np.abs(self.total) * WIDE(float(info.eps)) + self.divisor * least
        reached = xs if whole is None else whole
        tops = tops if whole is None else [float(top) for top in np.abs(whole).max(1, initial=0)]
        loss = unit_error(member, tops, reached.shape[1], size, self.divisor, case.work)
        self.bound = WIDE(loss) + self.law
        reach = np.abs(given).sum(0).max(initial=0) / self.divisor + self.bound / self.divisor
        self.excused = bool(self.bad.any()) or bool(reach >= WIDE(float(info.max)) * (1 - WIDE(float(info.eps))))

    def judge(self, excused: bool, spoiled: bool) -> None:
        """Raise Wrong for what is not right; `excused`: not all has to be finite; `spoiled`: not all is."""
        if self.finite[self.bad].any():
            raise Wrong(f"element {_first(self.bad & self.finite)} is finite, and an input of it is not")
        if not self.finite.all() and not excused:
            place = _first(~self.finite)
            wanted = float(self.total[place] / self.divisor)
            found = float(self.result[place])
            raise Wrong(f"not finite: element {place} is {found}, the {self.case.op} is {wanted:.6g}")
        received = np.where(self.finite, self.result, 0) * self.divisor
        errors = [
            np.abs(received - total) for total in (self.total, self.total - self.debt)
        ]  # `after` waits with debts
        error = np.where(self.finite & ~self._saturated(), np.minimum(*errors), 0)
        self._raise_beyond("the bound", error, self.bound + self.rounding)
        if self.new is None or not self.conserves:
            return
        kept = (self.new == self.old).all(0)
        if not kept[~self.finite].all():
            raise Wrong(f"element {_first(~kept & ~self.finite)} is not finite, and its residual has changed")
        error = np.abs(received + self.new.astype(WIDE).sum(0) - self.total)
        error = np.where(self.finite & ~(kept & spoiled), error, 0)
        self._raise_beyond("the law", error, self.law + (0 if self.feedback else self.rounding))

    def _saturated(self) -> Any:
        """Which elements may be the largest number of their dtype, since a residual has the rest: the law tells."""
        if not (self.case.memory or "error_feedback" in self.case.spec):
            return np.zeros_like(self.finite)
        most = float(ml_dtypes.finfo(self.case.real).max)
        return (np.abs(self.result) == most) & (np.abs(self.total) >= most * self.divisor)

    def _raise_beyond(self, what: str, error: Any, allowed: Any) -> None:
        beyond = error > allowed
        if beyond.any():
            place = int(np.argmax(np.where(beyond, error, -1)))
            limit = float(np.broadcast_to(allowed, error.shape)[place])
            wanted, found = float(self.total[place] / self.divisor), float(self.result[place])
            raise Wrong(
                f"{what}: element {place} of {error.size}: the {self.case.op} is {wanted:.7g}, the result {found:.7g}; "
                f"off by {float(error[place]):.3g} of the sum, allowed {limit:.3g}"
            )


def _joined(ranks: list[Said]) -> Any:
    """What the ranks hold in all units, residuals included and what is not finite left out, (ranks, n)."""
    given = [np.concatenate(said.x).astype(WIDE) for said in ranks]
    for x, said in zip(given, ranks, strict=True):
        if said.old is not None:
            x += np.concatenate(said.old)
    return np.stack([np.where(np.isfinite(x), x, 0) for x in given])


def _first(where: Any) -> int:
    return int(np.flatnonzero(where)[0])


def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _bytes(parts: list[np.ndarray] | None) -> bytes:
    return b"" if parts is None else b"".join(part.tobytes() for part in parts)


# ------------------------------------------------------------------------------------------- what happens between steps


def bad_call(case: Case, comm: Any, kind: str) -> tuple[Arrays, str, str]:
    """Arguments (x, spec, op) of a call that one rank, the last, makes wrong, or differently from the others."""
    x, wrong = case.x(comm, 0), comm.rank == comm.size - 1
    if not wrong:
        return x, case.spec, case.op
    if kind == "op":
        return x, case.spec, "median"
    if kind == "spec":
        return x, "tpk(density=0.1)", case.op
    shapes, dtype = (case.shapes, np.int64) if kind == "dtype" else ([(7,) for _ in case.shapes], case.dtype)
    return case.returned([np.zeros(shape, dtype) for shape in shapes]), case.spec, case.op


def refused(comm: Any, call: Callable[[], object]) -> None:
    """Make sure that a call is refused on all ranks."""
    outcome = _attempt(call)
    found: list[str] = comm.allgather(type(outcome).__name__ if isinstance(outcome, Exception) else "")
    if not isinstance(outcome, (*REFUSALS, type(None))):
        raise outcome
    if not all(found):
        raise Wrong(f"the ranks {[rank for rank, name in enumerate(found) if not name]} refuse nothing, others {found}")


def right_or_refused(comm: Any, other: Any, call: Callable[[], object]) -> bool:
    """Make sure that a use on another communicator is right, or refused on all its ranks; return whether refused."""
    outcome = _attempt(call)
    refusal = isinstance(outcome, REFUSALS) and not isinstance(outcome, Wrong)
    alike = other.allgather(refusal)
    said = f"{type(outcome).__name__}: {outcome}" if outcome is not None else ""
    if outcome is not None and not refusal:
        verdict = said
    elif len(set(alike)) > 1:
        verdict = f"refused by some ranks only: {alike}: {said}"
    else:
        verdict = ""
    verdicts = [each for each in comm.allgather(verdict) if each]
    if verdicts:
        raise Wrong(f"on another communicator: {verdicts[0]}")
    return refusal


def _attempt(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def need(thing: Any, *names: str) -> None:
    """Raise Skip where the library has not yet what a program needs."""
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise Skip(f"{type(thing).__name__} has no {', '.join(missing)}")


def seed_of(text: str) -> int:
    """A number for a program's data, the same in every process."""
    return zlib.crc32(text.encode())


__all__ = ["Case", "Skip", "Wrong", "bad_call", "need", "nodes", "refused", "right_or_refused", "seed_of"]
