"""low_rank on a GPU: all units of a shape in one launch, and what ranks with NumPy arrays have, to the bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from compare import equal_bytes, normal, poisoned
from reducers.members import inputs, layout_of, member
from team import Team

from mpicomp.arrays import to_device, to_host
from mpicomp.comm.communicator import Comm
from mpicomp.kernels import gpu
from mpicomp.kernels.gpu import linalg
from mpicomp.reducers import Workspace, apply
from mpicomp.reducers.parts.batches import Batches
from mpicomp.reducers.parts.factors import PerUnit

LAYOUT = layout_of(
    {
        "bias": (7,),
        "first": (12, 9),
        "tiny": (2, 2),  # two factors would not be smaller
        "other": (33, 20),
        "second": (12, 3, 3),
        "empty": (0, 5),
        "scalar": (),
        "third": (12, 9),
        "long": (1100,),
    }
)
SHAPES = 2  # of those that are factored
OTHER = next(unit.where for unit in LAYOUT.units if unit.name == "other")
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def run(spec: str, x: Any, there: list[bool], op: str = "mean") -> list[list[tuple[Any, bool, Any]]]:
    """Reduce x[rank, step] on a team, on a GPU where `there`; by rank and step: total, poisoned, and what is kept."""
    reducer, dtype = member(spec), x.dtype.name

    def f(comm: Comm) -> list[tuple[Any, bool, Any]]:
        state, found, work = reducer.init(LAYOUT, dtype), [], Workspace()
        for row in x[comm.rank]:
            given = to_device(row) if there[comm.rank] else row.copy()
            state, bad = apply(comm, reducer, given, dtype, op, state, given, work)
            found.append((to_host(given), bad, reducer.export(state)))
        return found

    return Team(len(there), seed=1).run(f)


def assert_equal(mine: Any, theirs: Any) -> None:
    for (total, bad, units), (expected, too, kept) in zip(mine, theirs, strict=True):
        assert bad == too
        equal_bytes("total", total, expected)
        assert units.keys() == kept.keys()
        for name, arrays in units.items():
            assert arrays.keys() == kept[name].keys()
            for what, array in arrays.items():
                equal_bytes(f"{what} of {name}", array, kept[name][what])


@DTYPES
@pytest.mark.parametrize("spec", ["low_rank(rank=4)", "error_feedback(low_rank(rank=4))", "low_rank(rank=1)"])
@pytest.mark.parametrize("scale", [1.0, 1e-36])
def test_a_rank_with_a_gpu_and_one_without_that_have_the_same_input(device, spec, dtype, scale):
    """All but M Q, of which both have the sum, is the same to the bit: totals, residuals, warm starts."""
    x = inputs(1, 4, LAYOUT.size, dtype, scale=scale).repeat(2, 0)
    x[:, 2] = 0
    x[:, 1, OTHER] = np.outer(normal(33, dtype), normal(20, dtype)).reshape(-1) * scale  # columns of P that are drawn
    on_gpu, on_cpu = run(spec, x, [True, False])
    assert_equal(on_gpu, on_cpu)
    kept = on_gpu[-1][2]
    assert [name for name, arrays in kept.items() if "q" in arrays] == ["first", "other", "second", "third"]
    if "feedback" in spec:
        received = sum(total for total, _, _ in on_gpu) + np.concatenate([each["residual"] for each in kept.values()])
        np.testing.assert_allclose(received, x[0].sum(0), rtol=0, atol=32 * np.finfo(dtype).eps * np.abs(x).max())


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_ranks_agree_whatever_they_have(device, op):
    """Three ranks: their number is no power of two, so that the mean is divided afterwards."""
    x = inputs(3, 3, LAYOUT.size, "float32")
    found = run("error_feedback(low_rank(rank=3))", x, [False, True, True], op)
    for rank in (1, 2):
        for (total, _, units), (expected, _, kept) in zip(found[rank], found[0], strict=True):
            equal_bytes("total", total, expected)
            assert all(units[name]["q"].tobytes() == kept[name]["q"].tobytes() for name in kept if "q" in kept[name])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["bias", "third"])
def test_poison_leaves_no_trace(device, value, place):
    spec, x = "error_feedback(low_rank(rank=2))", inputs(2, 3, LAYOUT.size, "float32").copy()
    x[1, 1, next(unit.offset for unit in LAYOUT.units if unit.name == place) + 5] = value
    for rank, clean in enumerate(run(spec, x[:, ::2], [True, True])):
        for there in ([True, True], [True, False]):
            found = run(spec, x, there)[rank]
            assert [bad for _, bad, _ in found] == [False, True, False]
            assert np.isnan(found[1][0]).all()
            if there[1]:
                assert_equal(found[::2], clean)


@pytest.mark.parametrize("feedback", [False, True])
def test_one_launch_a_shape_and_product(device, monkeypatch, feedback):
    reads: list[int] = []
    read = device.ndarray.__float__
    monkeypatch.setattr(device.ndarray, "__float__", lambda array: (reads.append(array.size), read(array))[1])
    reducer, x = member("low_rank(rank=4)"), to_device(inputs(1, 1, LAYOUT.size, "float32")[0, 0])

    def f(comm: Comm) -> None:
        state = reducer.init(LAYOUT, "float32", feedback).placed(True)
        for _ in range(2):
            device.launches.clear()
            reads.clear()
            _, state = reducer.reduce(comm, x, state)
            assert Counter(device.launches) == {
                **dict.fromkeys(("project4", "orthogonalise", "back_project8", "normalise"), SHAPES),
                "outer": SHAPES * (1 + feedback),
                "copy_parts": 2 + feedback,
            }
            assert reads == [1, 1], "numbers that the host asked for"

    Team(1).run(f)


@pytest.mark.parametrize(("value", "finite"), [(2.0**58, True), (2.0**62, False), (2.0**65, False), (2.0**127, False)])
def test_whether_sums_are_far_from_overflow_is_known(device, value, finite):
    """One column: P has multiples of it by a number below one, Q' its norm, which overflows at last."""
    x = np.zeros((33, 20), np.float32)
    x[:, 3] = value

    def f(comm: Comm) -> None:
        for device in (False, True):
            reducer, layout = member("low_rank(rank=1)"), layout_of({"x": (33, 20)})
            state = reducer.init(layout, "float32").placed(device)
            reduction, _ = reducer.reduce(comm, to_device(x.reshape(-1)) if device else x.reshape(-1), state)
            assert (reduction.finite, reduction.poisoned) == (finite, value == 2.0**127)

    Team(1).run(f)


@pytest.mark.parametrize("name", ["vector", "matrix"])
def test_a_layout_of_one_kind(device, name):
    layout, reducer = layout_of({name: {"vector": (40,), "matrix": (20, 10)}[name]}), member("low_rank(rank=2)")
    x = inputs(2, 1, layout.size, "float32")[:, 0]

    def f(comm: Comm) -> Any:
        state = reducer.init(layout, "float32", feedback=True).placed(comm.rank == 0)
        reduction, _ = reducer.reduce(comm, x[comm.rank] if comm.rank else to_device(x[0]), state)
        return to_host(reduction.total)

    one, two = Team(2).run(f)
    equal_bytes("total", one, two)


def test_what_was_exported_goes_on(device):
    reducer, x = member("error_feedback(low_rank(rank=2))"), inputs(1, 2, LAYOUT.size, "float32")[0]

    def f(comm: Comm) -> None:
        state = reducer.init(LAYOUT, "float32").placed(True)
        _, state = reducer.reduce(comm, to_device(x[0]), state)
        restored = reducer.restore(reducer.init(LAYOUT, "float32", step=1), reducer.export(state)).placed(True)
        totals = [to_host(reducer.reduce(comm, to_device(x[1]), each)[0].total) for each in (state, restored)]
        equal_bytes("total", *totals)

    Team(1).run(f)


# Sizes of Q: a warp, a block and its threads' several rounds.
EXTENTS = layout_of({f"{columns}": (2000, columns) for columns in (3, 33, 255, 257, 700)})


@DTYPES
@pytest.mark.parametrize("exponent", [-1073, -1022, -300, -148, -126, 0, 1, 4, 127, 128, 1000, 1023, 1024])
def test_normalised(device, turns, dtype, exponent):
    """Whatever the scale: what is subnormal, before or after, is rounded once, and zeros give the last Q."""
    per_unit, batches = PerUnit(EXTENTS, 2), Batches(EXTENTS, 2)
    warm = normal(per_unit.sizes[1], dtype)
    q = normal(warm.size, "float64", 1) * 2.0 ** np.random.default_rng(2).integers(-60, 0, warm.size)
    info = np.finfo(dtype)
    with np.errstate(over="ignore", under="ignore"):
        q = np.clip(np.ldexp(q / np.abs(q).max(), exponent), info.min, info.max).astype(dtype)
        small = np.ldexp(q[:600], -140 if dtype == "float32" else -1060)  # beside a large one, it underflows
    q[:600:3] = small[::3]
    q[1:600:3] = info.smallest_subnormal * np.arange(200, dtype=dtype)
    q[5:8] = -0.0
    zeros = list(per_unit.matrices.values())[1]
    q[zeros.q] = -0.0
    expected = per_unit.normalised(q, warm)
    found = batches.normalised(device.asarray(q), device.asarray(warm)).get()
    equal_bytes("Q", found, expected)
    assert np.array_equal(found[zeros.q], warm[zeros.q])


@DTYPES
@pytest.mark.parametrize("blocks", [2, 4096])
def test_copies_of_parts(device, monkeypatch, dtype, blocks):
    """Several blocks a part, and several rounds of them."""
    monkeypatch.setattr(linalg, "BLOCKS", blocks)
    sizes = np.array([1, 0, 1024, 255, 2600])
    begin = np.array([3, 4, 10, 1100, 1400]), np.array([3000, 7, 1, 2700, 30])
    x, old, out = normal(4000, dtype), normal(4000, dtype, 1), poisoned(3500, dtype)
    x[[3, 20, 30]] = np.inf, -0.0, np.finfo(dtype).smallest_subnormal
    places = tuple(device.asarray(each) for each in begin)
    for given, rest, factor in ((x, old, 1.0), (x, None, 0.25), (None, None, 1.0)):
        expected = out.copy()
        for size, source, target in zip(sizes, *begin, strict=True):
            part = slice(source, source + size)
            with np.errstate(under="ignore"):
                value = 0 if given is None else factor * (given[part] if rest is None else given[part] + rest[part])
            expected[target : target + size] = value
        there = device.asarray(out.copy())
        x_there, old_there = (None if each is None else device.asarray(each) for each in (given, rest))
        gpu.copy_all(x_there, old_there, there, places, device.asarray(sizes), 2600, factor)
        equal_bytes("copy_all", there.get(), expected)
