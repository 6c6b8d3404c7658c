"""Changed messages inside a job: some hundreds for each codec; `tests/changed.py` sends ten thousand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_decoders_stay_within_their_arrays_whatever_the_bytes():
    """In a process of its own: one that reads or writes outside ends by a signal, and its last line names the codec."""
    found = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(TESTS / "changed.py"), "--messages", "300"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert found.returncode == 0, f"{found.stdout[-500:]}\n{found.stderr[-3000:]}"
    assert found.stdout.splitlines()[-1].endswith("decoded")
