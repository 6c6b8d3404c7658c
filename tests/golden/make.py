"""Write the messages once, by the slow reference alone: `PYTHONPATH=tests python tests/golden/make.py`.

Messages of cases at the end are added to a file that exists; those in it are never written over: a changed wire format
gets a new version and a new file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from golden import reference

PATH = Path(__file__).with_name("messages-0.2.npz")


def main() -> None:
    arrays = {}
    if PATH.exists():
        with np.load(PATH) as stored:
            arrays = dict(stored)
    for number, (name, config, x) in enumerate(reference.cases()):
        if f"{number}-decoded" in arrays:
            continue
        payload, decoded = reference.encode(name, config, x, reference.KEY)
        arrays[f"{number}-decoded"] = reference.digest(decoded)
        for place, field in enumerate(payload):
            arrays[f"{number}-{place}"] = field
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
