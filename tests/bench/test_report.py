"""`bench/report.py`: pictures of at most ten names, on one scale, and tables with their bars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NEEDS = ("rich", "matplotlib")


@pytest.fixture
def report(bench: Any) -> Any:
    return bench("report")


@pytest.mark.parametrize(("names", "files"), [(1, ["a.png"]), (10, ["a.png"]), (11, ["a-1.png", "a-2.png"])])
def test_a_picture_has_at_most_ten_names(report: Any, tmp_path: Path, names: int, files: list[str]) -> None:
    lines = {f"mpicomp {name}": [report.Point(1, 2, 3), report.Point(2, 4, 5)] for name in range(names)}
    bars = {f"codec {name}": [report.Bar("mpicomp", 1.0, 2.0), report.Bar("numpy", 3.0)] for name in range(names)}
    drawn = [
        report.draw_lines(str(tmp_path / "a.png"), {"left": lines, "right": lines}, "x", "y", ticks=[1, 2]),
        report.draw_bars(str(tmp_path / "a.png"), {"encode": bars, "decode": {}}, "times", "title"),
    ]
    for each in drawn:
        assert [Path(file).name for file in each] == files
        assert all(Path(file).stat().st_size > 5_000 for file in each)


def test_panels_side_by_side_have_one_scale(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    save = report._save
    monkeypatch.setattr(report, "_save", lambda figure, file: (figures.append(figure), save(figure, file))[1])
    panels = {"small": {"a": [report.Point(1, 1), report.Point(2, 1)]}, "large": {"a": [report.Point(1000, 1e6)]}}
    report.draw_lines(str(tmp_path / "a.png"), panels, "x", "y")
    report.draw_bars(
        str(tmp_path / "b.png"),
        {"encode": {"a": [report.Bar("mpicomp", 0.1)]}, "decode": {"a": [report.Bar("torch", 50.0)]}},
        "times",
        "title",
    )
    assert len(figures) == 2
    for figure in figures:
        left, right = figure.axes
        assert left.get_xlim() == right.get_xlim()
        assert left.get_ylim() == right.get_ylim()


def test_tables_join_the_rows_of_a_line_and_name_missed_bars(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Row(report.Row):  # type: ignore[misc,name-defined]
        LABELS = 1
        codec: str
        op: str
        times: float

        @property
        def title(self) -> str:
            return "a title"

        @property
        def met(self) -> bool:
            return self.times <= 1

        def cells(self) -> dict[str, str]:
            return {"codec": self.codec, self.op: report.barred(f"{self.times:.1f}", self.met, 1.0)}

    file = str(tmp_path / "rows.json")
    given = [Row(codec="sign", op="encode", times=0.5), Row(codec="sign", op="decode", times=2.0)]
    rows = report.collect(iter(given), file)
    assert capsys.readouterr().out.splitlines() == ["sign: encode 0.5 ≤ 1", "sign: decode 2.0 > 1"]
    report.print_tables(rows)
    out = capsys.readouterr().out
    assert out.count("sign") == 2  # a line of the table, and the missed bar
    assert "1 of 2 bars are met" in out
    assert "missed: sign: decode 2.0 > 1" in out
    assert report.read([file], [Row]) == given
    assert report.collect(iter(given), file, leader=False) == given
    assert not capsys.readouterr().out
