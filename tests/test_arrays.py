"""What may be compressed, and what is refused, with which words."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import MagicMock

import ml_dtypes
import numpy as np
import pytest

from mpicomp.arrays import DTYPES, checked, dtype_name, work_dtype

NUMPY_DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


@pytest.mark.parametrize(("dtype", "name"), list(zip(NUMPY_DTYPES, DTYPES, strict=True)), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4)])
def test_all_floating_point_types_are_accepted(dtype: Any, name: str, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, dtype)
    assert checked(x) is x
    assert dtype_name(x) == name


def test_work_dtypes() -> None:
    assert [work_dtype(name) for name in DTYPES] == ["float32", "float32", "float32", "float64"]


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.complex64, np.longdouble, "S3", object])
def test_other_dtypes_are_refused_by_name(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"x has dtype .*float32, float16, bfloat16, float64"):
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
    with pytest.raises(TypeError, match=r"total is a CuPy array.*pass total\.get\(\)"):
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
    with pytest.raises(ValueError, match="no GPU to be used here: cudaErrorInsufficientDriver"):
        checked(CUPY(), device=True)


@pytest.mark.parametrize(
    "x", [np.zeros((4, 6))[:, ::2], np.zeros((4, 6)).T, np.zeros(6)[::-1]], ids=["step", "transposed", "reversed"]
)
def test_a_non_contiguous_array_is_refused_with_the_remedy(x: Any) -> None:
    with pytest.raises(ValueError, match=r"total .*not C-contiguous.*ascontiguousarray\(total\)"):
        checked(x, "total")


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
def test_a_foreign_byte_order_is_refused_with_the_remedy(dtype: str) -> None:
    foreign = np.dtype(dtype) if np.dtype("<f4").isnative else np.dtype(dtype.replace(">", "<"))
    with pytest.raises(TypeError, match=rf"byte order.*astype\('{foreign.name}'\)"):
        checked(np.zeros(3, foreign))
