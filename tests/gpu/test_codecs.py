"""Every codec gives the same bytes on a GPU as on the CPU."""

from __future__ import annotations

import pytest
from codec_members import ON_GPU
from codecs_on_both import check_same_bytes
from compare import normal


@pytest.mark.parametrize("size", [1, 700, 4099])
@pytest.mark.parametrize("codec", ON_GPU, ids=str)
def test_every_codec(device, codec, size):
    check_same_bytes(codec, normal(size, "float32", seed=size))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ON_GPU, ids=str)
def test_every_codec_in_double_precision(device, codec):
    check_same_bytes(codec, normal(1500, "float64", seed=1))


@pytest.mark.parametrize("codec", ON_GPU, ids=str)
def test_nothing(device, codec):
    check_same_bytes(codec, normal(0))
