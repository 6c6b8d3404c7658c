"""The rows of ATOMO and of the survey: what they compute without ranks, and that no codec is left out."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

import numpy as np

from bench.reproduce.works import atomo, survey
from mpicomp.codecs import Codec
from mpicomp.registry import CODECS, parse


def test_the_table_has_a_row_for_every_codec() -> None:
    missing = set(CODECS) - set(survey.SPECS)
    assert not missing, f"bench/reproduce/works/survey.py: add a spec to SPECS of {', '.join(sorted(missing))}"
    assert set(survey.SPECS) == set(CODECS)
    assert all(type(parse(spec)) is CODECS[name] for name, spec in survey.SPECS.items())


@pytest.mark.parametrize("spec", survey.SPECS.values())
def test_every_codec_trains_with_or_without_feedback(spec: str) -> None:
    codec = parse(spec)
    assert isinstance(codec, Codec)
    if codec.unbiased:
        assert parse(survey.around(codec, 4))
    else:
        assert codec.contraction()
    nbytes, error = survey.message(codec, np.sin(np.arange(3000)).astype(np.float32))
    assert nbytes > 0
    assert 0 <= error < 30


def test_figures_of_atomo() -> None:
    assert abs(atomo.probabilities(atomo.spectrum(0), 6).sum() - 6) < 1e-9
    assert 1 <= atomo.rival(atomo.spectrum(0), 3, 0) < 1.5
    spectral, entry_wise, nbytes = atomo.equal_bytes(atomo.noisy(0), 0)
    assert nbytes == 1200
    assert entry_wise > 2 * spectral
