"""The code blocks of a README, and how a test looks at each of them.

What follows the language in the line that opens a block says how it is tested (GitHub and PyPI show the first word's
language and ignore the rest):

    ```python mpirun 2      runs on two ranks; `diff` alike, with the lines that the diff removes left out
    ```python run           runs alone
    ```sh run               runs in a copy of the tree, with this Python and its `mpirun`; a failing command fails
    ```sh help              does not run: every option is in the `--help` of its command, every file and extra exists
    ```sh no: REASON        is not tested, for this reason

Code that a block takes for granted stands before it in `<!-- before: CODE -->`, which a reader does not see.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^```(?P<info>\S.*)?$")
BEFORE = re.compile(r"<!-- before: (.*?)\s*-->\s*$", re.DOTALL)
KINDS = re.compile(r"run|help|mpirun [1-4]|no: .{8,}")
TIME = re.compile(r"\b(ms|s|seconds?|min|minutes?)\b")


class Block(NamedTuple):
    """One fenced block."""

    line: int
    language: str
    kind: str  # one of KINDS, or what stands in its place
    code: str
    before: str  # hidden code
    prose: str  # the paragraphs above and below

    def __str__(self) -> str:
        return f"line {self.line}, {self.language} {self.kind}"

    @property
    def program(self) -> str:
        """The code as it runs."""
        lines = self.code.splitlines()
        if self.language == "diff":
            lines = [line[1:] for line in lines if not line.startswith("-")]
        return "\n".join([self.before, *lines, ""])

    @property
    def says_how_long(self) -> bool:
        """Whether the block or a paragraph beside it names a time."""
        return bool(TIME.search(self.code) or TIME.search(self.prose))


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a text, in order."""
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    lines, start = text.splitlines(), 0
    for number, line in enumerate(lines, 1):
        match = FENCE.match(line)
        if match is None:
            continue
        if opened is None:
            opened = (number, match["info"] or "")
            continue
        first, info = opened
        above = "\n".join(lines[start : first - 1])
        hidden = BEFORE.search(above)
        below = "\n".join(lines[number:]).strip("\n").partition("\n\n")[0]
        prose = f"{BEFORE.sub('', above).rstrip().rpartition(chr(10) * 2)[2]}\n{below.partition('```')[0]}"
        language, _, kind = info.partition(" ")
        code = "\n".join(lines[first : number - 1])
        found.append(Block(first, language, kind.strip(), code, hidden[1] if hidden else "", prose))
        opened, start = None, number
    assert opened is None, f"the block that line {opened and opened[0]} opens has no end"
    return found


def commands(code: str) -> list[list[str]]:
    """The simple commands of a shell block, as words without assignments, redirections and what launches them."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||\||;", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(part)
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            current: list[str] = []
            for word in words:
                if word == "--":  # bench/cluster.py -- COMMAND
                    found.append(current)
                    current = []
                else:
                    current.append(word)
            found.append(current)
    return [_launched(words) for words in found if words]


def _launched(words: list[str]) -> list[str]:
    """The command that `mpirun -n 4` or `srun` starts."""
    if Path(words[0]).name in ("mpirun", "mpiexec", "srun"):
        for place, word in enumerate(words):
            if re.fullmatch(r"python[\d.]*", Path(word).name):
                return words[place:]
    return words


def options(words: list[str]) -> list[str]:
    """The long options of a command, without their values."""
    return [word.partition("=")[0] for word in words if re.match(r"--\w", word)]


def files(words: list[str]) -> list[str]:
    """The words of a command that name a file of the repository."""
    return [word for word in words if re.fullmatch(r"(bench|slurm|tests|\.ci)/[\w./-]+", word)]


def extras(words: list[str]) -> set[str]:
    """The extras that a `pip install` asks of this package."""
    found = [re.fullmatch(r"(?:mpicomp|\.)\[([\w,]+)\]", word) for word in words]
    return {extra for match in found if match for extra in match[1].split(",")}
