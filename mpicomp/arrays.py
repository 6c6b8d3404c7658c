"""The only place that tells one array library from another, and the half types from the rest.

Work arrays and residuals are float32, float64 where the input is float64. Half types enter as their bits, since
Numba has no float16 on the CPU and NumPy has no bfloat16: `widen` and `narrow` convert by integer arithmetic.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""The element types that may be compressed."""


def work_dtype(dtype: str) -> str:
    """Name of the dtype in which an input of `dtype` is summed."""
    return "float64" if dtype == "float64" else "float32"


def dtype_name(x: Array) -> str:
    """Name of the dtype of `x`; bfloat16 is recognised by name, whoever defined it (ml_dtypes, JAX)."""
    return str(x.dtype.name)


def checked(x: Any, what: str = "x") -> Array:
    """Return `x` if it may be compressed.

    Raises TypeError for what is no array or no floating-point array, ValueError for one whose memory cannot be sent.
    """
    if type(x).__module__.partition(".")[0] == "cupy":
        raise TypeError(f"{what} is a CuPy array; this version reduces NumPy arrays and torch CPU tensors")
    if not isinstance(x, np.ndarray):
        raise TypeError(
            f"{what} must be a NumPy array, got {type(x).__name__}; for a tensor use mpicomp.torch.allreduce"
        )
    if dtype_name(x) not in DTYPES:
        raise TypeError(f"{what} has dtype {x.dtype}; only {', '.join(DTYPES)} can be compressed")
    check_memory(x, what)
    return x


def check_memory(x: Array, what: str = "x") -> None:
    """Raise ValueError for an array that is not contiguous, TypeError for one of foreign byte order."""
    if not x.flags.c_contiguous:
        raise ValueError(f"{what} of shape {x.shape} is not C-contiguous; pass numpy.ascontiguousarray({what})")
    if not x.dtype.isnative:
        raise TypeError(
            f"{what} of dtype {x.dtype} has not this machine's byte order; pass {what}.astype('{x.dtype.name}')"
        )
