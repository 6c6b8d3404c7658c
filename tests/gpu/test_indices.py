"""Bitmaps and Elias-Fano codes of ascending indices, and their way back."""

from __future__ import annotations

import numpy as np
import pytest
from compare import normal, poisoned, same

from mpicomp.codecs.indices import nbytes, width
from mpicomp.kernels import cpu, gpu

CASES = [  # size, k
    *[(1, 1), (7, 7), (8, 1), (31, 5), (33, 33), (64, 64), (257, 3), (1000, 1), (70_000, 7)],
    *[(8192, 4096), (8193, 2000), (20_000, 20_000), (50_000, 257), (1_200_000, 700), (2**32 - 5, 1000)],
]


def chosen(size, k, seed=0):
    generator = np.random.default_rng(seed)
    if size > 10**7:
        found = np.unique(generator.integers(0, size, 2 * k))[:k]
    else:
        found = np.sort(generator.choice(size, k, replace=False))
    found[-1] = size - 1 if k % 2 else found[-1]
    return found.astype(np.uint32)


@pytest.mark.parametrize(("size", "k"), CASES)
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_elias_fano(device, size, k, shift):
    indices = chosen(size, k)
    _, (_, code) = same(
        device, "encode_elias_fano", indices, width(size, k), poisoned(nbytes("elias_fano", size, k), "u1"), shift=shift
    )
    if size < 10**7:
        for dtype in ("float32", "float64"):
            same(
                device, "add_elias_fano", code, width(size, k), normal(k, dtype), normal(size, dtype), 0.3, shift=shift
            )


@pytest.mark.parametrize("w", [0, 1, 2, 7, 16, 30, 31])
@pytest.mark.parametrize("shift", [0, 1])
def test_every_width(device, w, shift):
    indices = (np.sort(np.random.default_rng(1).choice(5000, 300, replace=False)).astype(np.uint64) << 17) >> (31 - w)
    indices = np.unique(indices % 2**32).astype(np.uint32)
    indices = indices[indices >> w < 20_000]
    size = -(-indices.size * w // 8) + -(-(indices.size + (int(indices[-1]) >> w)) // 8)
    _, (_, code) = same(device, "encode_elias_fano", indices, w, poisoned(size, "u1"), shift=shift)
    if indices[-1] < 10**7:
        same(device, "add_elias_fano", code, w, normal(indices.size), normal(int(indices[-1]) + 1), shift=shift)


@pytest.mark.parametrize(("size", "k"), [case for case in CASES if case[0] < 10**6])
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_bitmap(device, size, k, shift):
    indices = chosen(size, k)
    _, (_, code) = same(device, "encode_bitmap", indices, poisoned(-(-size // 8), "u1"), shift=shift)
    same(device, "add_bitmap", code, normal(k), normal(size), shift=shift)


def test_long_bitmap(device, monkeypatch):
    monkeypatch.setattr(gpu.indices, "LONG", 1)
    for size, k in ((100_000, 30_000), (32_768, 5), (32_767, 32_767)):
        for shift in (0, 3):
            same(device, "encode_bitmap", chosen(size, k), poisoned(-(-size // 8), "u1"), shift=shift)


def test_no_barrier_is_missing(device, turns):
    indices = chosen(30_000, 9000)
    _, (_, code) = same(device, "encode_elias_fano", indices, 2, poisoned(9000 * 2 // 8 + 2063, "u1"))
    same(device, "add_elias_fano", code, 2, normal(9000), normal(30_000))


def test_nothing(device):
    none, values = np.empty(0, np.uint32), np.empty(0, np.float32)
    same(device, "add_bitmap", np.zeros(9, np.uint8), values, normal(70))
    same(device, "add_elias_fano", none.view(np.uint8), 0, values, normal(70))
    same(device, "encode_bitmap", none, poisoned(5, "u1"))


def test_the_cpu_reads_what_the_gpu_writes(device):
    indices, out = chosen(40_000, 3000), device.empty(nbytes("elias_fano", 40_000, 3000), "u1")
    gpu.encode_elias_fano(device.asarray(indices), width(40_000, 3000), out)
    back = np.empty(3000, np.uint32)
    cpu.decode_elias_fano(out.get(), width(40_000, 3000), back)
    assert (back == indices).all()
