"""Specs print and read back, and what cannot be read says where, why, and which names are known."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import sys
import textwrap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicomp.errors import SpecError
from mpicomp.specs import MAX_DEPTH, Frozen, Spec, parse


class Member(Protocol):
    linear: bool


@dataclass(frozen=True)
class TopK(Spec):
    spec_name: ClassVar[str] = "topk"
    density: float
    values: str = "fp32"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")


@dataclass(frozen=True)
class Uniform(Spec):
    spec_name: ClassVar[str] = "uniform"
    bits: int = 4
    block: int = 256
    stochastic: bool = False
    rounding: Literal["nearest", "up"] = "nearest"
    bound: float | None = None


@dataclass(frozen=True)
class Sign(Spec):
    spec_name: ClassVar[str] = "sign"


@dataclass(frozen=True)
class Cast(Spec):
    spec_name: ClassVar[str] = "cast"
    dtype: str


@dataclass(frozen=True)
class Dense(Spec):
    spec_name: ClassVar[str] = "dense"


@dataclass(frozen=True)
class Gather(Spec):
    spec_name: ClassVar[str] = "gather"
    codec: Member


@dataclass(frozen=True)
class TwoStage(Spec):
    spec_name: ClassVar[str] = "two_stage"
    codec: Member = Uniform()


@dataclass(frozen=True)
class ErrorFeedback(Spec):
    spec_name: ClassVar[str] = "error_feedback"
    reducer: Member


@dataclass(frozen=True)
class After(Spec):
    spec_name: ClassVar[str] = "after"
    steps: int
    reducer: Member
    quiet: bool = False


@dataclass(frozen=True)
class Partition(Spec):
    spec_name: ClassVar[str] = "partition"
    small: Member
    large: Member
    min_size: int = 512
    min_ndim: int = 2


@dataclass(frozen=True)
class Warmup(Spec):
    spec_name: ClassVar[str] = "warmup"
    densities: tuple[float, ...]
    reducer: Member
    then: Member | None = None


@dataclass(frozen=True)
class ByName(Spec):
    spec_name: ClassVar[str] = "by_name"
    rules: tuple[tuple[str, Member], ...]


@dataclass(frozen=True)
class Rules(Spec):
    spec_name: ClassVar[str] = "rules"
    rules: Mapping[str, Member]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", Frozen(self.rules))


MEMBERS = (TopK, Uniform, Sign, Cast, Dense, Gather, TwoStage, ErrorFeedback, After, Partition, Warmup, ByName, Rules)
REGISTRY: dict[str, type[Any]] = {cls.spec_name: cls for cls in MEMBERS}
ALIASES = {"fp16": "cast(dtype=fp16)", "bf16": "cast(dtype=bf16)"}


def read(text: str) -> Any:
    return parse(text, REGISTRY, ALIASES)


PRINTED = {
    "dense": Dense(),
    "topk(density=0.01)": TopK(0.01),
    "topk(density=1e-05, values=bf16)": TopK(1e-5, "bf16"),
    "topk(density=0.5, values='not a name')": TopK(0.5, "not a name"),
    "topk(density=0.5, values='None')": TopK(0.5, "None"),
    "cast(dtype=bf16)": Cast("bf16"),
    "uniform": Uniform(),
    "uniform(bits=3, stochastic=True)": Uniform(3, stochastic=True),
    "uniform(rounding=up, bound=-0.5)": Uniform(rounding="up", bound=-0.5),
    "uniform(bound=inf)": Uniform(bound=math.inf),
    "two_stage": TwoStage(),
    "two_stage(sign)": TwoStage(Sign()),
    "error_feedback(gather(topk(density=0.01)))": ErrorFeedback(Gather(TopK(0.01))),
    "error_feedback(two_stage(uniform(bits=2)))": ErrorFeedback(TwoStage(Uniform(2))),
    "after(100, two_stage)": After(100, TwoStage()),
    "after(100, gather(sign), quiet=True)": After(100, Gather(Sign()), True),
    "partition(dense, gather(sign), min_size=1024)": Partition(Dense(), Gather(Sign()), 1024),
    "warmup((0.25, 0.0625), dense)": Warmup((0.25, 0.0625), Dense()),
    "warmup((0.25,), dense, sign)": Warmup((0.25,), Dense(), Sign()),
    "by_name((('*.bias', dense), ('*', gather(sign))))": ByName((("*.bias", Dense()), ("*", Gather(Sign())))),
    "rules({'*.bias': dense, '*': gather(sign)})": Rules({"*.bias": Dense(), "*": Gather(Sign())}),
}


@pytest.mark.parametrize("text", PRINTED)
def test_printed_form(text: str) -> None:
    assert str(PRINTED[text]) == text
    assert read(text) == PRINTED[text]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("topk(0.01)", "topk(density=0.01)"),
        ("topk(1)", "topk(density=1.0)"),
        ("topk(density=+1, values='fp32')", "topk(density=1.0)"),
        (" gather( codec = sign() ) ", "gather(sign)"),
        ("bf16", "cast(dtype=bf16)"),
        ("gather(fp16)", "gather(cast(dtype=fp16))"),
        ("uniform(bits=0x3, block=256)", "uniform(bits=3)"),
        ("warmup([0.25, 0.5], dense)", "warmup((0.25, 0.5), dense)"),
        ("cast(dtype=sign)", "cast(dtype=sign)"),
        ("gather(\n    topk(density=0.5)\n)", "gather(topk(density=0.5))"),
        ("rules(rules={'a\\'': ' gather(bf16)', \"b\": sign})", "rules({\"a'\": gather(cast(dtype=bf16)), 'b': sign})"),
    ],
)
def test_further_forms_are_read(text: str, printed: str) -> None:
    assert str(read(text)) == printed


def test_numpy_scalars_and_ints_print_as_the_field_takes_them() -> None:
    assert str(TopK(np.float64(0.1))) == "topk(density=0.1)"
    assert str(TopK(1)) == "topk(density=1.0)"
    assert str(Uniform(np.int64(3))) == "uniform(bits=3)"


def test_a_dict_in_a_member_is_a_value() -> None:
    """Copies are equal and have one hash; the order of its items counts, as it does where rules are tried in turn."""
    member = Rules({"a": Dense(), "b": Sign()})
    for copied in (copy.deepcopy(member), pickle.loads(pickle.dumps(member)), Rules(dict(member.rules))):
        assert copied == member
        assert hash(copied) == hash(member)
    assert Rules({"b": Sign(), "a": Dense()}) != member
    with pytest.raises(TypeError):
        member.rules["c"] = Sign()  # type: ignore[index]


codecs = st.one_of(
    st.builds(TopK, st.floats(0, 1, exclude_min=True), st.text()),
    st.builds(
        Uniform,
        st.integers(-(2**70), 2**70),
        st.integers(),
        st.booleans(),
        st.sampled_from(["nearest", "up"]),
        st.none() | st.floats(allow_nan=False),
    ),
    st.builds(Sign),
    st.builds(Cast, st.sampled_from(["fp16", "bf16", "inf", "True", "sign", "a b", "é", "'", "\\", "\ud800"])),
)
members = st.recursive(
    codecs,
    lambda inner: st.one_of(
        st.builds(Gather, inner),
        st.builds(TwoStage, inner),
        st.builds(After, st.integers(), inner, st.booleans()),
        st.builds(Partition, inner, inner, st.integers(0), st.integers(0)),
        st.builds(
            Warmup, st.lists(st.floats(allow_nan=False), max_size=3).map(tuple), inner, st.one_of(st.none(), inner)
        ),
        st.builds(ByName, st.lists(st.tuples(st.text(), inner), max_size=3).map(tuple)),
        st.builds(Rules, st.dictionaries(st.text(), inner, max_size=3)),
    ),
    max_leaves=6,
)


@given(members)
def test_round_trip(member: Any) -> None:
    text = str(member)
    assert parse(text, REGISTRY) == member
    assert str(parse(text, REGISTRY)) == text


@given(st.text(max_size=60) | st.text("topksign(=),.01'[]-+* {}\n\\", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        member = read(text)
    except SpecError as error:
        assert "^" in str(error)  # noqa: PT017 (both ways are right)
    else:
        assert read(str(member)) == member


KNOWN = (
    "known names: after, bf16, by_name, cast, dense, error_feedback, fp16, gather, partition, rules, sign, topk,"
    " two_stage, uniform, warmup"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "error_feedback(gather(topq(density=0.01)))",
            f"""
            unknown name 'topq'; did you mean 'topk'?
                error_feedback(gather(topq(density=0.01)))
                                      ^
            {KNOWN}""",
        ),
        (
            "gather(topk(density=1.5))",
            """
            density must be in (0, 1], got 1.5
                gather(topk(density=1.5))
                            ^""",
        ),
        (
            "topk(0.5, values=fp32, densty=1)",
            """
            topk has no argument 'densty'; did you mean 'density'?
                topk(0.5, values=fp32, densty=1)
                                       ^
            topk takes: density, values""",
        ),
        (
            "gather(sign, 3)",
            """
            gather takes 1 argument by position, got 2
                gather(sign, 3)
                             ^
            gather takes: codec""",
        ),
        (
            "sign(1)",
            """
            sign takes 0 arguments by position, got 1
                sign(1)
                     ^
            sign takes no arguments""",
        ),
        (
            "gather(topk)",
            """
            topk needs 'density'
                gather(topk)
                       ^
            topk takes: density, values""",
        ),
        (
            "topk(0.5, density=0.5)",
            """
            argument 'density' of topk is given twice
                topk(0.5, density=0.5)
                          ^""",
        ),
        (
            "topk(density='much')",
            """
            density must be a number, got 'much'
                topk(density='much')
                     ^""",
        ),
        (
            "uniform(bits=2.5)",
            """
            bits must be an integer, got 2.5
                uniform(bits=2.5)
                        ^""",
        ),
        (
            "rules({'a': dense, 1: sign})",
            """
            the keys of a dict are texts in quotes, such as '*.bias'
                rules({'a': dense, 1: sign})
                                   ^""",
        ),
        (
            "rules({'a': dense, 'a': sign})",
            """
            'a' is twice in the dict
                rules({'a': dense, 'a': sign})
                                   ^""",
        ),
        (
            "rules({'a': 3})",
            """
            the values of a dict are methods, such as dense, got 3
                rules({'a': 3})
                            ^""",
        ),
        (
            "gather(0.01)",
            """
            codec must be a codec or reducer, got 0.01
                gather(0.01)
                       ^""",
        ),
        (
            "topk(density=sign)",
            """
            density must be a number, got sign
                topk(density=sign)
                     ^""",
        ),
        (
            "fp16(2)",
            """
            fp16 stands for cast(dtype=fp16) and takes no arguments by position
                fp16(2)
                ^""",
        ),
        (
            "fp16(dtype=bf16)",
            """
            argument 'dtype' of cast is given twice
                fp16(dtype=bf16)
                     ^""",
        ),
        (
            "gather(sign",
            f"""
            not a spec: '(' was never closed
                gather(sign
                      ^
            {KNOWN}""",
        ),
        (
            "0.01",
            f"""
            a spec is a name or a call, such as topk(density=0.01)
                0.01
                ^
            {KNOWN}""",
        ),
        (
            "topk(density=1/100)",
            f"""
            a spec holds numbers, strings, True, False, None, tuples, dicts and known names, nothing else
                topk(density=1/100)
                             ^
            {KNOWN}""",
        ),
        (
            "cast('é', ü)",
            """
            cast takes 1 argument by position, got 2
                cast('é', ü)
                          ^
            cast takes: dtype""",
        ),
        (
            "gather(\n  topk(density=3))",
            """
            density must be in (0, 1], got 3.0
                  topk(density=3))
                       ^""",
        ),
    ],
)
def test_message(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(text)
    assert str(caught.value) == textwrap.dedent(message).strip()


def test_empty_spec() -> None:
    for text in ("", "  \n"):
        with pytest.raises(SpecError, match="the spec is empty") as caught:
            read(text)
        assert str(caught.value).endswith(KNOWN)


def test_the_members_own_error_is_the_cause() -> None:
    with pytest.raises(SpecError) as caught:
        read("topk(density=0)")
    assert type(caught.value.__cause__) is ValueError
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()",
        "topk(density=__import__('os').getpid())",
        "topk(**{'density': 1})",
        "gather(*[sign])",
        "(lambda: sign)()",
        "topk(density=[0.5 for _ in sign])",
        "topk(f'{sign}')",
        "sign if 1 else dense",
        "(sign := dense)",
        "sign; dense",
        "topk(density=1j)",
        "topk(b'x')",
        "topk(...)",
    ],
)
def test_nothing_is_evaluated(text: str) -> None:
    with pytest.raises(SpecError):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        "-" * 9000 + "1",
        "(" * 3000 + "1",
        "gather(" * 80 + "sign" + ")" * 80,
        "topk(" + "[" * 150 + "]" * 150 + ")",
        "a" + ".a" * 4000,
        "[x]" * 3000,
        "x" * 1_000_000,
        "topk(density=1" + "0" * 400 + ")",
        "topk(density=" + "9" * 5000 + ")",
        "topk(density='\0')",
        "topk(density='\ud800')",
        "(" * 100_000,
        "(" * 100_000 + "sign" + ")" * 100_000,
        "-" * 100_000 + "1",
        "topk(density=" + "-" * 9000 + "1)",
        "topk(density=" + "-" * 60 + "1)",
        "topk(density=" + "~" * 5000 + "1)",
        "topk(density=1" + "+1" * 4000 + ")",
        "topk(density=1" + "**1" * 3000 + ")",
        "topk(density=" + "not " * 2000 + "1)",
        "sign" + "[0]" * 3000,
        "sign" + "()" * 4000,
        "topk(density=0x" + "f" * 900 + ")",
        "topk(values=0x" + "f" * 900 + ")",
        "warmup(" + "(" * 60 + "1" + ",)" * 60 + ", dense)",
    ],
    ids=lambda text: repr(text[:8]),
)
def test_monstrous_input(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "powersgd",
        "PowerSGD(rank=4)",
        "gather(Power_SGD)",
        "1bit",
        "gather(1bit)",
        "1-bit",
        "None",
    ],
)
def test_names_of_the_literature_get_a_hint(text: str) -> None:
    others = {"powersgd": "low_rank", "1bit": "sign", "none": "dense"}
    with pytest.raises(SpecError, match=r"; did you mean '(low_rank|sign|dense)'\?"):
        parse(text, REGISTRY, ALIASES, others)


def test_a_member_that_is_nested_too_deep_is_not_printed() -> None:
    member: Any = Dense()
    for _ in range(MAX_DEPTH):
        member = ErrorFeedback(member)
    assert read(str(member)) == member
    for more in (1, 100_000):
        for _ in range(more):
            member = ErrorFeedback(member)
        with pytest.raises(SpecError, match="nested deeper than 50 levels"):
            str(member)
    deep: Any = ()
    for _ in range(100_000):
        deep = (deep,)
    with pytest.raises(SpecError, match="nested deeper than 50 levels"):
        str(Warmup(deep, Dense()))
    with pytest.raises(SpecError, match="nested deeper than 50 levels"):
        str(Gather(ByName(((deep, Dense()),))))
    while deep:  # Python frees a deep tuple by recursion
        (deep,) = deep
    del member


def test_long_line_is_cut_around_the_place() -> None:
    text = "by_name((" + "('weight', dense), " * 30 + "('bias', dnse)))"
    with pytest.raises(SpecError) as caught:
        read(text)
    _, line, caret, _ = str(caught.value).splitlines()
    assert line[caret.index("^") :].startswith("dnse")


def test_not_a_string() -> None:
    with pytest.raises(TypeError, match="a spec is a string, got int"):
        parse(3, REGISTRY)  # type: ignore[arg-type]


class _Rests:
    """Lets other threads run whenever the garbage collector finds it."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        for _ in range(200):
            pass


def test_threads_read_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.7's parser trips over another thread's where the collector runs amid parsing (gh-106905)."""
    member = ByName((("*.bias", Dense()), ("*", ErrorFeedback(Gather(TopK(0.01))))))

    def many(_: int) -> None:
        for _ in range(200):
            _Rests()
            assert read(str(member)) == member

    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(20)
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(many, range(8)))
    finally:
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
