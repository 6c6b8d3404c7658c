"""What methods exist: read from the classes of codecs, reducers and policies, so that it cannot differ from them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import MISSING, dataclass
from typing import Any

from mpicomp import registry
from mpicomp.codecs.base import Codec
from mpicomp.reducers.policies import Policy

ELEMENTS = 1 << 20  # of the float32 array for which bits per element are given
PAPER = re.compile(r"[A-Z][\w-]+(?:(?:,| and|, and) [A-Z][\w-]+)*(?: et al\.)?,? (?:[A-Z][\w/-]+ ?'\d\d|(?:19|20)\d\d)")


@dataclass(frozen=True)
class Argument:
    """A setting of a method."""

    name: str
    kind: str
    """Its type, as in the source."""
    default: str | None
    """As a spec has it; None where it must be given."""

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}" + ("" if self.default is None else f" = {self.default}")


@dataclass(frozen=True)
class MethodInfo:
    """A codec, reducer, policy or alias."""

    name: str
    kind: str
    """"codec", "reducer", "policy", or "alias" for another name of a spec."""
    arguments: tuple[Argument, ...]
    bits: float | None
    """Bits per float32 element of a large array with default settings; None where settings decide, and for reducers."""
    summary: str
    paper: str
    doc: str

    @property
    def call(self) -> str:
        """The method with the arguments that must be given."""
        needed = ", ".join(f"{each.name}=" for each in self.arguments if each.default is None)
        return f"{self.name}({needed})" if needed else self.name

    def __str__(self) -> str:
        lines = [f"{self.kind} {self.call}: {self.doc}", ""]
        lines += [f"  {argument}" for argument in self.arguments]
        lines += [] if self.bits is None else [f"bits per element: {self.bits:.4g}, with defaults"]
        lines += [f"paper: {self.paper}"] if self.paper else []
        return "\n".join(lines)


class Methods(list[MethodInfo]):
    """A list that prints as a table."""

    def __str__(self) -> str:
        width = max((len(each.call) for each in self), default=0)
        lines = []
        for kind in dict.fromkeys(each.kind for each in self):
            lines.append(f"{kind:<{width + 2}}  bits  summary")
            for each in self:
                if each.kind == kind:
                    bits = "" if each.bits is None else f"{each.bits:.3g}"
                    lines.append(f"  {each.call:<{width}}{bits:>6}  {each.summary}")
        return "\n".join(lines)

    __repr__ = __str__


def methods() -> Methods:
    """Return all codecs, reducers and policies with their arguments, bits per element, a summary and the paper.

    `print(mpicomp.methods())` shows a table, and each entry prints with its arguments.
    """
    classes: dict[str, type[Any]] = {**registry.CODECS, **registry.REDUCERS}
    aliases = (MethodInfo(name, "alias", (), None, spec, "", spec) for name, spec in registry.ALIASES.items())
    return Methods([*(_info(name, cls) for name, cls in classes.items()), *aliases])


def _info(name: str, cls: type[Any]) -> MethodInfo:
    doc = inspect.getdoc(cls) or ""
    arguments = tuple(_argument(field) for field in dataclasses.fields(cls) if field.init)
    kind = "codec" if issubclass(cls, Codec) else "policy" if issubclass(cls, Policy) else "reducer"
    bits, summary = _bits(cls) if kind == "codec" else None, doc.partition("\n")[0]
    return MethodInfo(name, kind, arguments, bits, summary, _papers(cls, doc), doc)


def _bits(cls: type[Codec]) -> float | None:
    try:
        codec = cls()
    except (TypeError, ValueError):  # an argument must be given
        return None
    return 8 * sum(field.nbytes for field in codec.fields(ELEMENTS, "float32")) / ELEMENTS if codec.fixed else None


def _argument(field: dataclasses.Field[Any]) -> Argument:
    default = None
    if field.default is not MISSING:
        default = repr(field.default) if isinstance(field.default, str) else str(field.default)
    elif field.default_factory is not MISSING:
        default = str(field.default_factory())
    return Argument(field.name, str(field.type), default)


def _papers(cls: type[Any], doc: str) -> str:
    """Return the papers that a class names in its docstring, or else its module."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    for text in (doc, module):
        if found := PAPER.findall(" ".join(text.split())):
            return "; ".join(dict.fromkeys(found))
    return ""
