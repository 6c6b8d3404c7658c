"""The top of the package: its names, their signatures and docstrings, and the list of methods."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
import typing

import numpy as np
import pytest

import mpicomp
from mpicomp.errors import MPICompError
from mpicomp.registry import ALIASES, CODECS, REDUCERS, parse

MOVES = ["allreduce", "reduce_scatter", "allgather", "bcast", "gather", "scatter", "alltoall"]
BOTH = [*MOVES, *(f"i{name}" for name in MOVES)]


def test_the_collectives_come_first() -> None:
    assert mpicomp.__all__[: len(BOTH)] == BOTH
    with pytest.raises(AttributeError, match="no attribute 'barrier'"):
        mpicomp.barrier  # noqa: B018


def test_all_names_are_there_in_a_new_process() -> None:
    """Completion shows them, each is loaded when it is first used, and nothing heavy is loaded before."""
    code = (
        "import sys, mpicomp\n"
        "assert set(mpicomp.__all__) <= set(dir(mpicomp))\n"
        "assert not {'numpy', 'numba', 'mpi4py', 'torch'} & set(sys.modules), 'heavy'\n"
        "for name in mpicomp.__all__: getattr(mpicomp, name)\n"
        "mpicomp.codecs.TopK(density=0.01), mpicomp.reducers.Dense(), mpicomp.frames.frame, mpicomp.errors.SpecError\n"
        "from mpicomp import *\n"
        "assert callable(memory) and callable(plan)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_errors_have_one_base() -> None:
    for name in ("CommunicatorError", "ConfigMismatchError", "SpecError", "WireFormatError"):
        assert issubclass(getattr(mpicomp, name), MPICompError)
        assert getattr(mpicomp, name) is getattr(mpicomp.errors, name)


@pytest.mark.parametrize("name", [*BOTH, "plan"])
def test_both_forms_show_their_signature_and_docstring(name: str) -> None:
    function = getattr(mpicomp, name)
    assert (function.__name__, function.__qualname__) == (name, name)
    first, *others = inspect.signature(function).parameters.values()
    assert (first.name, first.annotation) == ("comm", "Any")
    assert others[0].name in ("x", "like")
    assert "Collective." in function.__doc__
    hints = typing.get_type_hints(function)
    if name in MOVES:
        request = getattr(mpicomp, f"i{name}")
        assert inspect.signature(request).parameters == inspect.signature(function).parameters
        assert typing.get_type_hints(request)["return"] == mpicomp.Request[hints["return"]]
        assert f"Begin `{name}`" in request.__doc__


def test_help_shows_the_collectives() -> None:
    text = pydoc.plain(pydoc.render_doc(mpicomp))
    for name in [*BOTH, "plan", "memory", "methods", "reset"]:
        assert f"\n    {name}(" in text, name
    for name in ("Arrays", "Method"):
        assert hasattr(mpicomp, name)


def test_a_call_with_a_missing_argument_names_the_function() -> None:
    from team import Team

    def call(comm: typing.Any) -> None:
        with pytest.raises(TypeError, match=r"allreduce\(\) missing 1 required positional argument: 'method'"):
            mpicomp.allreduce(comm, np.ones(3))  # type: ignore[call-arg]

    Team(2).run(call)


def test_methods_are_those_of_the_registry() -> None:
    found = mpicomp.methods()
    assert [each.name for each in found if each.kind == "codec"] == list(CODECS)
    assert {each.name for each in found if each.kind in ("reducer", "policy")} == set(REDUCERS)
    assert {each.name: each.summary for each in found if each.kind == "alias"} == ALIASES
    assert {each.name for each in found if each.kind == "policy"} == {
        *("after", "by_name", "decay", "error_feedback", "hierarchical", "joined", "masked"),
        *("momentum_correction", "partition", "warmup"),
    }


@pytest.mark.parametrize("entry", mpicomp.methods(), ids=lambda entry: entry.name)
def test_an_entry_says_what_its_class_does(entry: typing.Any) -> None:
    assert entry.summary
    assert len(entry.summary) < 120
    if entry.kind == "alias":
        return
    cls = {**CODECS, **REDUCERS}[entry.name]
    parameters = list(inspect.signature(cls).parameters.values())
    assert [argument.name for argument in entry.arguments] == [parameter.name for parameter in parameters]
    for argument, parameter in zip(entry.arguments, parameters, strict=True):
        assert (argument.default is None) == (parameter.default is inspect.Parameter.empty)
        assert argument.name in str(entry)
    assert entry.summary in str(mpicomp.methods())


def test_bits_per_element() -> None:
    bits = {each.name: each.bits for each in mpicomp.methods()}
    assert bits["mxfp8"] == 8.25
    assert 1 <= (bits["sign"] or 0) < 1.001
    assert bits["topk"] is None
    assert bits["dense"] is None
    assert parse("sign") == mpicomp.codecs.Sign()


def test_papers_are_read_from_the_docstrings() -> None:
    papers = {each.name: each.paper for each in mpicomp.methods()}
    assert papers["threshold"] == "Strom 2015"
    assert "Li, Hoefler, PPoPP'22" in papers["split"]
    assert papers["error_feedback"] == "Seide et al. 2014; Karimireddy et al. 2019"
    assert papers["after"] == ""
