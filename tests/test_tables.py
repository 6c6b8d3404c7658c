"""Every codec, reducer and policy has its row in the contract suites, in the README and in the benchmarks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from codec_members import CODECS_TESTED
from golden import reference
from reducers.members import COMPOSED, MEMBERS, REPRESENTATIVES

from mpicomp.registry import ALIASES, CODECS, REDUCERS

ROOT = Path(__file__).parents[1]

ELSEWHERE = {"auto": "tests/reducers/test_auto.py", "vote": "tests/reducers/test_vote.py"}
"""What cannot be in the contract of reducers, and the tests that it has: what `auto` runs depends on times, and `vote`
declares that it holds no law."""

every_codec = pytest.mark.parametrize("name", CODECS)
every_reducer = pytest.mark.parametrize("name", REDUCERS)


def names_in(text: str) -> set[str]:
    """The members that a spec names; the name of a setting is none."""
    return set(re.findall(r"\b[a-z]\w*\b(?!\s*=)", text))


def rows_of_the_readme() -> set[str]:
    """The members in the first cells of the README's tables."""
    cells = [line.split(" | ")[0] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    specs = [spec for cell in cells for spec in re.findall(r"`([^`]+)`", cell)]
    return {match[0] for spec in specs if (match := re.match(r"[a-z]\w*", spec))}


def specs_of(program: str) -> str:
    """All specs in the constants of a benchmark, whatever folder holds it."""
    (path,) = (ROOT / "bench").rglob(program)
    constants = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    texts = [node.value for each in constants for node in ast.walk(each.value) if isinstance(node, ast.Constant)]
    return " ".join(text for text in texts if isinstance(text, str) and re.fullmatch(r"[a-z]\w*(\(.*\))?", text))


@every_codec
def test_a_codec_is_in_the_contract_suite(name: str) -> None:
    assert any(type(codec) is CODECS[name] for codec in CODECS_TESTED), (
        f"tests/codec_members.py: add {CODECS[name].__name__}(...) to CODECS_TESTED, a row per setting that changes "
        "what runs, and its bound to tests/codec_bounds.py"
    )


@every_codec
def test_a_codec_has_golden_messages(name: str) -> None:
    assert any(name == case for case, _, _ in reference.cases()), (
        f"tests/golden: write {name} in plain Python, add cases to reference.cases() and run tests/golden/make.py"
    )


@every_reducer
def test_a_reducer_is_in_the_contract_suite(name: str) -> None:
    if name in ELSEWHERE:
        assert f"{name}" in (ROOT / ELSEWHERE[name]).read_text()
        return
    assert any(name in names_in(spec) for spec in MEMBERS), (
        f"tests/reducers/members.py: add a spec with {name} to COMPRESSING, DENSE or (a policy) COMPOSED"
    )


def test_representatives_are_members() -> None:
    assert set(REPRESENTATIVES) <= set(MEMBERS)
    assert set(COMPOSED) <= set(REPRESENTATIVES)


@pytest.mark.parametrize("name", [*CODECS, *REDUCERS])
def test_a_member_has_a_row_in_the_readme(name: str) -> None:
    assert name in rows_of_the_readme(), f"README.md: add a row that begins with `{name}(...)` to a table of methods"


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_is_in_the_readme(name: str) -> None:
    assert f"`{name}`" in (ROOT / "README.md").read_text(), f"README.md: name `{name}` beside what it is short for"


@every_codec
def test_a_codec_is_in_the_benchmark_of_kernels(name: str) -> None:
    assert name in names_in(specs_of("kernels.py")), f"bench: add a spec of {name} to SPECS of kernels.py"


@every_reducer
def test_a_reducer_is_in_the_benchmark_of_collectives(name: str) -> None:
    assert name in names_in(specs_of("collectives.py")), (
        f"bench: add a spec with {name} to the lists of reducers in collectives.py"
    )


def test_rows_are_found() -> None:
    assert names_in("error_feedback(split(topk(density=0.1), dense=sign))") == {
        "error_feedback",
        "split",
        "topk",
        "sign",
    }
    assert "error_feedback" in rows_of_the_readme()
    assert "nothing" not in rows_of_the_readme()


def test_declared_attributes_name_the_members_that_have_them() -> None:
    """Code that needs a certain member asks for an attribute, which others may share one day."""
    assert [name for name, each in REDUCERS.items() if each.takes_integers] == ["dense"]
    assert not any(each.takes_integers for each in CODECS.values())
    assert [name for name, each in CODECS.items() if each.bounded] == ["bounded"]
    assert {name for name, each in CODECS.items() if each.selects} == {"topk", "blocktopk", "sampled_topk", "threshold"}
    adding = [str(codec) for codec in CODECS_TESTED if codec.adds_codes]
    assert adding
    assert all(spec.startswith("uniform") and "minmax" not in spec and "bits=1" not in spec for spec in adding)
    bounds = {str(codec): codec.bound for codec in CODECS_TESTED if codec.bound is not None}
    assert bounds
    assert all(spec == f"bounded(abs={bound})" for spec, bound in bounds.items())
