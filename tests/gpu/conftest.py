"""The kernels for the GPU, run on the CPU by tests/gpu/cupy_on_cpu.py."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def device() -> Iterator[Any]:
    """CuPy's stand-in, in CuPy's place for the time of a test."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels with")
    import cupy_on_cpu

    yield cupy_on_cpu.install()
    cupy_on_cpu.uninstall()


@pytest.fixture(params=[0, 1, 7], ids=["ascending", "descending", "shuffled"])
def turns(request: pytest.FixtureRequest, device: Any) -> Iterator[int]:
    """The order in which the threads of a block take turns; a kernel's results must not depend on it."""
    device.order = request.param
    yield request.param
    device.order = 0
