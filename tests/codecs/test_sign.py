"""sign(block=): one scale per block, so that what has no gradient does not move."""

from __future__ import annotations

import numpy as np
import pytest
from codec_members import decoded, encoded, normal
from reducers.members import check_law, layout_of, member, run
from team import Team

from mpicomp.codecs import Sign, Uniform
from mpicomp.registry import parse

ROWS, WIDTH = 10, 64


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [8, 64, 1032])
def test_a_block_has_the_payload_of_one_bit_uniform(block, dtype):
    x = normal(3000, dtype)
    mine, theirs = (encoded(codec, x) for codec in (Sign(block=block), Uniform(bits=1, block=block)))
    assert [field.tobytes() for field in mine] == [field.tobytes() for field in theirs]


def test_a_block_of_zeros_is_zeros_and_the_others_have_their_mean():
    x = normal(ROWS * WIDTH, "float32").reshape(ROWS, WIDTH).copy()
    x[3:7] = 0
    x[8] *= 1000
    out = decoded(Sign(block=WIDTH), encoded(Sign(block=WIDTH), x.reshape(-1)), x.size, "float32").reshape(x.shape)
    assert not out[3:7].any()
    assert np.allclose(np.abs(out), np.abs(x).mean(1, keepdims=True))
    whole = decoded(Sign(), encoded(Sign(), x.reshape(-1)), x.size, "float32")
    assert whole.all()  # one scale for all: rows of zeros move


@pytest.mark.parametrize("reducer", ["gather", "two_stage"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows_of_an_embedding_without_a_gradient_stay_at_rest_under_adam(ranks, reducer):
    rng, steps, used = np.random.default_rng(ranks), 8, [0, 2, 5]
    x = np.zeros((ranks, steps, ROWS, WIDTH), np.float32)
    x[:, :, used] = rng.standard_normal((ranks, steps, len(used), WIDTH))
    x = x.reshape(ranks, steps, -1)
    x.setflags(write=False)
    moved = {}
    for codec in ("sign(block=64)", "sign"):
        layout = layout_of({"embedding": (ROWS, WIDTH)})
        history = run(Team(ranks), member(f"error_feedback({reducer}({codec}))"), layout, x)
        check_law(history)
        first, second, weight = np.zeros((ROWS, WIDTH)), np.zeros((ROWS, WIDTH)), np.zeros((ROWS, WIDTH))
        for total in history.totals[0].reshape(steps, ROWS, WIDTH) / ranks:  # Adam, Kingma and Ba 2014
            first, second = 0.9 * first + 0.1 * total, 0.999 * second + 0.001 * total**2
            weight -= 1e-3 * first / (np.sqrt(second) + 1e-8)
        moved[codec] = np.flatnonzero(np.abs(weight).max(1)).tolist()
    assert moved == {"sign(block=64)": used, "sign": list(range(ROWS))}


def test_the_default_is_one_scale_for_any_array():
    assert str(Sign()) == "sign"
    assert parse("sign") == Sign()
    assert Sign().fields(10**6, "float32")[0].shape == (1,)
    assert (Sign().blockwise, Sign(block=64).blockwise) == (False, True)
    assert (Sign().grain, Sign(block=64).grain) == (1024, 64)
    assert str(parse("sign(block=64)")) == "sign(block=64)"


@pytest.mark.parametrize("block", [0, 4, 65, 70_000, 64.0, True])
def test_blocks_that_cannot_be_used(block):
    with pytest.raises(ValueError, match="block must be"):
        Sign(block=block)


def test_two_means_have_no_blocks():
    with pytest.raises(ValueError, match="two_means are those of a whole array"):
        Sign(two_means=True, block=64)
