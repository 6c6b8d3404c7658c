"""Each kernel against what NumPy says."""

from __future__ import annotations

import inspect
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from golden import reference

from mpicomp.codecs import Key
from mpicomp.codecs.bounded import settings
from mpicomp.codecs.checks import packed_bytes
from mpicomp.kernels import HostKernels, Kernels, cpu, gpu, host_kernels, kernels_for
from mpicomp.kernels.shared import Code

KERNELS = host_kernels(np.empty(0))
DTYPES = ("float32", "float64")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(size, dtype="float32", seed=0):
    x = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    x.flags.writeable = False
    return x


def test_only_arrays_of_numpy_and_cupy_have_kernels():
    with pytest.raises(TypeError, match=r"NumPy and CuPy arrays only, got builtins\.list"):
        kernels_for([1.0])


def declared(protocol):
    return {name for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"} - {
        "__init__"
    }


def test_every_kernel_is_declared_documented_and_implemented():
    """mypy compares the signatures that the modules have with the declared ones; the names are compared here."""
    common, host = declared(Kernels), declared(HostKernels)
    for protocol in (Kernels, HostKernels):
        assert all(getattr(protocol, name).__doc__ for name in declared(protocol))
    for module, names in ((cpu, common | host), (gpu, common)):
        assert names <= vars(module).keys()
    assert host.isdisjoint(vars(gpu))
    of_many = {name for name, member in vars(gpu).items() if inspect.isfunction(member)} - common
    assert all(name.endswith("_all") and getattr(gpu, name).__doc__ for name in of_many)


def test_the_gpu_has_no_kernels_of_the_host_alone():
    class Elsewhere:
        __module__ = "cupy"

    with pytest.raises(TypeError, match=r"NumPy arrays only, got cupy\.Elsewhere; copy it to the host first"):
        host_kernels(Elsewhere())


def test_the_kernels_of_the_gpu_load_no_compiler_of_the_cpu():
    code = "import sys, mpicomp.kernels.gpu; print(*{'numba', 'cupy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
@every_dtype
def test_momentum_adds_up(size, dtype):
    x, u = normal(size, dtype), normal(size, dtype, 1)
    m, new, ahead = x.dtype.type(0.9), np.empty_like(x), np.empty_like(x)
    KERNELS.correct(x, u, new, None, 0.9)
    assert np.array_equal(new, m * u + x)
    KERNELS.correct(x, u, new, ahead, 0.9)
    assert np.array_equal(new, m * (u + x))
    assert np.array_equal(ahead, new + x)


# ------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_widen_reads_all_65536_numbers(name):
    bits = np.arange(65_536).astype(np.uint16)
    out = np.empty(bits.size, np.float32)
    KERNELS.widen(bits, out, name)
    with np.errstate(invalid="ignore"):
        expected = bits.view(np.float16 if name == "float16" else ml_dtypes.bfloat16).astype(np.float32)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.isnan(out), ~numbers)
    assert np.array_equal(out[numbers].view(np.uint32), expected[numbers].view(np.uint32))
    back = np.empty_like(bits)
    KERNELS.narrow(out, None, None, back, name)
    assert np.array_equal(back[numbers], bits[numbers])
    again = np.empty_like(out)
    KERNELS.widen(back, again, name)
    assert np.isnan(again[~numbers]).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@every_dtype
def test_narrow_rounds_to_the_nearest_and_saturates(name, dtype):
    half = np.dtype(np.float16) if name == "float16" else np.dtype(ml_dtypes.bfloat16)
    exact = np.arange(0x7C00 if name == "float16" else 0x7F80).astype(np.uint16).view(half).astype(dtype)
    middle = exact[1:] / 2 + exact[:-1] / 2
    x = np.concatenate(
        [middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), normal(5000, dtype) * 1e-3]
    )
    x = np.concatenate([x, -x])
    bits = np.empty(x.size, np.uint16)
    KERNELS.narrow(x, None, None, bits, name)
    with np.errstate(over="ignore"):
        expected = x.astype(half).view(np.uint16)
    largest = 0x7BFF if name == "float16" else 0x7F7F
    over = (expected & 0x7FFF) > largest
    if name == "float16" or dtype == "float32":  # ml_dtypes rounds float64 to bfloat16 twice
        assert np.array_equal(bits[~over], expected[~over])
    assert ((bits[over] & 0x7FFF) == largest).all()
    special = np.array([np.inf, -np.inf, np.nan, np.finfo(dtype).max, -np.finfo(dtype).max, -0.0], dtype)
    bits, out = np.empty(6, np.uint16), np.empty(6, np.float32)
    KERNELS.narrow(special, None, None, bits, name)
    KERNELS.widen(bits, out, name)
    top = float(exact[-1])
    np.testing.assert_array_equal(out, np.array([np.inf, -np.inf, np.nan, top, -top, -0.0], np.float32))


def test_float64_is_rounded_once():
    tie = 1.0 + 2.0**-11  # half way between two float16 numbers; float32 cannot tell what follows from it
    x = np.array([tie, tie + 2.0**-40, tie - 2.0**-40, 2.0**-25, 2.0**-25 * (1 + 2.0**-40), 1e300, 5e-324])
    bits, out = np.empty(x.size, np.uint16), np.empty(x.size)
    KERNELS.narrow(x, None, None, bits, "float16")
    KERNELS.widen(bits, out, "float16")
    assert out.tolist() == [1.0, 1.0 + 2.0**-10, 1.0, 0.0, 2.0**-24, 65504.0, 0.0]


def test_unknown_half_type_is_refused():
    with pytest.raises(ValueError, match="float16 or bfloat16, got float8"):
        KERNELS.narrow(normal(3), None, None, np.empty(3, np.uint16), "float8")


# ------------------------------------------------------------------------------------------------------------ sums


@every_dtype
def test_nonfinite_sees_every_place(dtype):
    for size in (0, 1, 15, 16, 17, 1023, 1025, 3000):
        x = normal(size, dtype)
        assert not KERNELS.nonfinite(x)
        assert not KERNELS.nonfinite(x, x)
        for place in {0, size // 2, size - 1} if size else ():
            for bad in (np.nan, np.inf, -np.inf):
                y = x.copy()
                y[place] = bad
                assert KERNELS.nonfinite(y)
                assert KERNELS.nonfinite(x, y)
                assert KERNELS.nonfinite(y, x)
    big = np.full(3, np.finfo(dtype).max, dtype)
    assert not KERNELS.nonfinite(big)
    assert KERNELS.nonfinite(big, big)


@every_dtype
def test_sums_are_taken_by_the_written_tree(dtype):
    for size in (0, 1, 2, 7, 1000, 1024, 1025, 5000, 3 * 1024 * 1024 + 5):
        x = normal(size, dtype)
        wide = np.abs(x.astype(np.float64))
        assert KERNELS.moments(x, None, np.inf, 1.0) == (reference.total(wide), reference.total(wide * wide))


@every_dtype
def test_axpy(dtype):
    x, y = normal(1000, dtype), normal(1000, dtype, 1)
    out = y.copy()
    KERNELS.axpy(x, out, -0.5)
    assert np.array_equal(out, y + x.dtype.type(-0.5) * x)


# ------------------------------------------------------------------------------------------------------- selection


def test_gather_scatter_and_put():
    x, old = normal(500), normal(500, seed=1)
    places = np.array([0, 7, 499], np.uint32)
    out = normal(500, seed=2).copy()
    expected = out.copy()
    expected[places] += np.float32(0.5) * x[places]
    KERNELS.scatter_add(places, x[places], out, 0.5)
    assert np.array_equal(out, expected)
    KERNELS.put_at(places, np.zeros(3, np.float32), out)
    assert not out[places].any()
    assert np.count_nonzero(out) == 497
    values, new = np.empty(3, np.float32), np.empty(500, np.float32)
    KERNELS.gather(x, None, None, places, values, 2.0)
    assert np.array_equal(values, 2 * x[places])
    KERNELS.gather(x, old, new, places, values, 3.0)
    assert np.array_equal(values, np.float32(3) * (x + old)[places])
    expected = x + old
    expected[places] -= values
    assert np.array_equal(new, expected)


# ------------------------------------------------------------------------------------------------------ randomness


def test_supports_are_those_of_the_reference():
    for size, k in ((1, 1), (10, 0), (10, 3), (10, 10), (64, 40), (65, 60), (129, 1), (1000, 500)):
        for start in (0, 8, 2**40):
            expected = reference.support(size, k, 12345, start)
            assert KERNELS.random_support(size, k, 12345, start).tolist() == expected


def test_supports_are_uniform():
    """Chi-squared over the 20 subsets of 3 out of 6, and over places of 40 out of 100; 6 sigma."""
    counts: dict[tuple[int, ...], int] = {}
    for base in range(4000):
        subset = tuple(KERNELS.random_support(6, 3, base).tolist())
        counts[subset] = counts.get(subset, 0) + 1
    assert len(counts) == 20
    chi = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi < 19 + 6 * np.sqrt(2 * 19)
    hits = np.zeros(100)
    for base in range(2000):
        hits[KERNELS.random_support(100, 40, base)] += 1
    assert (np.abs(hits - 800) < 6 * np.sqrt(2000 * 0.4 * 0.6)).all()


@every_dtype
def test_fill_uniform(dtype):
    out = np.empty(20_000, dtype)
    KERNELS.fill_uniform(out, 2**64 - 5)
    expected = [(reference.draw(2**64 - 5, i) >> 40) * 2.0**-23 - 1.0 for i in range(100)]
    assert out[:100].tolist() == expected
    assert out.min() >= -1
    assert out.max() < 1
    assert abs(out.mean()) < 5 / np.sqrt(3 * out.size)
    assert abs(out.std() * np.sqrt(3) - 1) < 0.02


def test_key_base_is_the_written_hash():
    key = Key(*reference.KEY.values())
    assert key.base() == reference.base_of(**reference.KEY)
    assert key.base() == key._replace(start=0).base()
    assert len({key._replace(**{name: 5}).base() for name in ("seed", "step", "stream", "stage", "rank")}) == 5
    assert Key(seed=-1).base() == Key(seed=2**64 - 1).base()


# --------------------------------------------------------------------------------------------------- linear algebra


def columns(m, r, dtype):
    info = np.finfo(dtype)
    p = normal((m, r), dtype)
    yield p
    yield np.zeros_like(p)
    yield np.ones_like(p)
    yield p * info.smallest_subnormal
    yield p * info.smallest_normal
    yield p / np.abs(p).max() * info.max
    yield p[:, :1] * np.arange(1, r + 1, dtype=dtype)
    yield p[:, :1] + p * 10 * info.eps  # nearly parallel
    yield p * 10.0 ** (np.arange(r) * 7 - 14).astype(dtype)


@every_dtype
@pytest.mark.parametrize(("m", "r"), [(1, 1), (2, 2), (7, 3), (3, 7), (300, 8), (1025, 4), (5000, 2)])
def test_orthogonalise_gives_orthonormal_columns_whatever_comes_in(dtype, m, r):
    expected = np.diag((np.arange(r) < m).astype(float))
    for p in columns(m, r, dtype):
        q = np.ascontiguousarray(p).copy()
        KERNELS.orthogonalise(q, 99)
        gram = q.T.astype(np.longdouble) @ q.astype(np.longdouble)
        assert np.abs(gram - expected).max() <= 4 * np.finfo(dtype).eps
        again = np.ascontiguousarray(p).copy()
        KERNELS.orthogonalise(again, 99)
        assert np.array_equal(q, again)


@every_dtype
def test_orthogonalise_keeps_the_span(dtype):
    p = normal((200, 5), dtype)
    q = p.copy()
    KERNELS.orthogonalise(q, 1)
    left = p - q @ (q.T @ p)
    assert np.abs(left).max() < 100 * np.finfo(dtype).eps
    assert (np.diag(q.T @ p) > 0).all()


def test_orthogonalise_ends_on_nan():
    for bad in (np.nan, np.inf):
        p = normal((20, 3)).copy()
        p[3, 1] = bad
        KERNELS.orthogonalise(p, 1)
    KERNELS.orthogonalise(np.empty((0, 3), np.float32), 1)


@every_dtype
@pytest.mark.parametrize("r", [0, 1, 3, 4, 5, 9])
def test_outer_add_sums_in_the_written_order(dtype, r):
    p, q = normal((13, r), dtype), normal((2500, r), dtype, 1)
    out = normal((13, 2500), dtype, 2).copy()
    scale = out.dtype.type(-0.3)
    total = np.zeros_like(out)
    for t in range(r):
        total += (scale * p[:, t])[:, None] * q[:, t][None, :]
    expected = out + total
    KERNELS.outer_add(p, q, out, -0.3)
    assert np.array_equal(out, expected)


@every_dtype
@pytest.mark.parametrize("r", [1, 3, 4, 5, 8])
def test_outer_is_outer_add_to_zeros(dtype, r):
    for m, n in ((0, 5), (1, 1), (37, 1100)):
        p, q = normal(m * r, dtype).reshape(m, r), normal(n * r, dtype, seed=1).reshape(n, r)
        out, expected = np.full((m, n), np.nan, dtype), np.zeros((m, n), dtype)
        KERNELS.outer(p, q, out)
        KERNELS.outer_add(p, q, expected, 1.0)
        assert out.tobytes() == expected.tobytes()


@every_dtype
@pytest.mark.parametrize("r", [1, 4, 5])
def test_back_project_is_a_product_with_the_transpose(dtype, r):
    for m, n in ((1, 1), (3, 1030), (37, 50), (64, 2048)):
        x, p = normal(m * n, dtype).reshape(m, n), normal(m * r, dtype, seed=1).reshape(m, r)
        q = np.full((n, r), np.nan, dtype)
        KERNELS.back_project(x, p, q)
        expected = x.astype(np.longdouble).T @ p.astype(np.longdouble)
        np.testing.assert_allclose(q, expected, rtol=0, atol=64 * np.finfo(dtype).eps * max(1, m) ** 0.5 * 4)
        again = np.empty_like(q)
        KERNELS.back_project(x, p, again)
        assert again.tobytes() == q.tobytes()


@every_dtype
def test_divide_divides_and_sees_every_place(dtype):
    for size in (0, 1, 7, 1025):
        x = normal(size, dtype).copy()
        expected = x / x.dtype.type(3)
        assert KERNELS.divide(x, 3)
        assert x.tobytes() == expected.tobytes()
        for place in {0, size // 2, size - 1} if size else ():
            for bad in (np.nan, np.inf, -np.inf):
                x = normal(size, dtype).copy()
                x[place] = bad
                assert not KERNELS.divide(x, 3)


# ------------------------------------------------------------------------------- checks of messages from outside


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_valid(bits):
    size, block, levels = 256 * 2 + 41, 256, (1 << bits) - 1
    packed = np.zeros(packed_bytes(size, bits, block), np.uint8)
    scales = np.empty(3, np.float32)
    how = Code("odd", bits, block, "largest", levels)
    KERNELS.encode_blocks(normal(size), None, None, scales, None, packed, how)
    codes = unpacked(packed, size, bits, block)
    assert {0, levels} <= set(codes)
    for bound in range(max(0, levels - 3), levels + 1):
        assert KERNELS.codes_valid(packed, size, bits, block, 0, bound) == (codes.max() <= bound)
    signed = np.where(codes > levels // 2, codes - levels - 1, codes)
    for bound in range(levels // 2 - 1, levels // 2 + 2) if bits > 1 else ():
        expected = np.abs(signed).max() <= bound
        assert KERNELS.codes_valid(packed, size, bits, block, -bound, bound) == expected
    packed[-1] |= 0x80  # the padding
    assert not KERNELS.codes_valid(packed, size, bits, block, 0, levels)
    assert KERNELS.codes_valid(packed[:0], 0, bits, block, 0, levels)


def unpacked(packed, size, bits, block):
    """The codes, read as mpicomp/kernels/cpu/pack.py writes them down."""
    codes = []
    for first in range(0, size, block):
        length = min(block, size - first)
        whole = -(-length // 8) * 8
        data = packed[first * bits // 8 : (first + whole) * bits // 8]
        found = np.zeros(whole, int)
        known = 0
        for width in (8,) if bits == 8 else (4, 2, 1):
            if not bits & width:
                continue
            plane, data = data[: whole * width // 8], data[whole * width // 8 :]
            for t in range(8 // width):
                found[t * plane.size : (t + 1) * plane.size] |= ((plane >> (t * width)) & ((1 << width) - 1)) << known
            known += width
        codes.append(found[:length])
    return np.concatenate(codes)


@every_dtype
@pytest.mark.parametrize("limits", [(1e-3, None), (None, 1e-3)], ids=str)
def test_damaged_blocks_within_a_bound_are_found(dtype, limits):
    bound, x = settings(*limits, dtype), normal(4096, dtype)
    headers, words = np.empty(16, np.uint8), np.empty(x.size, f"u{x.itemsize}")
    count = KERNELS.encode_bounded(x, None, None, headers, words, bound)
    per = 8 // words.itemsize
    padded = np.concatenate([words[:count], np.zeros(2, words.dtype)])
    answers = [KERNELS.bounded_valid(headers, padded[: count + more], x.size, bound) for more in (-1, 0, 1, 2)]
    assert answers == [False, True, per > 1, False]
    found = []
    same_width = [64 * mode + headers[0] % 64 for mode in (1, 2, 3)]
    for header in (2, 63, 64 + 8 * words.itemsize, *same_width):
        damaged = headers.copy()
        damaged[0] = header
        found.append(KERNELS.bounded_valid(damaged, words[:count], x.size, bound))
    assert found[:3] == [False] * 3
    assert any(found[3:])
    for bad in (np.nan, np.inf):
        wrong = x.copy()
        wrong[300] = bad
        count = KERNELS.encode_bounded(wrong, None, None, headers, words, bound)
        assert not KERNELS.bounded_valid(headers, words[:count], x.size, bound)
    empty = np.empty(0, np.uint8)
    assert [KERNELS.bounded_valid(empty, words[:room], 0, bound) for room in range(per)] == [True] * per
    assert not KERNELS.bounded_valid(empty, words[:per], 0, bound)
