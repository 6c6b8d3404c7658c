"""The program of a combination: what runs in the suite and what is printed where it fails are one text."""

from __future__ import annotations

from product.case import seed_of
from product.combinations import REMEMBERS, SHAPES, Combination, spec_of

HEAD = """\
# ranks {ranks}
# PYTHONPATH=tests mpirun -n {ranks} python -m mpi4py this.py
# {said}
from mpi4py import MPI

comm = MPI.COMM_WORLD
"""
IMPORTS = """\
import copy
import pickle

import mpicomp
from product.case import Case, bad_call, need, nodes, refused, right_or_refused
"""
STEPS = {
    "plain": "result, owed, owes = mpicomp.allreduce(comm, x, case.spec, case.op), None, None",
    "i plain": "result, owed, owes = mpicomp.iallreduce(comm, x, case.spec, case.op).wait(), None, None",
    "memory": "owed = memory.residual\n{0}result = mpicomp.allreduce(comm, x, case.spec, case.op, state=memory)\n{0}owes = memory.residual",
    "i memory": "owed = memory.residual\n{0}result = mpicomp.iallreduce(comm, x, case.spec, case.op, state=memory).wait()\n{0}owes = memory.residual",
    "plan": "owed, result, owes = plan.residual, plan(x), plan.residual",
    "started plan": "owed, result, owes = plan.residual, plan.start(x).wait(), plan.residual",
    "hook": "owed, result, owes = trainer.residual, trainer.step(x), trainer.residual",
}
STEPS["plan with memory"] = STEPS["plan"]
MAKE = {
    "memory": "memory = mpicomp.state(case.spec, case.like)",
    "plan": "plan = mpicomp.plan(comm, case.like, case.spec, op=case.op)",
    "plan with memory": "plan = mpicomp.plan(comm, case.like, case.spec, op=case.op, memory=True)",
    "hook": "from product.trainer import Trainer\n\ntrainer = Trainer(case.like, case.spec)",
}
MAKE |= {"i memory": MAKE["memory"], "started plan": MAKE["plan"], "plain": "", "i plain": ""}
MOVED = {
    "copy": "memory = copy.deepcopy(memory)",
    "pickle": "memory = pickle.loads(pickle.dumps(memory))",
    "export": 'need(memory, "export", "restore")\nkept, memory = memory.export(), mpicomp.state(case.spec, case.like)\nmemory.restore(kept)',
}
REFUSED = {
    "plain": "mpicomp.allreduce(comm, *bad)",
    "i plain": "mpicomp.iallreduce(comm, *bad).wait()",
    "memory": "mpicomp.allreduce(comm, *bad, state=memory)",
    "i memory": "mpicomp.iallreduce(comm, *bad, state=memory).wait()",
    "plan": "mpicomp.plan(comm, *bad)",
    "hook": "Trainer(case.like, bad[1])",
}
REFUSED |= {"started plan": REFUSED["plan"], "plan with memory": REFUSED["plan"]}
KINDS = ("op", "spec", "dtype", "length")


def said(combination: Combination) -> str:
    """A combination in one line."""
    return " | ".join(f"{name}: {value}" for name, value in combination.items())


def head(combination: Combination) -> str:
    """What a program begins with that is printed, and that does without the suite's job."""
    return HEAD.format(ranks=combination["ranks"], said=said(combination))


def program(combination: Combination) -> str:
    """The text of a combination's program, which finds the user's communicator under the name `comm`."""
    entry, before = combination["entry"], combination["before"]
    shapes, listed = SHAPES[combination["shape"]]
    seed = seed_of(said({**combination, "ranks": 0}))
    arguments = [
        repr(spec_of(combination)),
        f"op={combination['op']!r}",
        f"dtype={combination['dtype']!r}",
        f"shapes={shapes}",
        *(["listed=True"] if listed else []),
        *([f"data={combination['data']!r}"] if combination["data"] != "normal" else []),
        *(["memory=True"] if entry in REMEMBERS else []),
        f"seed={seed}",
    ]
    lines = [IMPORTS, *([f"nodes(comm, {combination['nodes']!r})"] if combination["nodes"] != "one" else [])]
    lines += [f"case = Case({', '.join(arguments)})", MAKE[entry], "\n", *_run(entry), "\n"]
    lines += _story(entry, before, combination["nodes"], seed, spec_of(combination), combination["shape"] == "groups")
    return "\n".join(lines) + "\n"


def _run(entry: str) -> list[str]:
    """The function that does steps."""
    return [
        "def run(comm, steps):",
        "    for step in steps:",
        "        x = case.before(case.x(comm, step))",
        "        " + STEPS[entry].format(" " * 8),
        "        case.check(comm, x, result, owed, owes)",
    ]


def _story(entry: str, before: str, nodes: str, seed: int, spec: str, long: bool) -> list[str]:
    """What happens."""
    first, then = (
        ("run(comm, range(1))", "run(comm, range(1, 2))") if long else ("run(comm, range(3))", "run(comm, range(3, 5))")
    )
    if before == "nothing":
        return [first if long else "run(comm, range(4))"]
    if before == "auto changes":
        return ["run(comm, range(80))"]
    if before in MOVED:
        how = f"trainer = trainer.moved({before!r}, case.spec)" if entry == "hook" else MOVED[before]
        kind = "trainer" if entry == "hook" else "memory"
        again = [f"original = {kind}"]
        twice = (
            []
            if "auto" in spec or long
            else [  # what `auto` chooses depends on times
                "moved, case.steps, case.owed = case.steps, [], start",
                f"{kind} = original",
                then,
                "assert moved == case.steps, 'it did not go on as the original does'",
            ]
        )
        return [first, *again, how, "start, case.steps = case.owed, []", then, *twice]
    if before == "another communicator":
        also = "original, plan = plan, mpicomp.plan(other, case.like, case.spec, op=case.op, memory={})"
        made = [also.format(entry == "plan with memory"), "case.owed = None"] if "plan" in entry else []
        back = ["plan, case.owed = original, owed"] if made else []
        topology = f"nodes(comm.Dup(), {nodes!r})" if nodes != "one" else "comm.Dup()"
        return [
            first,
            "owed = case.owed",
            f"other = {topology}",
            *made,
            then.replace("comm", "other"),
            *back,
            "other.Free()",
            "run(comm, range(5, 6))",
        ]
    if before in ("another size", "another order"):
        split = "comm.Split(comm.rank % 2, comm.rank)" if before == "another size" else "comm.Split(0, -comm.rank)"
        return [
            first,
            f"other = {split}",
            f"gone = right_or_refused(comm, other, lambda: {then.replace('comm', 'other')})",
            "other.Free()",
            "if gone:  # refused by some groups, it goes on where all refused",
            "    pass",
            "if all(comm.allgather(gone)):",
            "    run(comm, range(5, 6))",
        ]
    if before == "a refused call":
        kind = "spec" if entry == "hook" else KINDS[seed % len(KINDS)]
        return [first, f"bad = bad_call(case, comm, {kind!r})", f"refused(comm, lambda: {REFUSED[entry]})", then]
    assert before == "another length"
    lines = [first, "kept, case = case, case.other(shapes=[(31,)], listed=False)"]
    names = {"memory": "memory", "i memory": "memory", "hook": "trainer"}
    name = "plan" if "plan" in entry else names.get(entry, "")
    if name:
        lines += [f"original = {name}", MAKE[entry].split("\n")[-1]]
    lines += ["run(comm, range(2))"]
    if name:
        lines += [f"{name} = original"]
    if name == "memory":
        lines += [f"refused(comm, lambda: {REFUSED[entry].replace('*bad', 'case.x(comm, 0), case.spec, case.op')})"]
    return [*lines, "case = kept", then]
