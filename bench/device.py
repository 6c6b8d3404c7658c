"""The GPU that a benchmark runs on."""

from __future__ import annotations

import os
import sys
from typing import Any

from mpicomp.device import device_number


def choose() -> None:
    """Make this rank's GPU the current one; without CuPy or a GPU say so and exit with 1."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        sys.exit(
            f"--device gpu needs CuPy, as in pip install 'mpicomp[cuda12]'; it cannot be imported: {one_line(error)}"
        )
    except cupy.cuda.runtime.CUDARuntimeError as error:
        sys.exit(f"--device gpu needs a GPU, and CUDA finds none here: {one_line(error)}")
    if not count:
        sys.exit("--device gpu needs a GPU, and CUDA shows none here")
    cupy.cuda.Device(device_number(os.environ, count)).use()


def properties() -> dict[str, Any]:
    """Return CUDA's properties of the current GPU: "name", in bytes, "l2CacheSize" and more."""
    import cupy

    found: dict[str, Any] = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    return found


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks: CuPy's fill a screen."""
    return " ".join(str(error).split())
