"""One rank of tests/torch/conformance.py: it runs PyTorch's own distributed tests, one after the other.

torch's classes start the ranks of a test as processes. Here the ranks exist, so all of them run the test's method, as
each of those processes would: with a process group, a folder and an environment of the test's own.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import re
import sys
import time
import traceback
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

WAYS = {"gloo": "gloo", "mpicomp": "mpicomp", "mpicomp as gloo": "gloo", "mpicomp as mpi": "mpi"}
"""Which process group the tests see, and by which name: torch's gloo, ours, and ours by names that torch asks for."""

FEATURES = ("gpu", "cuda", "ddp", "subgroup", "plugin")
"""What torch's tests ask of a backend before they run: we have all of it."""


class Suite(NamedTuple):
    """A class of torch's tests."""

    module: str
    name: str
    ranks: int | None
    """How many ranks its tests have; None for any number."""
    has_group: bool
    """Whether a test finds a process group; else it makes its own."""


SUITES = {
    "DistributedTest": Suite("distributed_test", "DistributedTest._DistTestBase", None, True),
    "DdpComparisonTest": Suite("ddp_under_dist_autograd_test", "DdpComparisonTest", 4, False),
    "DdpUnderDistAutogradTest": Suite("ddp_under_dist_autograd_test", "DdpUnderDistAutogradTest", 6, False),
}


def load(suite: Suite, way: str, ranks: int) -> type[Any]:
    """Return the class of a suite, its methods' skips decided for this way and number of ranks."""
    name = WAYS[way]
    os.environ |= {"BACKEND": name, "WORLD_SIZE": str(ranks), "INIT_METHOD": "file://"}
    from torch.testing._internal.common_distributed import DistTestCases, MultiProcessTestCase
    from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import TensorPipeRpcAgentTestFixture

    for feature in FEATURES:
        DistTestCases.backend_feature[feature].add(name)
    found = importlib.import_module(f"torch.testing._internal.distributed.{suite.module}")
    # At run time only `skip_if_small_worldsize` reads this: it leaves out groups of ranks 1 and 2 in worlds of fewer
    # than 8 ranks, unless the backend is mpi.
    os.environ["BACKEND"] = "mpi" if ranks > 2 else name
    tests: Any = found
    for part in suite.name.split("."):
        tests = getattr(tests, part)
    if suite.has_group:
        return type("Ranks", (tests, MultiProcessTestCase), {"world_size": ranks, "init_method": None})
    return type("Ranks", (TensorPipeRpcAgentTestFixture, tests, MultiProcessTestCase), {})


def tests_of(suite: type[Any]) -> list[str]:
    """Return the names of the tests of a class, in torch's order."""
    return [name for name in dir(suite) if name.startswith("test_")]


def create_ours_as(name: str) -> None:
    """Make torch create our process groups where a backend of its own is asked for, and call them by that name.

    torch's table of backends knows its own ones apart from those that are registered, so the function that reads it is
    wrapped. The profiler is not asked for the events that the backend of that name records.
    """
    import torch.distributed.distributed_c10d as c10d
    from torch.testing._internal.distributed import distributed_test as theirs

    from mpicomp.torch.backend import MPIProcessGroup

    theirs.PROFILING_SUPPORTED_BACKENDS.remove(name)
    theirs.SEND_RECV_PROFILING_SUPPORTED_BACKENDS.remove(name)
    create = c10d._new_process_group_helper

    def helper(size: int, rank: int, ranks: list[int], backend: str, *args: Any, **kwargs: Any) -> Any:
        ours = backend == name
        if size < 0:  # torch leaves it to MPI which rank this is
            size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        group, store = create(size, rank, ranks, c10d.Backend("mpicomp" if ours else backend), *args, **kwargs)
        if ours and store is not None:  # this rank is in the group
            c10d._world.pg_map[group] = (c10d.Backend(name), store)
            c10d._world.pg_backend_config[group] = str(c10d.BackendConfig(c10d.Backend(name)))
        return group, store

    c10d._new_process_group_helper = helper
    MPIProcessGroup.monitored_barrier = monitored_barrier


def monitored_barrier(group: Any, timeout: timedelta, wait_all_ranks: bool = False) -> None:
    """What torch's function of this name calls, which refuses other names than gloo: ours, its errors in gloo's words.

    Who has failed is what ours says; gloo names the first rank alone, or all, and at rank 0.
    """
    import mpicomp.torch

    try:
        mpicomp.torch.monitored_barrier(group, timeout)
    except mpicomp.CommunicatorError as error:
        missing = re.findall(r"\d+", str(error).partition(" did not come")[0])
        some = f"Ranks {', '.join(missing)}" if wait_all_ranks and len(missing) > 1 else f"Rank {missing[0]}"
        text = f"{some} failed to pass monitoredBarrier"
        if group.rank() > 0:
            text = f"Rank {group.rank()} successfully reached monitoredBarrier, but received errors while waiting for "
            text += f"send/recv from rank 0: {some}"
        raise RuntimeError(text) from error


def outcome(suite: Suite, case: Any, name: str, folder: Path) -> tuple[str, str]:
    """Run a test; return what came of it, and the reason of a skip or the traceback of a failure."""
    method = getattr(type(case), name)
    if getattr(method, "__unittest_skip__", False):
        return "skipped", method.__unittest_skip_why__
    try:
        with surroundings(suite, case, name, folder):
            reason = skip_of(getattr(case, name))
    except BaseException:
        return "failed", traceback.format_exc()
    return ("skipped", reason) if reason else ("passed", "")


def skip_of(test: Callable[[], None]) -> str:
    """Run a test; return why it skips itself, which torch's tests say by an exit code, too, or an empty text."""
    from torch.testing._internal.common_distributed import TEST_SKIPS

    try:
        test()
    except unittest.SkipTest as skip:
        return str(skip)
    except SystemExit as end:
        skips = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}
        if end.code not in skips:
            raise
        return skips[end.code]
    return ""


@contextmanager
def surroundings(suite: Suite, case: Any, name: str, folder: Path) -> Iterator[None]:
    """What a test finds: a folder, random numbers, and a process group if it does not make its own."""
    import torch.distributed as dist
    from torch.testing._internal import common_utils

    environment = dict(os.environ)
    for part in ("barrier", "test_dir", "init_dir"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    os.environ["TEMP_DIR"] = str(folder)
    case.file_name = str(folder / "group")
    common_utils.set_rng_seed()
    try:
        if suite.has_group:
            begin_group(case, name)
        yield
        if suite.has_group:
            case._barrier(case.world_size, 30)
        if dist.is_initialized():
            dist.destroy_process_group()
    finally:
        os.environ.clear()
        os.environ.update(environment)
        dist.set_debug_level_from_env()


def begin_group(case: Any, name: str) -> None:
    """Make the process group that torch makes for each test."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import distributed_test as theirs

    theirs.INIT_METHOD = f"file://{case.file_name}_again"
    theirs.Barrier.barrier_id = 0
    dist.init_process_group(
        theirs.BACKEND,
        init_method=f"file://{case.file_name}",
        world_size=case.world_size,
        rank=case.rank,
        timeout=timedelta(seconds=theirs.CUSTOM_PG_TIMEOUT.get(name, theirs.default_pg_timeout)),
    )
    case._barrier(case.world_size, 30)


def main(way: str, suite: str, folder: str, seconds: str) -> None:
    """Run the tests of folder/tests, and write what came of each to folder/RANK, a line of JSON each.

    After so many seconds the stacks of a test are printed. After a failure this rank waits to be ended: the others may
    wait for it.
    """
    import mpicomp.torch  # noqa: F401  # tells torch of the ranks

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    chosen = SUITES[suite]
    tests = load(chosen, way, ranks)
    if way not in WAYS.values():
        create_ours_as(WAYS[way])
    with Path(folder, str(rank)).open("w", buffering=1) as results:
        for name in Path(folder, "tests").read_text().split():
            results.write(json.dumps({"test": name, "outcome": "begun"}) + "\n")
            case = tests(name)
            case.rank = rank
            faulthandler.dump_traceback_later(float(seconds))
            kind, reason = outcome(chosen, case, name, Path(folder, "of", name))
            faulthandler.cancel_dump_traceback_later()
            results.write(json.dumps({"test": name, "outcome": kind, "reason": reason}) + "\n")
            while kind == "failed":
                time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
