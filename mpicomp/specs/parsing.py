"""The way back from a text: it is parsed as Python, and read node by node against what each member takes."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from mpicomp.errors import SpecError
from mpicomp.specs.printing import MAX_BITS, MAX_DEPTH, SIMPLE, Kinds, Spec, is_name_field, settings_of, text_of

MAX_CHARS = 10_000  # of a spec; far more than any real one has

# Python before 3.11.8 and 3.12.2 counts the depth of one `ast.parse` beside another thread's and raises SystemError
# (gh-106905). Reentrant, because the garbage collector may run a finalizer amid parsing.
_one_at_a_time = threading.RLock()


def parse(
    text: str,
    registry: Mapping[str, type[Any]],
    aliases: Mapping[str, str] | None = None,
    other_names: Mapping[str, str] | None = None,
) -> Any:
    """Read a spec: build the member that `text` describes.

    `registry` maps the names of members to their dataclasses, `aliases` further names to specs, as in
    `{"bf16": "cast(dtype=bf16)"}`. `other_names` maps names of the literature, in lower case without "_" and "-", to
    those known here; such a name is refused with a hint. Raises SpecError.
    """
    if not isinstance(text, str):
        raise TypeError(f"a spec is a string, got {type(text).__name__}")
    return _Parser(text.strip(), registry, aliases or {}, other_names or {}).parse()


@dataclasses.dataclass
class _Parser:
    text: str
    registry: Mapping[str, type[Any]]
    aliases: Mapping[str, str]
    other_names: Mapping[str, str]

    def parse(self) -> Any:
        if not self.text:
            self.fail("the spec is empty", None, self.known())
        if len(self.text) > MAX_CHARS:
            self.fail(f"the spec has {len(self.text)} characters; at most {MAX_CHARS} are read", None)
        try:
            with _one_at_a_time:
                body = ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            where = (error.lineno or 1, (error.offset or 1) - 1)
            meant = next(filter(None, map(self.meant, re.findall(r"[\w-]+", self.text))), "")  # 1bit is no Python name
            self.fail(f"not a spec: {error.msg}{meant}", where, self.known(), error)
        except (RecursionError, MemoryError, SystemError) as error:
            self.fail("the spec is nested too deeply", None, "", error)
        except ValueError as error:  # a null byte, a lone surrogate
            self.fail(f"not a spec: {error}", None, self.known(), error)
        if not isinstance(body, ast.Call | ast.Name):
            what = f"a spec is a name or a call, such as topk(density=0.01){self.meant(self.text)}"
            self.fail(what, body, self.known())
        return self.value(body, None, 0)

    def value(self, node: ast.expr, kinds: Kinds, depth: int) -> Any:
        """Read the value of a field that takes `kinds`, or a whole member."""
        if depth > MAX_DEPTH:
            self.fail(f"the spec is nested deeper than {MAX_DEPTH} levels", node)
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                if isinstance(value, int) and value.bit_length() > MAX_BITS:
                    self.fail(f"a number has more than {MAX_BITS} bits", node)
                return value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                number = self.value(operand, kinds, depth + 1)
                if isinstance(number, int | float) and not isinstance(number, bool):
                    return -number if isinstance(sign, ast.USub) else number
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return tuple(self.value(item, None, depth + 1) for item in items)
            case ast.Dict(keys=keys, values=items):
                return self.table(keys, items, depth)
            case ast.Name(id=name):
                if is_name_field(kinds):
                    return name
                if name in ("inf", "nan") and name not in self.registry and (kinds is None or "float" in kinds):
                    return float(name)
                return self.member(name, node, [], [], depth)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self.member(name, node, args, keywords, depth)
        what = "a spec holds numbers, strings, True, False, None, tuples, dicts and known names, nothing else"
        self.fail(what, node, self.known())

    def table(self, keys: Sequence[ast.expr | None], items: Sequence[ast.expr], depth: int) -> dict[str, Any]:
        """Read a dict of members by text; a member may be a spec in quotes."""
        found: dict[str, Any] = {}
        for key, item in zip(keys, items, strict=True):
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                self.fail("the keys of a dict are texts in quotes, such as '*.bias'", key or item)
            if key.value in found:
                self.fail(f"{key.value!r} is twice in the dict", key)
            value = self.value(item, None, depth + 1)
            if isinstance(value, str):
                value = dataclasses.replace(self, text=value.strip()).parse()
            if not isinstance(value, Spec):
                self.fail(f"the values of a dict are methods, such as dense, got {text_of(value, None, 0)}", item)
            found[key.value] = value
        return found

    def member(self, name: str, node: ast.expr, args: list[ast.expr], keywords: list[ast.keyword], depth: int) -> Any:
        """Build the member `name` from its arguments."""
        fixed: list[ast.keyword] = []
        if name in self.aliases and name not in self.registry:
            if args:
                self.fail(f"{name} stands for {self.aliases[name]} and takes no arguments by position", node)
            name, fixed = _meaning(self.aliases[name])
        if name not in self.registry:
            guess = self.meant(name) or _guess(name, self.names())
            self.fail(f"unknown name {name!r}{guess}", node, self.known())
        cls: Any = self.registry[name]
        fields = {setting.name: setting for setting in settings_of(cls)}
        takes = f"{name} takes: {', '.join(fields)}" if fields else f"{name} takes no arguments"

        nodes: dict[str, ast.expr | ast.keyword] = {}
        values: dict[str, Any] = {}
        by_position = [name for name, setting in fields.items() if setting.by_position]
        if len(args) > len(by_position):
            count = f"{len(by_position)} argument{'s' if len(by_position) != 1 else ''} by position"
            self.fail(f"{name} takes {count}, got {len(args)}", args[len(by_position)], takes)
        given: list[tuple[str, ast.expr | ast.keyword, ast.expr]] = [
            *((kw.arg or "", node, kw.value) for kw in fixed),
            *((field, arg, arg) for field, arg in zip(by_position, args, strict=False)),
            *((kw.arg or "**", kw, kw.value) for kw in keywords),
        ]
        for field, place, expression in given:
            if field not in fields:
                self.fail(f"{name} has no argument {field!r}{_guess(field, fields)}", place, takes)
            if field in values:
                self.fail(f"argument {field!r} of {name} is given twice", place)
            kinds = fields[field].kinds
            values[field] = self.checked(field, self.value(expression, kinds, depth + 1), kinds, place)
            nodes[field] = place
        missing = [each for each, setting in fields.items() if setting.default is None and each not in values]
        if missing:
            self.fail(f"{name} needs {' and '.join(map(repr, missing))}", node, takes)
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            first_word = (str(error).split() or [""])[0]
            self.fail(str(error) or repr(error), nodes.get(first_word, node), "", error)

    def checked(self, field: str, value: Any, kinds: Kinds, node: ast.AST) -> Any:
        """Return the value as the field takes it: an int becomes a float where only a float is taken."""
        if kinds is None:
            return value
        kind = "member" if isinstance(value, Spec) else SIMPLE.get(type(value), "member")
        if kind == "int" and "int" not in kinds and "float" in kinds:
            try:
                return float(value)
            except OverflowError as error:
                self.fail(f"{field} is too large for a float", node, "", error)
        if kind not in kinds:
            words = {"int": "an integer", "float": "a number", "bool": "True or False", "str": "a name", "none": "None"}
            words |= {"tuple": "a tuple", "dict": "a dict", "member": "a codec or reducer"}
            wanted = " or ".join(words[each] for each in words if each in kinds)
            given = repr(value) if kind == "str" else text_of(value, kinds, 0)
            self.fail(f"{field} must be {wanted}, got {given}", node)
        return value

    def meant(self, name: str) -> str:
        """Return the hint for a name of the literature, empty for any other."""
        known = self.other_names.get(name.lower().replace("_", "").replace("-", ""))
        return f"; did you mean {known!r}?" if known else ""

    def names(self) -> list[str]:
        return sorted({*self.registry, *self.aliases})

    def known(self) -> str:
        return f"known names: {', '.join(self.names())}"

    def fail(
        self, what: str, where: ast.AST | tuple[int, int] | None, hint: str = "", cause: BaseException | None = None
    ) -> NoReturn:
        """Raise SpecError: the fault, the text, a caret below the place, a hint."""
        at: Any = where
        row, column = (at.lineno, at.col_offset) if isinstance(where, ast.AST) else where or (1, 0)
        lines = self.text.splitlines() or [""]
        line = lines[min(row, len(lines)) - 1]
        if isinstance(where, ast.AST):
            column = len(line.encode()[:column].decode(errors="replace"))  # ast counts bytes
        column = max(0, min(column, len(line)))
        start = max(0, column - 60) if len(line) > 120 else 0
        shown = "".join(c if c.isprintable() else "?" for c in line[start : start + 120])
        message = f"{what}\n    {shown}\n    {' ' * (column - start)}^"
        raise SpecError(f"{message}\n{hint}" if hint else message) from cause


def _meaning(alias: str) -> tuple[str, list[ast.keyword]]:
    """Return the member that an alias stands for, a name or a call, and the arguments that it gives by keyword."""
    with _one_at_a_time:
        body: Any = ast.parse(alias, mode="eval").body
    called = hasattr(body, "func")
    return (body.func.id, body.keywords) if called else (body.id, [])


def _guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
