"""Specs: the settings of a codec or a reducer as one line of text, in call syntax.

    error_feedback(gather(topk(density=0.01)))

A *member* is a frozen dataclass that inherits from `Spec`; its fields are its settings. `str(member)` prints it and
`parse` reads it back, `parse(str(member), ...) == member`. Only literals and known names are read: the text goes
through `ast` against a literal registry and is never evaluated. Length and depth are bounded, in both directions.

**How a member is printed.** Fields at their defaults are left out; a member without arguments prints as its bare
name. The leading fields that are required or hold members form the *head*; it is printed by position up to its last
member, `after(two_stage(uniform), steps=100)`, and everything else by keyword: `topk(density=0.01)`,
`partition(small=dense, large=low_rank(rank=4), min_size=1024)`.

**What else is read.** Any field by position or keyword, tuples and lists (both become tuples), an int for a float,
`inf` and `nan` for a float, and a bare name where the field is annotated `str`: `cast(dtype=bf16)`. An alias takes the
other arguments of what it stands for: `bf16(stochastic=True)`. A dict has texts for keys and members for values, which
may be specs in quotes: `by_name({'*.bias': dense, '*': 'topk(density=0.01)'})`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import keyword
import re
import threading
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar, Union

from mpicomp.errors import SpecError

MAX_CHARS = 10_000  # of a spec; far more than any real one has
MAX_DEPTH = 50  # members and tuples inside each other, signs before a number
MAX_BITS = 1100  # of an integer; far more than a float can hold

# Python before 3.11.8 and 3.12.2 counts the depth of one `ast.parse` beside another thread's and raises SystemError
# (gh-106905). Reentrant, because the garbage collector may run a finalizer amid parsing.
_one_at_a_time = threading.RLock()


T = TypeVar("T")


class Frozen(Mapping[str, T]):
    """A dict as a field of a member: it never changes, and its order counts in comparisons."""

    def __init__(self, items: Mapping[str, T]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and list(self._items.items()) == list(other._items.items())

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


class Spec:
    """Mixin for the frozen dataclass of a member: prints it as a spec."""

    spec_name: ClassVar[str]

    def __str__(self) -> str:
        """Print the spec, which `parse` reads back to an equal member."""
        known = vars(self)  # a member never changes, and its spec names it in every operation
        if "_printed" not in known:
            known["_printed"] = self._print(0)
        printed: str = known["_printed"]
        return printed

    def _print(self, depth: int) -> str:
        cls: Any = type(self)
        settings = _settings_of(cls)
        values = [getattr(self, setting.name) for setting in settings]
        texts = [_text(value, each.kinds, depth + 1) for value, each in zip(values, settings, strict=True)]
        shown = [text != each.default for each, text in zip(settings, texts, strict=True)]
        head = 0
        for place, (setting, value) in enumerate(zip(settings, values, strict=True)):
            if not setting.by_position or not (setting.default is None or _holds_member(value)):
                break
            if shown[place] and _holds_member(value):
                head = place + 1
        rest = list(zip(settings, texts, shown, strict=True))[head:]
        arguments = texts[:head] + [f"{each.name}={text}" for each, text, show in rest if show]
        return f"{self.spec_name}({', '.join(arguments)})" if arguments else self.spec_name


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


Kinds = frozenset[str] | None
"""The kinds of value of a field, of "int", "float", "bool", "str", "tuple", "dict", "none" and "member"; None: any."""

_SIMPLE: dict[Any, str] = {int: "int", float: "float", bool: "bool", str: "str", type(None): "none"}
_SIMPLE |= {tuple: "tuple", dict: "dict", Mapping: "dict"}


class _Setting(NamedTuple):
    """A field of a member."""

    name: str
    kinds: Kinds
    by_position: bool
    default: str | None
    """The text of the default; None where a value is required."""


@functools.cache
def _settings_of(cls: Any) -> tuple[_Setting, ...]:
    fields = [field for field in dataclasses.fields(cls) if field.init]
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # a name that exists for type checkers only, or in a function: judge by the text alone
        builtin = {"int": int, "float": float, "bool": bool, "str": str}
        hints = {f.name: builtin.get(f.type, Any) if isinstance(f.type, str) else f.type for f in fields}
    kinds = [_kinds_of(hints[field.name]) for field in fields]
    return tuple(
        _Setting(field.name, each, not field.kw_only, _default_text(field, each))
        for field, each in zip(fields, kinds, strict=True)
    )


def _kinds_of(hint: Any) -> Kinds:
    if hint in _SIMPLE:
        return frozenset({_SIMPLE[hint]})
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = [_kinds_of(part) for part in typing.get_args(hint)]
        return None if None in parts else frozenset().union(*(part for part in parts if part is not None))
    if origin is Literal:
        return frozenset(_SIMPLE[type(value)] for value in typing.get_args(hint))
    if origin is not None:
        return frozenset({_SIMPLE[origin]}) if origin in (tuple, Mapping) else None
    return frozenset({"member"}) if isinstance(hint, type) and hint not in (object, Any) else None


def _default_text(field: dataclasses.Field[Any], kinds: Kinds) -> str | None:
    if field.default is not dataclasses.MISSING:
        return _text(field.default, kinds, 0)
    return None if field.default_factory is dataclasses.MISSING else _text(field.default_factory(), kinds, 0)


def _holds_member(value: Any) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return isinstance(value, Spec) or any(map(_holds_member, inside))


def _text(value: Any, kinds: Kinds, depth: int) -> str:
    """Print the value of a field. Equal texts mean equal values of one type, so defaults are compared by text."""
    if depth > MAX_DEPTH:
        raise SpecError(f"a member is nested deeper than {MAX_DEPTH} levels, too deep for a spec")
    if isinstance(value, Spec):
        return value._print(depth)
    if isinstance(value, tuple):
        return "(" + ", ".join(_text(item, None, depth + 1) for item in value) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{str(key)!r}: {_text(item, None, depth + 1)}" for key, item in value.items()) + "}"
    if isinstance(value, bool) or value is None:
        return repr(value)
    becomes_float = kinds is not None and "float" in kinds and "int" not in kinds and not isinstance(value, str)
    if isinstance(value, float) or becomes_float:
        return repr(float(value))  # a NumPy scalar prints as a plain number
    if isinstance(value, str):
        bare = _is_name_field(kinds) and value.isidentifier() and value.isascii()
        return value if bare and not keyword.iskeyword(value) else repr(str(value))
    number = int(value)
    return str(number) if number.bit_length() <= MAX_BITS else hex(number)  # Python refuses to print longer decimals


def _is_name_field(kinds: Kinds) -> bool:
    """Tell whether a bare name in this field is a string: it takes strings and no members."""
    return kinds is not None and "str" in kinds and "member" not in kinds


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
                if _is_name_field(kinds):
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
                self.fail(f"the values of a dict are methods, such as dense, got {_text(value, None, 0)}", item)
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
        fields = {setting.name: setting for setting in _settings_of(cls)}
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
        kind = "member" if isinstance(value, Spec) else _SIMPLE.get(type(value), "member")
        if kind == "int" and "int" not in kinds and "float" in kinds:
            try:
                return float(value)
            except OverflowError as error:
                self.fail(f"{field} is too large for a float", node, "", error)
        if kind not in kinds:
            words = {"int": "an integer", "float": "a number", "bool": "True or False", "str": "a name", "none": "None"}
            words |= {"tuple": "a tuple", "dict": "a dict", "member": "a codec or reducer"}
            wanted = " or ".join(words[each] for each in words if each in kinds)
            self.fail(f"{field} must be {wanted}, got {_text(value, kinds, 0) if kind != 'str' else repr(value)}", node)
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
