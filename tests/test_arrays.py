"""What may be compressed, and what is refused, with which words."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import MagicMock

import ml_dtypes
import numpy as np
import pytest

from mpicomp.api.accept import check_apart, checked, checked_target, overlaps_itself, whole
from mpicomp.api.arguments import bits, number, real_shape
from mpicomp.arrays import DTYPES, dtype_name, work_dtype

NUMPY_DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.complex64, np.complex128]


@pytest.mark.parametrize(("dtype", "name"), list(zip(NUMPY_DTYPES, DTYPES, strict=True)), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4)])
def test_all_floating_point_types_are_accepted(dtype: Any, name: str, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, dtype)
    assert checked(x) is x
    assert dtype_name(x) == name


def test_work_dtypes() -> None:
    assert [work_dtype(name) for name in DTYPES] == ["float32", "float32", "float32", "float64", "float32", "float64"]


@pytest.mark.parametrize(
    "dtype", [np.int32, np.uint8, bool, np.clongdouble, np.longdouble, "S3", object, "M8[s]", [("a", "f4")]]
)
def test_other_dtypes_are_refused_by_name(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"x has dtype .*float32, float16, bfloat16, float64, complex64, complex128"):
        checked(np.zeros(3, dtype))


@pytest.mark.parametrize("x", [[1.0], 1.0, None, np.float32(1)], ids=repr)
def test_other_types_are_refused_by_name(x: Any) -> None:
    with pytest.raises(TypeError, match=type(x).__name__):
        checked(x)


def test_a_tensor_is_sent_to_where_tensors_go() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"Tensor.*mpicomp\.torch\.allreduce"):
        checked(torch.zeros(3))


CUPY: Any = type("ndarray", (), {"__module__": "cupy"})


def test_a_cupy_array_is_refused_where_only_numpy_arrays_are_taken() -> None:
    with pytest.raises(TypeError, match=r"total is a CuPy array.*pass the NumPy array total\.get\(\)"):
        checked(CUPY(), "total")


def test_a_cupy_array_without_cupy_or_without_a_gpu_is_refused_with_the_reason(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ValueError, match="x is a CuPy array, and CuPy cannot be imported"):
        checked(CUPY(), device=True)
    failure = type("CUDARuntimeError", (RuntimeError,), {})
    cupy = MagicMock()
    cupy.cuda.runtime.CUDARuntimeError = failure
    cupy.cuda.runtime.getDeviceCount.side_effect = failure("cudaErrorInsufficientDriver")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(ValueError, match="no GPU can be used here: cudaErrorInsufficientDriver"):
        checked(CUPY(), device=True)


def unaligned(values: Any) -> Any:
    memory = np.zeros(len(values) * 8 + 4, np.uint8)
    x = np.frombuffer(memory, np.float64, len(values), offset=4)
    x[...] = values
    return x


ORDERS = {
    "step": np.arange(24.0).reshape(4, 6)[:, ::2],
    "transposed": np.arange(24.0).reshape(4, 6).T,
    "reversed": np.arange(6.0)[::-1],
    "stepped": np.arange(6.0)[::2],
    "unaligned": unaligned([1.0, 2.0]),
    "broadcast": np.broadcast_to(np.arange(3.0), (2, 3)),
}


@pytest.mark.parametrize("x", ORDERS.values(), ids=ORDERS)
def test_any_order_in_memory_is_taken_and_read_in_the_logical_one(x: Any) -> None:
    assert checked(x) is x
    assert not whole(x)
    flat = bits(x)
    assert whole(flat)
    assert flat.tolist() == [float(each) for each in x.flat]
    assert not np.may_share_memory(flat, x)


def test_a_contiguous_array_is_read_where_it_is() -> None:
    x = np.zeros((3, 4), np.complex64)
    assert np.shares_memory(bits(x), x)
    assert (bits(x).dtype, bits(x).shape) == (np.float32, (24,))
    for shape in ((), (3,), (2, 3), (2, 0)):
        made = np.zeros(shape, np.complex128)
        assert bits(made).size == np.prod(real_shape(shape))
        assert not shape or real_shape(shape) == made.view(np.float64).shape


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2", ">c8"])
def test_a_foreign_byte_order_is_refused_with_the_remedy(dtype: str) -> None:
    foreign = np.dtype(dtype) if np.dtype("<f4").isnative else np.dtype(dtype.replace(">", "<"))
    x = np.zeros(3, foreign)
    with pytest.raises(TypeError, match=r"byte order.*pass x\.astype\(x\.dtype\.newbyteorder\('='\)\)"):
        checked(x)
    assert checked(x.astype(x.dtype.newbyteorder("="))).dtype.isnative
    with pytest.raises(TypeError, match="byte order"):
        checked(np.zeros(3, [("a", foreign), ("b", "u1")]), exact=True)


class Subclass(np.ndarray[Any, Any]):
    pass


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (np.matrix, r"numpy\.matrix.*pass numpy\.asarray\(x\)"),
        (np.ma.MaskedArray, r"MaskedArray.*pass x\.filled\(value\)"),
        (np.recarray, r"recarray.*pass numpy\.asarray"),
        (Subclass, r"Subclass.*pass numpy\.asarray"),
    ],
)
def test_subclasses_are_refused_but_a_memmap(kind: Any, words: str, exact: bool) -> None:
    x = np.ones((2, 3))
    with pytest.raises(TypeError, match=words):
        checked(x.view(kind), exact=exact)
    taken = checked(x.view(np.memmap), exact=exact)
    assert type(taken) is np.ndarray
    assert np.shares_memory(taken, x)


@pytest.mark.parametrize("dtype", [object, [("a", "i4"), ("b", "O")], [], np.dtypes.StringDType()], ids=str)
def test_elements_that_lie_elsewhere_cannot_be_sent(dtype: Any) -> None:
    with pytest.raises(TypeError, match="not in the array itself"):
        checked(np.zeros(3, dtype), exact=True)


@pytest.mark.parametrize("dtype", [bool, "i2", "S3", "U5", "M8[ns]", "m8[s]", "V6", [("a", "i4", (2,)), ("b", "f4")]])
def test_all_other_elements_can_be_sent_as_they_are(dtype: Any) -> None:
    x = np.zeros(3, dtype)
    assert checked(x, exact=True) is x


def test_the_name_of_a_structured_dtype_tells_its_fields() -> None:
    kinds: list[Any] = [
        [("a", "i4"), ("b", "f4")],
        [("a", "f4"), ("b", "i4")],
        [("b", "i4"), ("a", "f4")],
        [("a", "i2", (2,)), ("b", "f4")],
        {"names": ["a", "b"], "formats": ["i4", "f4"], "offsets": [4, 0]},
        "V8",
        "M8[s]",
        "M8[ms]",
    ]
    assert len({dtype_name(np.zeros(1, kind)) for kind in kinds}) == len(kinds)


def test_numbers_become_arrays_without_dimensions() -> None:
    for x, dtype in (
        (3.0, "float64"),
        (3, "int64"),
        (3j, "complex128"),
        (np.float32(3), "float32"),
        (np.int8(3), "int8"),
        (ml_dtypes.bfloat16(3), "bfloat16"),
    ):
        made = number(x)
        assert (made.shape, made.dtype.name) == ((), dtype)
        assert made == x
    for x in (True, None, "3", [3.0], np.ones(3)):
        assert number(x) is x
    with pytest.raises(ValueError, match="64 bits"):
        number(2**63)


# ------------------------------------------------------------------------------------------------------------- outputs


def target(x: Any) -> None:
    checked_target(x, (2, 3), "float32", "out", "as x is")


def test_outputs_of_any_order_are_taken() -> None:
    base = np.zeros((2, 6), np.float32)
    for x in (base[:, :3], base[:, ::2], base[::-1, 3:], base.reshape(3, 4).T[:2], base[:, :3].view(np.memmap)):
        target(x)
        assert not overlaps_itself(x.shape, x.strides, x.itemsize)
    target(np.zeros((2, 3), np.float32, order="F"))
    target(np.zeros((2, 3), [("a", "u1"), ("b", "f4")])["b"])


def test_outputs_that_cannot_be_written_are_refused() -> None:
    frozen = np.zeros((2, 3), np.float32)
    frozen.setflags(write=False)
    spread = np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (2, 3), (4, 4))
    for x, kind, words in (
        (frozen, ValueError, r"out is read-only.*out\.copy\(\)"),
        (spread, ValueError, r"strides \(4, 4\) for shape \(2, 3\)"),
        (np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2, 3), (0, 0)), ValueError, "share memory"),
        (np.zeros((3, 2), np.float32), ValueError, r"float32\[2, 3\] as x is, got float32\[3, 2\]"),
        (np.zeros((2, 3), ">f4"), ValueError, "got >f4"),
        (np.zeros((2, 3)), ValueError, "got float64"),
        (np.zeros((2, 3), np.float32).view(np.matrix), TypeError, "matrix"),
        (np.ma.zeros((2, 3), np.float32), TypeError, "MaskedArray"),
        ([0.0], ValueError, "a list of 1"),
        (None, ValueError, "NoneType"),
    ):
        with pytest.raises(kind, match=words):
            target(x)


def test_outputs_must_be_apart() -> None:
    a, b = np.zeros(12), np.zeros(12)
    for over in (False, True):
        check_apart([a, b], [np.zeros(3), np.zeros(3)], over)
        check_apart([a[::2], a[1::2]], [b, b], over)  # interleaved, yet apart; inputs may be one
        check_apart([a.reshape(3, 4)[:, :2], a.reshape(3, 4)[:, 2:]], [], over)
        for outs in ([a, a], [a, a[:1]], [a[::2], a[2:5]], [b, a[:0], a, a[3:]]):
            with pytest.raises(ValueError, match=r"out\[\d\] and out\[\d\] share memory"):
                check_apart(outs, [], over)
        for outs, xs in (([a], [a[1:]]), ([b, a], [a, b]), ([a[:6], b], [b[2:4], np.zeros(2)]), ([a[::-1]], [a])):
            with pytest.raises(ValueError, match="out shares memory with x"):
                check_apart(outs, xs, over)
    check_apart([a], [a], over=True)
    check_apart([a[:], b], [a, b[:]], over=True)
    for outs, xs in (([a], [a]), ([b, a], [np.zeros(2), a])):
        with pytest.raises(ValueError, match="which is sent while out is written"):
            check_apart(outs, xs, over=False)
