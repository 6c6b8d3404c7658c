"""Small values that all ranks learn, over a team of threads."""

from __future__ import annotations

import pytest
from team import Team

from mpicomp.comm.share import padded, shared, texts, unpadded


@pytest.mark.parametrize("data", [0, None, "", "naïve", [1, 2.5, "x"], {"a": {"b": []}}])
def test_all_ranks_learn_the_data_of_rank_0(data: object) -> None:
    assert Team(3).run(lambda comm: shared(comm, data if comm.rank == 0 else "ignored")) == [data] * 3


def test_all_ranks_learn_the_text_of_each() -> None:
    found = Team(3).run(lambda comm: texts(comm, "abc" * comm.rank, 4, "names"))
    assert found == [["", "abc", "abca"]] * 3


def test_a_text_is_cut_off_or_filled_up() -> None:
    assert [unpadded(padded(text, 3)) for text in ("", "ab", "abcd", "aé", "abé")] == [
        "",
        "ab",
        "abc",
        "aé",
        "ab\ufffd",
    ]
