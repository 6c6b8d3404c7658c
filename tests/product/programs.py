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
    "plain": """\
        result = mpicomp.allreduce(comm, x, case.spec, case.op)
        case.check(comm, x, result)""",
    "i plain": """\
        result = mpicomp.iallreduce(comm, x, case.spec, case.op).wait()
        case.check(comm, x, result)""",
    "memory": """\
        owed = memory.residual
        result = mpicomp.allreduce(comm, x, case.spec, case.op, memory=memory)
        case.check(comm, x, result, owed, memory.residual)""",
    "i memory": """\
        owed = memory.residual
        result = mpicomp.iallreduce(comm, x, case.spec, case.op, memory=memory).wait()
        case.check(comm, x, result, owed, memory.residual)""",
    "plan": """\
        owed, result = plan.residual, plan(x)
        case.check(comm, x, result, owed, plan.residual)""",
    "started plan": """\
        owed, result = plan.residual, plan.start(x).wait()
        case.check(comm, x, result, owed, plan.residual)""",
    "hook": """\
        owed, result = trainer.residual, trainer.step(x)
        case.check(comm, x, result, owed, trainer.residual)""",
}
STEPS["plan with memory"] = STEPS["plan"]
MAKE = {
    "plain": "",
    "memory": "memory = mpicomp.memory(case.spec, case.like)",
    "plan": "plan = mpicomp.plan(comm, case.like, case.spec, op=case.op)",
    "plan with memory": "plan = mpicomp.plan(comm, case.like, case.spec, op=case.op, feedback=True)",
    "hook": "trainer = Trainer(case.like, case.spec)",
}
MAKE |= {"i memory": MAKE["memory"], "started plan": MAKE["plan"], "i plain": ""}
MOVED = {
    "copy": "memory = copy.deepcopy(memory)",
    "pickle": "memory = pickle.loads(pickle.dumps(memory))",
    "export": """\
need(memory, "export", "restore")
memory = mpicomp.memory(case.spec, case.like)
memory.restore(original.export())""",
}
REFUSED = {
    "plain": "mpicomp.allreduce(comm, *bad)",
    "i plain": "mpicomp.iallreduce(comm, *bad).wait()",
    "memory": "mpicomp.allreduce(comm, *bad, memory=memory)",
    "i memory": "mpicomp.iallreduce(comm, *bad, memory=memory).wait()",
    "plan": "mpicomp.plan(comm, *bad)",
    "hook": "Trainer(case.like, bad[1])",
}
REFUSED |= {"started plan": REFUSED["plan"], "plan with memory": REFUSED["plan"]}
NAMES = {entry: made.split(" = ")[0] for entry, made in MAKE.items()}  # of what lasts from step to step
KINDS = ("op", "spec", "dtype", "length")


def said(combination: Combination) -> str:
    """A combination in one line."""
    return " | ".join(f"{name}: {value}" for name, value in combination.items())


def head(combination: Combination) -> str:
    """What a program begins with that is printed, and that does without the suite's job."""
    return HEAD.format(ranks=combination["ranks"], said=said(combination))


def program(combination: Combination) -> str:
    """The text of a combination's program, which finds the user's communicator under the name `comm`."""
    entry = combination["entry"]
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
    lines = [IMPORTS, *(["from product.trainer import Trainer"] if entry == "hook" else [])]
    lines += [f"nodes(comm, {combination['nodes']!r})"] if combination["nodes"] != "one" else []
    lines += [f"case = Case({', '.join(arguments)})", MAKE[entry], "\n", *_run(entry), "\n"]
    return "\n".join([*lines, *_story(combination, seed)]) + "\n"


def _run(entry: str) -> list[str]:
    """The function that does steps."""
    return [
        "def run(comm, steps):",
        "    for step in steps:",
        "        x = case.before(case.x(comm, step))",
        STEPS[entry],
    ]


def _story(combination: Combination, seed: int) -> list[str]:
    """What happens: steps, something, and steps again."""
    before, long = combination["before"], combination["shape"] == "groups"
    first, then = "run(comm, range(3))", "run(comm, range(3, 5))"
    if long:
        first, then = "run(comm, range(1))", "run(comm, range(1, 2))"
    if before == "nothing":
        return [first, then]
    if before == "auto changes":
        return ["run(comm, range(80))"]
    if before in MOVED:
        return [first, *_moved(combination, then)]
    if before == "another communicator":
        return [first, *_on_another(combination, then.replace("comm", "other")), "run(comm, range(5, 6))"]
    if before in ("another size", "another order"):
        return [first, *_elsewhere(before, then.replace("comm", "other"))]
    if before == "a refused call":
        kind = "spec" if combination["entry"] == "hook" else KINDS[seed % len(KINDS)]
        call = REFUSED[combination["entry"]]
        return [first, f"bad = bad_call(case, comm, {kind!r})", f"refused(comm, lambda: {call})", then]
    assert before == "another length"
    return [first, *_another_length(combination["entry"]), then]


def _moved(combination: Combination, then: str) -> list[str]:
    """Go on with a copy, and then with the original again, which must do the same."""
    name, before = NAMES[combination["entry"]], combination["before"]
    how = f"trainer = trainer.moved({before!r}, case.spec)" if name == "trainer" else MOVED[before]
    lines = [f"original = {name}", how, "start, case.steps = case.owed, []", then]
    if "auto" in spec_of(combination):  # what it chooses depends on times
        return lines
    again = ["moved, case.steps, case.owed = case.steps, [], start", f"{name} = original", then]
    return [*lines, *again, "assert moved == case.steps, 'it did not go on as the original does'"]


def _on_another(combination: Combination, then: str) -> list[str]:
    """Go on with a memory on a duplicate; a plan has its communicator, so there it is another."""
    nodes = combination["nodes"]
    other = f"other = nodes(comm.Dup(), {nodes!r})" if nodes != "one" else "other = comm.Dup()"
    if NAMES[combination["entry"]] != "plan":
        return [other, then, "other.Free()"]
    made = MAKE[combination["entry"]].replace("comm", "other")
    back = "plan, case.owed = original, owed"
    return [other, "original, owed, case.owed = plan, case.owed, None", made, then, back, "other.Free()"]


def _elsewhere(before: str, then: str) -> list[str]:
    """Go on with a memory where the ranks are others, and here again, if all were refused there."""
    how = "comm.Split(comm.rank % 2, comm.rank)" if before == "another size" else "comm.Split(0, -comm.rank)"
    return [
        f"other = {how}",
        f"gone = right_or_refused(comm, other, lambda: {then})",
        "other.Free()",
        "if all(comm.allgather(gone)):",
        "    run(comm, range(5, 6))",
    ]


def _another_length(entry: str) -> list[str]:
    """Do the same with other arrays, and offer these to a memory that is not theirs."""
    name = NAMES[entry]
    lines = ["kept, case = case, case.other(shapes=[(31,)], listed=False)", "run(comm, range(2))"]
    if name:
        lines = [f"original = {name}", lines[0], MAKE[entry], lines[1], f"{name} = original"]
    if name == "memory":
        call = REFUSED[entry].replace("*bad", "case.x(comm, 0), case.spec, case.op")
        lines.append(f"refused(comm, lambda: {call})")
    return [*lines, "case = kept"]
