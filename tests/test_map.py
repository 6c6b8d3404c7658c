"""The map in .github/CONTRIBUTING.md: every module of the package with its first sentence, and every folder.

`python tests/test_map.py` writes it anew from the docstrings (of `.cu` and `.cuh` files: from the first comment), so a
sentence is changed where the module is; a folder of the package has the sentence of its `__init__.py`, and those of
other folders stand here.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
BEGIN, END = "<!-- map: written by tests/test_map.py -->\n", "<!-- end of the map -->\n"

FOLDERS = {
    "bench": "Benchmarks, a folder per subject; `results/` has what they measured.",
    "slurm": "Batch files for SLURM.",
    "tests": "Tests; the folders mirror those of the package.",
    "tests/golden": "A slow, independent reference of every codec, and the messages that it wrote.",
    "tests/gpu": "The CUDA kernels, run on the CPU by a stand-in for CuPy and compared with Numba's byte by byte.",
    "tests/mpi": "Tests that run under `mpirun`.",
    "tests/product": "Combinations of all factors, and a failure as the smallest program that fails.",
    ".ci": "What CI runs, and the versions it runs with.",
    ".github": "This file, the changelog, the workflow.",
}


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, or of the comment that opens a CUDA file."""
    text = path.read_text()
    if path.suffix == ".py":
        opening = ast.get_docstring(ast.parse(text)) or ""
    else:
        opening = "\n".join(line.removeprefix("//").strip() for line in re.match(r"(//.*\n)*", text)[0].splitlines())
    paragraph = " ".join(opening.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!])\s", paragraph)[0]


def modules() -> dict[str, list[Path]]:
    """The files of every folder of the package that are code."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "mpicomp").rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh") and path.name != "__init__.py":
            found.setdefault(str(path.parent.relative_to(ROOT)), []).append(path)
    return found


def written() -> str:
    """The map as it must be."""
    lines = []
    found = modules()
    for folder in [*sorted(found), *FOLDERS]:
        text = FOLDERS.get(folder) or sentence(ROOT / folder / "__init__.py")
        lines += [f"\n**`{folder}/`** {text}\n"]
        lines += [f"- `{path.name}`: {sentence(path)}" for path in found.get(folder, [])]
    return "\n".join(lines).lstrip("\n") + "\n\n"


def split() -> tuple[str, str, str]:
    """CONTRIBUTING.md before, within and after the map."""
    before, _, rest = CONTRIBUTING.read_text().partition(BEGIN)
    within, _, after = rest.partition(END)
    return before, within, after


def test_the_map_is_that_of_the_tree() -> None:
    is_there, must_be = split()[1].splitlines(), written().splitlines()
    gone, new = [line for line in is_there if line not in must_be], [line for line in must_be if line not in is_there]
    assert is_there == must_be, f"run `python tests/test_map.py`; no longer so: {gone}; new: {new}"


def test_every_folder_and_every_module_has_its_sentence() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    missing = sorted({name.partition("/")[0] for name in tracked if "/" in name} - {"mpicomp", *FOLDERS})
    assert not missing, f"say in FOLDERS of tests/test_map.py what these folders hold: {missing}"
    wrong = [name for name in FOLDERS if not (ROOT / name).is_dir()]
    assert not wrong, f"FOLDERS of tests/test_map.py names folders that do not exist: {wrong}"
    files = [*(path for paths in modules().values() for path in paths), *(ROOT / "mpicomp").rglob("__init__.py")]
    silent = [str(path.relative_to(ROOT)) for path in files if len(sentence(path)) < 10]
    assert not silent, f"these modules open with no sentence: {silent}"


if __name__ == "__main__":
    start, _, rest_of_file = split()
    CONTRIBUTING.write_text(start + BEGIN + written() + END + rest_of_file)
