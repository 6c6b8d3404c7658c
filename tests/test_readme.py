"""Every block of README.md runs, or is checked against the `--help` of what it calls: see tests/readme_blocks.py."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import MPIRUN, environ
from readme_blocks import KINDS, Block, blocks, commands, extras, files, options

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCKS = blocks(README.read_text())
LINES = 250  # of README.md, without comments
LIMIT = 300  # seconds for a block

EXAMPLE = """
Takes two minutes.

```sh run
true
```
<!-- before: import sys
sys.path.clear()
-->

```diff mpirun 2
 import os
+import re
-import io
```
Nothing about it.

```sh no: it takes an hour
A=1 mpirun -n 4 .venv/bin/python bench/cluster.py --hosts 4 -- python bench/train.py --task=x \\
    --more && pip install -q '.[mpich,bench]' # --nothing
```
"""


def run(command: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    kept = environ(PATH=path, MPICOMP_CACHE_DIR=str(cwd / ".machines"), PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        command, cwd=cwd, env=kept | more, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder in which a block may write, with what the repository holds."""
    for path in ROOT.iterdir():
        if path.name not in (".git", "mpicomp") and not path.name.endswith(".json"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def that(wanted: str) -> list[object]:
    """The blocks to be tested in one way."""
    chosen = [block for block in BLOCKS if block.kind.partition(" ")[0] in wanted.split()]
    return [pytest.param(block, id=f"line {block.line}") for block in chosen]


def test_the_readme_is_short_enough() -> None:
    lines = re.sub(r"<!--.*?-->\n", "", README.read_text(), flags=re.DOTALL).splitlines()
    assert len(lines) <= LINES, f"README.md has {len(lines)} lines; move tables to bench/results/README.md"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_every_block_says_how_it_is_tested_and_how_long_it_takes(block: Block) -> None:
    assert KINDS.fullmatch(block.kind), (
        f"README.md, {block}: behind the language stands one of `run`, `mpirun N`, `help`, `no: REASON`; "
        "tests/readme_blocks.py has the list"
    )
    assert block.language in ("sh", "python", "diff")
    if block.language == "sh":
        assert block.says_how_long, f"README.md, {block}: say in it, or right above or below it, how long it takes"


def runs(block: Block, tree: Path) -> None:
    if block.language == "sh":
        done = run(["bash", "-euo", "pipefail", "-c", block.program], tree)
    else:
        script = tree / "block.py"
        script.write_text(block.program)
        ranks = block.kind.partition(" ")[2]
        if ranks and MPIRUN is None:
            pytest.skip("there is no mpirun")
        done = run([*([str(MPIRUN), "-n", ranks] if ranks else []), sys.executable, str(script)], tree)
    assert done.returncode == 0, f"README.md, {block}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.jobs
@pytest.mark.deadline(LIMIT + 60)
@pytest.mark.parametrize("block", that("run mpirun"))
def test_a_block_runs(block: Block, tree: Path) -> None:
    runs(block, tree)


@pytest.mark.jobs
@pytest.mark.parametrize("block", that("help"))
def test_a_block_fits_the_help_of_what_it_calls(block: Block, tree: Path) -> None:
    for words in commands(block.code):
        unknown = misfits(words, tree)
        assert not unknown, f"README.md, {block}, {' '.join(words)}: {unknown}"


def misfits(words: list[str], tree: Path) -> list[str]:
    """What a command names that does not exist."""
    if words[0] in (".", "source"):  # of an environment, which a line above it makes
        return []
    wrong = [f"there is no {name}" for name in files(words) if not (tree / name).exists()]
    known = configparser.ConfigParser()
    known.read(ROOT / "setup.cfg")
    wrong += [f"there is no extra {name}" for name in extras(words) - set(known["options.extras_require"])]
    name = Path(words[0]).name
    if name in ("cd", "bash", "sbatch", "git"):
        return wrong
    if name == "pip":
        call = [sys.executable, "-m", "pip", words[1]]
    elif name == "pytest":
        call = [sys.executable, "-m", "pytest"]
    else:
        assert re.fullmatch(r"python[\d.]*", name), f"how is the help of {name} to be had?"
        count = 3 if words[1] != "-m" else 4 if words[2] == "mpicomp" else 3
        call = [sys.executable, *[word for word in words[1:count] if not word.startswith("-") or word == "-m"]]
        if words[1] != "-m":
            call = call[:2]
    done = run([*call, "--help"], tree)
    if done.returncode:
        return [*wrong, f"{' '.join(call[1:])} --help fails: {done.stderr[-300:]}"]
    known_options = set(re.findall(r"--[\w-]+", done.stdout))
    return wrong + [f"no option {option}" for option in options(words) if option not in known_options]


# ------------------------------------------------------------------------------------------- the machinery itself


def test_blocks_are_found() -> None:
    one, two, three = blocks(EXAMPLE)
    assert (one.language, one.kind, one.code, one.before) == ("sh", "run", "true", "")
    assert (two.language, two.kind, two.before) == ("diff", "mpirun 2", "import sys\nsys.path.clear()")
    assert two.program == "import sys\nsys.path.clear()\nimport os\nimport re\n"
    assert three.kind == "no: it takes an hour"
    assert all(KINDS.fullmatch(block.kind) for block in (one, two, three))
    assert [block.says_how_long for block in (one, two, three)] == [True, False, False]
    assert blocks("```sh run\ntrue\n```\nTakes 3 s.\n")[0].says_how_long
    assert not KINDS.fullmatch("")
    assert not KINDS.fullmatch("no: why")
    with pytest.raises(AssertionError, match="line 1 opens has no end"):
        blocks("```sh\n")


def test_commands_are_found() -> None:
    cluster, train, pip = commands(blocks(EXAMPLE)[2].code)
    assert cluster == [".venv/bin/python", "bench/cluster.py", "--hosts", "4"]
    assert (options(train), files(train)) == (["--task", "--more"], ["bench/train.py"])
    assert extras(pip) == {"mpich", "bench"}


@pytest.mark.jobs
def test_what_does_not_exist_is_found(tree: Path) -> None:
    assert misfits(["python", "-m", "mpicomp", "info"], tree) == []
    assert misfits(["python", "-m", "mpicomp", "info", "--nothing"], tree) == ["no option --nothing"]
    assert misfits(["pip", "install", "mpicomp[nothing]"], tree) == ["there is no extra nothing"]
    assert misfits(["bash", "tests/nothing.sh"], tree) == ["there is no tests/nothing.sh"]
    (fails,) = misfits(["python", "-m", "mpicomp", "nothing"], tree)
    assert "--help fails" in fails


def test_a_block_that_fails_is_found(tree: Path) -> None:
    assert shutil.which("bash")
    with pytest.raises(AssertionError, match="line 1, sh run"):
        runs(blocks("```sh run\nfalse\ntrue\n```\n")[0], tree)
