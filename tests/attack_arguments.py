"""The command line of the programs that attack codecs with messages: `changed.py` and `hostile.py`."""

from __future__ import annotations

import argparse

from codec_members import CODECS_TESTED

from mpicomp.registry import parse


def attack_arguments(description: str | None, of_what: str) -> argparse.Namespace:
    """Read the options: `messages` of each `of_what`, `codec`, the codecs to attack, and `seed`."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--messages", type=int, default=10_000, help=f"for each {of_what} (default: 10000)")
    parser.add_argument(
        "--codec", action="append", metavar="SPEC", help="may be repeated; default: all that tests know"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.codec = [parse(spec) for spec in args.codec] if args.codec else CODECS_TESTED
    return args
