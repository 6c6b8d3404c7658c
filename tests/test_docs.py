"""Every public method is documented, where it is defined or in a base class (ruff ignores D102 for overrides)."""

from __future__ import annotations

import importlib
import inspect
import sys
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

PACKAGE = Path(__file__).parents[1] / "mpicomp"
PARTS = ["api", "codecs", "comm", "planner", "reducers", "torch", "models"]
EXEMPT = {
    "torch/identity.py",  # the methods are torch's, documented there
    "reducers/parts/batches.py",  # needs CuPy; its public methods are those of PerUnit
}
MODULES = [
    ".".join(("mpicomp", *path.with_suffix("").parts)).removesuffix(".__init__")
    for part in PARTS
    for path in sorted(each.relative_to(PACKAGE) for each in (PACKAGE / part).rglob("*.py"))
    if str(path) not in EXEMPT
]


def undocumented(module: ModuleType) -> list[str]:
    """The public methods and properties of a module's public classes without a docstring of their own or a base's."""
    found = []
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if cls.__module__ != module.__name__ or name.startswith("_"):
            continue
        for each, value in vars(cls).items():
            method = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            kinds = (FunctionType, property, cached_property)
            if isinstance(method, kinds) and not each.startswith("_") and not inspect.getdoc(getattr(cls, each)):
                found.append(f"{name}.{each}")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_public_methods_have_docstrings(name: str) -> None:
    if name.startswith(("mpicomp.torch", "mpicomp.models")):
        pytest.importorskip("torch")
    assert undocumented(importlib.import_module(name)) == []


class Base:
    def documented(self) -> None:
        """A docstring."""

    def plain(self) -> None: ...


class Derived(Base):
    def documented(self) -> None: ...

    @property
    def bare(self) -> int:
        return 0


def test_a_method_without_any_docstring_is_found() -> None:
    assert undocumented(sys.modules[__name__]) == ["Base.plain", "Derived.bare"]
