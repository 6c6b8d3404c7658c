"""Process groups that come and go leave nothing behind; see groups_program.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.jobs

PROGRAM = Path(__file__).with_name("groups_program.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
@pytest.mark.parametrize(("what", "count"), [("groups", 200), ("cycles", 30)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_groups_leave_nothing_behind(what: str, count: int, ranks: int) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        ["mpirun", "-n", str(ranks), sys.executable, str(PROGRAM), what, str(count if ranks > 1 else 15)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("communicators") == 2 * ranks
