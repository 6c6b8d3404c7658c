"""What `Codec` promises, of every member with every width; `codec_contract` checks it."""

from __future__ import annotations

import codec_contract
import numpy as np
import pytest
from codec_bounds import bound
from codec_contract import DTYPES
from codec_members import CODECS_TESTED, KEY, draws, encoded, normal, rounds_at_random

from mpicomp.codecs import (
    Atomo,
    BlockTopK,
    Cast,
    RandomK,
    Rotated,
    SampledTopK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    Uniform,
)
from mpicomp.errors import WireFormatError
from mpicomp.registry import parse

every_codec = pytest.mark.parametrize("codec", CODECS_TESTED, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def fits_rescaled(codec, x):
    """Tell whether what a codec multiplies by, one over the density, leaves x in the range of its dtype."""
    return (
        not (isinstance(codec, RandomK | Atomo) and codec.scaled)
        or np.abs(x).max(initial=0) < np.finfo(x.dtype).max / 1000
    )


@every_codec
@every_dtype
def test_messages_fit_the_fields_and_decode_within_the_bound(codec, dtype):
    codec_contract.check_messages(codec, dtype, bound, fits_rescaled)


@every_codec
@every_dtype
def test_decode_adds_with_a_scale(codec, dtype):
    codec_contract.check_decode_add(codec, dtype)


@every_codec
@every_dtype
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_a_fresh_array_is_set_whatever_it_held(codec, dtype, scale):
    codec_contract.check_fresh(codec, dtype, scale)


@every_codec
@every_dtype
def test_encode_residual_is_encode_of_the_sum_and_keeps_the_rest(codec, dtype):
    codec_contract.check_residual(codec, dtype)


def works_in_blocks(codec):
    """Tell whether the elements of one block do not change how others are coded."""
    if isinstance(codec, Rotated):
        return not codec.rescale and works_in_blocks(codec.codec)
    if isinstance(codec, BlockTopK | Threshold):
        return codec.values is None or isinstance(codec.values, Cast)
    if isinstance(codec, Sign):
        return codec.block < 2**32
    return not isinstance(codec, Ternary | TopK | RandomK | SampledTopK | Atomo)


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if works_in_blocks(c)], ids=str)
def test_chunks_draw_the_numbers_of_the_whole(codec):
    codec_contract.check_blocks(codec, 777 if isinstance(codec, Cast) else None)


@every_codec
def test_a_codec_that_says_it_works_in_blocks_does(codec):
    assert works_in_blocks(codec) or not codec.blockwise


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if c.marks_nonfinite], ids=str)
@every_dtype
def test_nan_and_infinity_show_in_the_first_field(codec, dtype):
    codec_contract.check_marks(codec, dtype)


@every_codec
def test_key_matters_only_where_something_is_drawn(codec):
    x = normal(1000, "float32")
    payloads = {
        tuple(field.tobytes() for field in encoded(codec, x, KEY._replace(**{part: 99})))
        for part in ("seed", "step", "stream", "rank", "stage")
    }
    assert len(payloads) == (5 if rounds_at_random(codec) else 4 if draws(codec) else 1)


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if c.linear], ids=str)
def test_payloads_of_linear_codecs_may_be_summed(codec):
    codec_contract.check_linear(codec)


@every_codec
def test_any_finite_array_survives(codec):
    codec_contract.check_any_array(codec)


@every_codec
def test_non_finite_input_neither_crashes_nor_loops(codec):
    codec_contract.check_nonfinite(codec)


@every_codec
@every_dtype
def test_check_refuses_other_shapes_and_dtypes(codec, dtype):
    codec_contract.check_refusals(codec, dtype)


@every_codec
def test_mutated_messages_are_refused_or_decode_safely(codec):
    codec_contract.check_mutated(codec)


def test_check_refuses_each_kind_of_nonsense():
    x = normal(300, "float32")
    for codec, place, change in [
        (TopK(0.1), 1, lambda f: f.__setitem__(-1, 255)),
        (TopK(0.1), 0, lambda f: f.__setitem__(0, np.nan)),
        (RandomK(0.1), 0, lambda f: f.__setitem__(0, np.inf)),
        (Uniform(), 0, lambda f: f.__setitem__(0, np.inf)),
        (Uniform(), 0, lambda f: f.__setitem__(1, -1.0)),
        (Uniform(), 1, lambda f: f.__setitem__(3, 0x88)),  # code -8 of -7..7
        (Uniform(), 1, lambda f: f.__setitem__(-1, 0xFF)),  # padding: 300 elements leave 44, filled up to 48
        (Sign(), 0, lambda f: f.__setitem__(0, np.nan)),
        (Cast("fp16"), 0, lambda f: f.__setitem__(7, 0xFC00)),
        (Cast("bf16"), 0, lambda f: f.__setitem__(7, 0x7F80)),
    ]:
        payload = encoded(codec, x)
        codec.check(payload, 300)
        change(payload[place])
        with pytest.raises(WireFormatError):
            codec.check(payload, 300)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TopK(1.5), "density must be in (0, 1], got 1.5"),
        (lambda: TopK(0), "density must be in (0, 1], got 0"),
        (lambda: TopK(float("nan")), "density must be in (0, 1], got nan"),
        (lambda: TopK(True), "density must be in (0, 1], got True"),
        (lambda: TopK("0.1"), "density must be in (0, 1], got '0.1'"),
        (lambda: RandomK(-0.1), "density must be in (0, 1], got -0.1"),
        (lambda: RandomK(0.1, scaled=1), "scaled must be True or False, got 1"),
        (lambda: Uniform(bits=0), "bits must be an integer in 1..8, got 0"),
        (lambda: Uniform(bits=9), "bits must be an integer in 1..8, got 9"),
        (lambda: Uniform(bits=True), "bits must be an integer in 1..8, got True"),
        (lambda: Uniform(bits="4"), "bits must be an integer in 1..8, got '4'"),
        (lambda: Uniform(bits=4.0), "bits must be an integer in 1..8, got 4.0"),
        (lambda: Uniform(block=12), "block must be a multiple of 8 in 8..65536, got 12"),
        (lambda: Uniform(block=131_072), "block must be a multiple of 8 in 8..65536, got 131072"),
        (lambda: Uniform(stochastic="yes"), "stochastic must be True or False, got 'yes'"),
        (lambda: Uniform(scaled=False), "scaled=False needs stochastic=True"),
        (lambda: Cast("float16"), "dtype must be fp16 or bf16, got 'float16'"),
        (lambda: Cast(16), "dtype must be fp16 or bf16, got 16"),
        (lambda: Cast([]), "dtype must be fp16 or bf16, got []"),
        (lambda: TopK(0.1).fields(2**32 + 1, "float32"), "too large"),
    ],
)
def test_wrong_settings_are_refused_with_their_value(make, text):
    with pytest.raises(ValueError, match=r".") as caught:
        make()
    assert text in str(caught.value)


@every_codec
@every_dtype
def test_framed_messages_come_back(codec, dtype):
    codec_contract.check_frame(codec, dtype)


@pytest.mark.parametrize("codec", [c for c in CODECS_TESTED if c.selects], ids=str)
@every_dtype
def test_selected_entries_are_those_of_the_message(codec, dtype):
    codec_contract.check_selection(codec, dtype)


@every_codec
def test_codecs_are_values_and_print_as_specs(codec):
    codec_contract.check_value(codec)
    assert parse(str(codec)) == codec


@pytest.mark.parametrize(
    ("spec", "contraction"),
    [
        ("uniform", "uniform"),
        ("uniform(stochastic=True)", "uniform(stochastic=True, scaled=False)"),
        ("natural", "natural(scaled=False)"),
        ("rotated(sign, rescale=True)", "rotated(sign)"),
        ("rotated(dorefa, rescale=True)", "rotated(dorefa(scaled=False))"),
        ("randomk(density=0.1, values=natural)", "randomk(density=0.1, scaled=False, values=natural(scaled=False))"),
        ("topk(density=0.1, values=natural)", "topk(density=0.1, values=natural(scaled=False))"),
        ("threshold(at=1.0, values=rotated(qsgd))", "threshold(at=1.0, values=rotated(qsgd(scaled=False)))"),
    ],
)
def test_the_contraction_beside_a_codec(spec, contraction):
    assert str(parse(spec).contraction()) == contraction


@pytest.mark.parametrize(
    "spec",
    [
        "uniform(bits=1, minmax=True)",
        "rotated(uniform, kashin=True)",
        "topk(density=0.1, values=uniform(bits=1, minmax=True))",
    ],
)
def test_a_codec_without_a_contraction_says_so(spec):
    with pytest.raises(ValueError, match=r"error feedback needs a contraction, and .* neither is one nor"):
        parse(spec).contraction()


def test_density_counts_in_decimals():
    assert TopK(0.07).fields(100, "float32")[0].shape == (7,)  # 0.07 * 100 is 7.000000000000001
    assert TopK(0.01).fields(1, "float32")[0].shape == (1,)
    assert TopK(0.01).fields(0, "float32")[0].shape == (0,)
    assert TopK(1).fields(5, "float32")[0].shape == (5,)
    assert TopK(np.nextafter(0.01, 1)).fields(100, "float32")[0].shape == (2,)
