"""The common parts of the command lines."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
RANK = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "RANK")  # of a job's launchers
MOST = 1 << 36


class Parser(argparse.ArgumentParser):
    """An argument parser that every rank runs; rank 0 alone prints."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def _print_message(self, message: str, file: Any = None) -> None:
        if next((os.environ[name] for name in RANK if name in os.environ), "0") == "0":
            super()._print_message(message, file)

    def positive(self, args: argparse.Namespace, *names: str) -> None:
        """Refuse numbers that are given and not positive, or infinite."""
        for name in names:
            value = vars(args)[name]
            if value is not None and not 0 < value < math.inf:
                self.error(f"--{name.replace('_', '-')} must be positive, got {value}")

    def at_least(self, args: argparse.Namespace, least: int, *names: str) -> None:
        """Refuse numbers that are smaller."""
        for name in names:
            if vars(args)[name] < least:
                self.error(f"--{name.replace('_', '-')} must be at least {least}, got {vars(args)[name]}")

    def files(self, args: argparse.Namespace, *names: str) -> None:
        """Refuse files to write in a folder that does not exist, and files to read that do not exist."""
        for name in names:
            if (file := vars(args)[name]) and not Path(file).absolute().parent.is_dir():
                self.error(f"--{name}: there is no folder {Path(file).parent}")
        for file in vars(args).get("read") or ():
            if not Path(file).is_file():
                self.error(f"--read: there is no file {file}")

    def specs(self, option: str, texts: Iterable[str], parse: Callable[[str], T]) -> list[T]:
        """Return the codecs or reducers of specs; refuse a spec with an error."""
        return self.checked(lambda: [parse(text) for text in texts], f"{option}: ")

    def checked(self, read: Callable[[], T], prefix: str = "") -> T:
        """Return what `read` returns; refuse its ValueError with its message."""
        try:
            return read()
        except ValueError as error:
            self.error(f"{prefix}{error}")


def count_of(text: str) -> int:
    """Read a number of elements: 16777216 or 2^24."""
    match = re.fullmatch(r"(2\^)?(\d{1,11})", text)
    value = 0 if match is None else int(match[2]) if match[1] is None else 1 << min(int(match[2]), 64)
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"a size is e.g. 16777216 or 2^24, 1 to 2^36; got {text!r}")
    return value
