"""The measurement of `collectives.py --error`: the error of a method after 1, 10 and 100 steps with its memory."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

import mpicomp
from bench.collectives.rows import ErrorRow
from bench.collectives.systems import World, each
from bench.collectives.timing import Arrays
from mpicomp.comm.communicator import Comm

SIZES = (1 << 20,)


def error(world: World, args: argparse.Namespace) -> Iterator[ErrorRow]:
    """Yield a row per size and method. Every step reduces the same arrays, and the mean of the results is judged."""
    return each(world, args, SIZES, _error_of)


def _error_of(world: World, arrays: Arrays, spec: str, args: argparse.Namespace) -> ErrorRow:
    arrays.fill(args.seed, world.me)
    x, out = arrays.ends()
    plan = mpicomp.plan(world.mpi, x, spec, feedback=True)
    traffic = Comm.of(world.mpi).traffic
    total, before = np.zeros(arrays.shape), traffic.bytes
    errors: dict[str, Any] = {}
    for step in range(1, max(ErrorRow.STEPS) + 1):
        plan(x, out=out)
        total += out
        if step in ErrorRow.STEPS:
            out[...] = total / step
            wrong, exact = world.sum(arrays.squares(args.seed, world.me, world.ranks))
            errors[f"error_{step}"] = math.sqrt(wrong / exact)
    sent = world.most([(traffic.bytes - before) / max(ErrorRow.STEPS)])[0]
    return ErrorRow(**world.run(spec, arrays.nbytes), resolved=str(plan), wire_bytes=int(sent), **errors)
