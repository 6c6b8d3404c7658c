"""Imports point down only, and each foreign library has its one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mpicomp"
SOURCES = {
    ".".join(("mpicomp", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Top to bottom. A module imports from lower lines, and from its own subpackage; never from a neighbour in its line.
LAYERS = [
    {"__main__"},
    {"torch", "federated", "models"},
    {"", "api"},  # "" is mpicomp/__init__.py
    {"registry"},
    {"planner"},
    {"reducers"},
    {"codecs", "comm"},
    {"kernels"},
    {"frames", "device"},
    {"wire", "environment"},
    {"cost", "arrays"},
    {"specs"},
    {"errors"},
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

PLACES = {
    "mpi4py": {"comm"},
    "torch": {"torch", "models"},
    "cupy": {"arrays", "kernels"},
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
}


def part(module: str) -> str:
    """The part of the package that a module belongs to: its second name."""
    return f"{module}.".split(".")[1]


def imported(source: str, module: str) -> Iterator[str]:
    """Every module that a source imports anywhere, also inside functions and by a name in a text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name == "mpicomp.__version__":  # a constant, set before anything else
                    continue
                yield name if name in SOURCES else str(node.module)
        elif isinstance(node, ast.Constant) and node.value in SOURCES and node.value != "mpicomp":
            yield str(node.value)  # a module's name in a table, which something imports later
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if function in ("import_module", "__import__"):
                yield from computed(node.args[0], f"{module}, line {node.lineno}")


def computed(argument: ast.expr, where: str) -> Iterator[str]:
    """The modules that an `import_module` may mean; of `f"mpicomp.{name}"` all that begin so."""
    if isinstance(argument, ast.Constant):
        assert not str(argument.value).startswith("."), f"{where}: relative import"
        yield str(argument.value)
        return
    parts = argument.values if isinstance(argument, ast.JoinedStr) else []
    start = parts[0].value if parts and isinstance(parts[0], ast.Constant) else ""
    assert str(start).startswith("mpicomp.") or where.startswith("mpicomp,"), f"{where}: say which module is imported"
    yield from (name for name in SOURCES if str(start) != "mpicomp." and start and name.startswith(str(start)))


def wrong_imports(module: str, source: str) -> list[str]:
    here = part(module)
    wrong = []
    for name in imported(source, module):
        top = name.partition(".")[0]
        if top in PLACES and here not in PLACES[top]:
            wrong.append(f"{module} imports {name}: only {', '.join(sorted(PLACES[top]))} may")
        if top != "mpicomp" or part(name) == here:
            continue
        if LEVELS[part(name)] <= LEVELS[here] and {here, part(name)} != {"", "api"}:
            wrong.append(f"{module} imports {name}, which is not below it")
    return wrong


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    assert part(module) in LEVELS, f"{module} has no layer: say in LAYERS where it belongs"
    assert wrong_imports(module, SOURCES[module].read_text()) == []


def test_every_layer_has_a_module() -> None:
    assert set(LEVELS) == {part(module) for module in SOURCES}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mpicomp.wire", "from mpicomp.codecs.base import Codec"),
        ("mpicomp.wire", "import mpicomp.kernels.cpu"),
        ("mpicomp.codecs.sign", "def f():\n    from mpicomp.comm import primitives"),
        ("mpicomp.reducers.gather", "import torch.distributed"),
        ("mpicomp.reducers.gather", "from mpi4py import MPI"),
        ("mpicomp.reducers.gather", "import mpicomp"),
        ("mpicomp.torch.hook", "import importlib\nimportlib.import_module('cupy.cuda')"),
        ("mpicomp.torch.hook", "LAZY = {'rounds': 'mpicomp.__main__'}"),
        ("mpicomp.wire", "from mpicomp import reducers"),
        ("mpicomp.wire", "from mpicomp import allreduce"),
        ("mpicomp.wire", "from mpicomp.kernels import cpu"),
        ("mpicomp.wire", "LAZY = {'gather': 'mpicomp.reducers.gather'}"),
        ("mpicomp.codecs.sign", "import importlib\nimportlib.import_module(f'mpicomp.reducers.{name}')"),
        ("mpicomp.reducers.gather", "__import__('mpi4py.MPI')"),
        ("mpicomp.federated.rounds", "from mpicomp.torch import hook"),
    ],
)
def test_wrong_imports_are_found(module: str, source: str) -> None:
    assert wrong_imports(module, source) != []


@pytest.mark.parametrize("argument", ["name", "f'{package}.gather'", "'.gather', 'mpicomp.reducers'", "'a' + 'b'"])
def test_an_import_that_cannot_be_read_is_refused(argument: str) -> None:
    with pytest.raises(AssertionError, match=r"mpicomp\.wire, line 2"):
        wrong_imports("mpicomp.wire", f"from importlib import import_module\nimport_module({argument})")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, mpicomp\n"
        "print(*sorted(m for m in sys.modules if m.partition('.')[0] in ('mpi4py', 'torch', 'cupy', 'numba')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
