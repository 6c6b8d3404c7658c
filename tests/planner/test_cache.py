"""What was measured is found again, by rank 0 for all; files that cannot be used are told of and replaced."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from team import Team

from mpicomp.codecs import Sign
from mpicomp.comm.communicator import Comm
from mpicomp.cost import Cost, Work
from mpicomp.planner import Link, Machine, Point, cache

MACHINE = Machine((1, 1), None, Link(1e-5, 1e-6, 1e-9), (Point(64, 1e-5),), {"add": (Point(1000, 1e-6),)}, 0.5, 1e9)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put files into a folder of the test's own, and list the ranks that measured."""
    ranks: list[int] = []

    def measure(comm: Comm) -> Machine:
        ranks.append(comm.rank)
        return MACHINE

    monkeypatch.setenv("MPICOMP_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(cache, "measure", measure)
    return ranks


def ask(fresh: bool = False) -> list[Machine]:
    return Team(2).run(lambda comm: cache.machine_for(comm, fresh=fresh))


def the_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "new").iterdir()
    return path


def test_measured_once_then_read(measured: list[int], tmp_path: Path) -> None:
    assert ask() == [MACHINE, MACHINE]
    assert sorted(measured) == [0, 1]
    assert ask() == [MACHINE, MACHINE]
    assert sorted(measured) == [0, 1]
    assert ask(fresh=True) == [MACHINE, MACHINE]
    assert sorted(measured) == [0, 0, 1, 1]
    assert json.loads(the_file(tmp_path).read_text())["key"]["topology"] == "((0,), (1,))"


def test_another_topology_has_another_file(measured: list[int], tmp_path: Path) -> None:
    ask()
    Team(3).run(cache.machine_for)
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "\x00\x01", "[" * 100_000])
def test_a_file_that_cannot_be_used_is_replaced(measured: list[int], tmp_path: Path, content: str) -> None:
    ask()
    path = the_file(tmp_path)
    good = path.read_text()
    path.write_text(content)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert ask() == [MACHINE, MACHINE]
    assert path.read_text() == good


@pytest.mark.parametrize("change", [{"format": 0}, {"key": {}}, {"machine": {"nodes": [2]}}])
def test_a_file_about_something_else_is_replaced(measured: list[int], tmp_path: Path, change: object) -> None:
    ask()
    path = the_file(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))  # type: ignore[operator]
    with pytest.warns(UserWarning, match="cannot be used"):
        assert ask() == [MACHINE, MACHINE]


def test_where_nothing_can_be_kept_each_job_measures(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPICOMP_CACHE_DIR", str(tmp_path / "file" / "below"))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"cannot be written|cannot be used"):
            assert ask() == [MACHINE, MACHINE]
    assert sorted(measured) == [0, 0, 1, 1]


def test_folders() -> None:
    assert cache.folder({"MPICOMP_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache.folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/mpicomp")
    assert cache.folder({}) == Path.home() / ".cache" / "mpicomp"


def test_passes_are_measured_when_they_are_asked_for_and_kept(measured: list[int], tmp_path: Path) -> None:
    cost = Cost(work=(Work("encode", 10, Sign()), Work("add", 10)))

    def f(comm: Comm) -> Machine:
        assert "encode sign" not in cache.machine_for(comm).passes
        machine = cache.machine_for(comm, [cost])
        assert cache.machine_for(comm, [cost]) is machine
        return machine

    first, second = Team(2).run(f)
    assert first == second
    assert first.passes["encode sign"][0].size == 1024
    assert "encode sign" in json.loads(the_file(tmp_path).read_text())["machine"]["passes"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Team(2).run(lambda comm: cache.machine_for(comm, [cost]))
    assert again == [first, first]
