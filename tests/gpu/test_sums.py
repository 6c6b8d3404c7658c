"""Sums and passes that only add."""

from __future__ import annotations

import pytest
from compare import normal, same


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 1027, 70_001])
def test_axpy(device, turns, dtype, size):
    same(device, "axpy", normal(size, dtype), normal(size, dtype, 1), scale=0.3, shift=size % 4)
