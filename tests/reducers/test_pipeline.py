"""Groups: how messages are cut so that coding hides behind the wire, and that this changes no result."""

from __future__ import annotations

import numpy as np
import pytest
from reducers.members import LAYOUT, check_bytes, check_law, inputs, layout_of, member, run
from team import Team

from mpicomp.reducers.parts import pipeline
from mpicomp.reducers.parts.pipeline import groups

SPECS = [
    "error_feedback(gather(uniform(bits=4, block=16)))",
    "error_feedback(two_stage(uniform(bits=4, block=16)))",
    "error_feedback(two_stage(uniform(bits=3, block=16, stochastic=True, scaled=False)))",
    "error_feedback(two_stage(uniform(bits=8, block=16), second=uniform(bits=2, block=16)))",
    "error_feedback(two_stage(blocktopk(density=0.1, block=64)))",
    "error_feedback(two_stage(topk(density=0.1)))",
    "error_feedback(two_stage(randomk(density=0.1, scaled=False)))",
    "error_feedback(two_stage(threshold(at=1.5)))",
    "error_feedback(two_stage(mxfp8))",
    "two_stage(natural(block=16))",
]
LONG = layout_of({"scalar": (), "long": (40, 30), "prime": (97,), "empty": (0,), "matrix": (13, 11)})


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_groups_change_no_bit(spec: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(ranks, 6, LONG.size, "float32")
    whole = run(Team(ranks), member(spec), LONG, x)
    monkeypatch.setattr(pipeline, "GROUP", 64)
    team = Team(ranks)
    cut = run(team, member(spec), LONG, x)
    if "error_feedback" in spec:
        check_law(cut)
    if "threshold" not in spec:
        check_bytes(team, member(spec), LONG, "float32", 6)
    assert cut.totals.tobytes() == whole.totals.tobytes()
    assert cut.residuals.tobytes() == whole.residuals.tobytes()


@pytest.mark.parametrize("place", [0, 64, 700, LONG.size - 1])
@pytest.mark.parametrize("spec", SPECS)
def test_poison_in_any_group_reaches_every_rank(spec: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "GROUP", 64)
    x = inputs(3, 3, LONG.size, "float32").copy()
    x[1, 1, place] = np.inf
    history = run(Team(3), member(spec), LONG, x)
    assert history.poisoned.tolist() == [[False, True, False]] * 3
    assert np.isnan(history.totals[:, 1]).all()
    assert history.residuals[:, 2].tobytes() == history.residuals[:, 1].tobytes()


def test_groups_are_cut_at_blocks_and_hold_about_as_many_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "GROUP", 100)
    codec = member("gather(uniform(bits=4, block=16))").codec  # type: ignore[attr-defined]
    found = groups(LONG.whole(), codec)
    pieces = [piece for group in found for piece in group]
    assert [(p.unit.name, p.start) for p in pieces] == sorted(
        ((p.unit.name, p.start) for p in pieces), key=lambda at: (list(u.name for u in LONG.units).index(at[0]), at[1])
    )
    assert sum(piece.size for piece in pieces) == LONG.size
    assert all(piece.start % 16 == 0 for piece in pieces)
    assert all(sum(piece.size for piece in group) <= 100 for group in found)
    whole = groups(LONG.whole(), member("gather(topk(density=0.1))").codec)  # type: ignore[attr-defined]
    assert [piece for group in whole for piece in group] == LONG.whole()
    assert groups([], codec) == []


@pytest.mark.parametrize(
    "spec",
    [
        "two_stage(uniform(bits=4), second=uniform(bits=4, block=64))",
        "two_stage(uniform(bits=4), second=topk(density=0.1))",
        "two_stage(randomk(density=0.1), second=randomk(density=0.1))",
        "two_stage(bounded(abs=0.1), second=uniform(bits=4))",
    ],
)
def test_a_second_codec_must_fit_the_first(spec: str) -> None:
    with pytest.raises(ValueError, match="second must be a codec of the first one's family"):
        member(spec)


def test_a_second_codec_encodes_the_sums() -> None:
    x = inputs(4, 1, LAYOUT.size, "float32")
    fine = run(Team(4), member("two_stage(bounded(abs=0.001))"), LAYOUT, x).totals[0, 0]
    mixed = run(Team(4), member("two_stage(bounded(abs=0.001), second=bounded(abs=0.1))"), LAYOUT, x).totals[0, 0]
    error = np.abs(mixed - x[:, 0].sum(0))
    assert 0.02 < error.max() <= 0.104 + 1e-5
    assert np.abs(fine - x[:, 0].sum(0)).max() <= 0.005 + 1e-5
