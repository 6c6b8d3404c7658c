"""Write the messages once, by the slow reference alone: `PYTHONPATH=tests python tests/golden/make.py`.

A file that exists is never written over: what is new gets a file of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from golden import reference

FOLDER = Path(__file__).parent


def main() -> None:
    for name, cases in reference.files().items():
        path = FOLDER / f"{name}.npz"
        if path.exists():
            continue
        arrays = {}
        for number, (codec, config, x) in enumerate(cases):
            payload, decoded = reference.encode(codec, config, x, reference.KEY)
            arrays[f"{number}-decoded"] = reference.digest(decoded)
            for place, field in enumerate(payload):
                arrays[f"{number}-{place}"] = field
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {len(cases)} messages")


if __name__ == "__main__":
    main()
