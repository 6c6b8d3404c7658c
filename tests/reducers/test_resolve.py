"""From a spec to the reducer that runs, and what ranks must agree on."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from reducers.members import CONTRACTIONS, LAYOUT, MEMBERS, UNBIASED, layout_of, member

from mpicomp.comm.agreement import float_mode
from mpicomp.errors import SpecError
from mpicomp.kernels import cpu
from mpicomp.reducers import Layout
from mpicomp.reducers.policies import After, ByName
from mpicomp.registry import REDUCERS, _arithmetic, describe, parse, resolve, resolve_partitioned

BIG = Layout.single((300, 100))
SMALL = Layout.single((40, 10))


@pytest.mark.parametrize("spec", MEMBERS)
def test_a_reducer_is_taken_literally(spec: str) -> None:
    for layout in (BIG, SMALL):
        assert resolve(spec, layout, "float32", 4) == member(spec)
        assert resolve(member(spec), layout, "float32", 4, memory=False) == member(spec)


BARE: list[tuple[str, Layout, int, str]] = [
    ("topk(density=0.1)", BIG, 2, "gather(topk(density=0.1))"),
    ("topk(density=0.1)", BIG, 3, "two_stage(topk(density=0.1))"),
    ("topk(density=0.01)", BIG, 3, "gather(topk(density=0.01))"),
    ("sign", BIG, 1, "gather(sign)"),
    ("sign", BIG, 5, "gather(sign)"),
    ("sign", BIG, 64, "two_stage(sign)"),
    ("uniform(bits=4)", BIG, 9, "two_stage(uniform(bits=4))"),
    ("uniform(bits=4)", SMALL, 9, "gather(uniform(bits=4))"),
    ("bf16", BIG, 9, "two_stage(cast(dtype=bf16))"),
    ("fp16", SMALL, 9, "gather(cast(dtype=fp16))"),
    ("randomk(density=0.1, scaled=False)", BIG, 2, "shared_support(randomk(density=0.1, scaled=False))"),
    ("randomk(density=0.1, scaled=False)", SMALL, 9, "shared_support(randomk(density=0.1, scaled=False))"),
]


@pytest.mark.parametrize(("spec", "layout", "ranks", "expected"), BARE)
def test_a_bare_codec_gets_its_reducer(spec: str, layout: Layout, ranks: int, expected: str) -> None:
    assert resolve(spec, layout, "float32", ranks, memory=False) == parse(expected)
    assert resolve(spec, layout, "float32", ranks) == parse(f"error_feedback({expected})")
    assert resolve(parse(spec), layout, "bfloat16", ranks) == parse(f"error_feedback({expected})")


def test_the_payload_of_all_units_together_decides() -> None:
    many = layout_of({f"unit {place}": (100,) for place in range(300)})
    assert resolve("sign", many, "float32", 4) == parse("error_feedback(two_stage(sign))")
    assert resolve("sign", layout_of({"unit": (100,)}), "float32", 4) == parse("error_feedback(gather(sign))")


@pytest.mark.parametrize("codec", UNBIASED)
def test_with_memory_an_unbiased_codec_contracts(codec: str) -> None:
    fed, alone = (resolve(codec, SMALL, "float32", 4, memory=memory) for memory in (True, False))
    assert all(each.contractive for each in fed.inner[0].codecs)
    assert str(fed).startswith("error_feedback(")
    assert alone.codecs == (parse(codec),)


@pytest.mark.parametrize("codec", CONTRACTIONS + UNBIASED)
def test_what_was_resolved_prints_and_resolves_to_itself(codec: str) -> None:
    for ranks in (2, 4):
        reducer = resolve(codec, BIG, "float32", ranks)
        assert parse(str(reducer)) == resolve(str(reducer), BIG, "float32", ranks) == reducer


SMALL_DENSE = "partition(small=dense(algorithm=two_shot)"
LITERAL = [
    "dense",
    "dense(algorithm=two_shot)",
    "partition(small=dense, large=two_stage(sign), min_size=7)",
    "after(partition(small=dense, large=gather(sign)), steps=3)",
]
MODEL = layout_of({"weight": (30, 20), "bias": (600,), "narrow": (4, 4)})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("topk(density=0.1)", f"{SMALL_DENSE}, large=error_feedback(gather(topk(density=0.1))))"),
        ("two_stage(sign)", f"{SMALL_DENSE}, large=two_stage(sign))"),
        ("after(two_stage(sign), steps=9)", f"{SMALL_DENSE}, large=after(two_stage(sign), steps=9))"),
        *((spec, spec) for spec in LITERAL),
    ],
)
def test_small_tensors_of_a_model_are_dense(spec: str, expected: str) -> None:
    assert resolve_partitioned(spec, MODEL, "float32", 4) == parse(expected)


@pytest.mark.parametrize(
    "method", ["topk(density=0.1)", "two_stage(sign)", "dense", "after(two_stage(sign), steps=9)", LITERAL[2]]
)
def test_a_method_in_by_name_means_what_it_means_alone(method: str) -> None:
    for resolver in (resolve, resolve_partitioned):
        alone = resolver(method, MODEL, "float32", 4)
        for named in ({"*": method}, {"*": parse(method)}, f"by_name({{'*': {method}}})", ByName({"*": alone})):
            assert resolver(named, MODEL, "float32", 4) == ByName({"*": alone})
    inside = resolve(After(ByName({"*": parse("sign")}), steps=3), MODEL, "float32", 4)
    assert inside == After(ByName({"*": resolve("sign", MODEL, "float32", 4)}), steps=3)


def test_the_units_of_a_rule_decide_what_its_codec_gets() -> None:
    """No unit is counted for a rule behind the one that it goes by."""
    layout = layout_of({"embed.weight": (1_000_000,), "line.weight": (60, 20), "line.bias": (20,)})
    resolved = resolve({"embed*": "sign", "*.weight": "sign", "*": "dense"}, layout, "float32", 4)
    kinds = {pattern: str(method) for pattern, method in cast(ByName, resolved).rules.items()}
    fed = "error_feedback({}(sign))"
    assert kinds == {"embed*": fed.format("two_stage"), "*.weight": fed.format("gather"), "*": "dense"}
    with pytest.raises(ValueError, match=r"no rule for line\.bias, only for 'embed\*', '\*\.weight'; add one, or '\*'"):
        resolve({"embed*": "sign", "*.weight": "sign"}, layout, "float32", 4)


def test_only_large_tensors_count_for_the_choice() -> None:
    layout = layout_of({"bias": (1_000_000,), "weight": (60, 20)})
    resolved = resolve_partitioned("uniform(bits=4)", layout, "float32", 4)
    assert "gather(uniform" in str(resolved)


@pytest.mark.parametrize("method", [3, None, object(), ["dense"]], ids=["int", "None", "object", "list"])
def test_other_methods_are_refused_by_type(method: Any) -> None:
    with pytest.raises(TypeError, match=type(method).__name__):
        resolve(method, BIG, "float32", 2)


@pytest.mark.parametrize("spec", ["dens", "topk(density=2)", "topk(0.1", "import os", "gather()", "topk()"])
def test_bad_specs_show_where(spec: str) -> None:
    with pytest.raises(ValueError, match=r"\^"):
        resolve(spec, BIG, "float32", 2)


def test_every_difference_shows_in_the_description() -> None:
    reducer, layout = member("gather(sign)"), LAYOUT
    base: tuple[Any, ...] = (reducer, layout, "float32", "sum", 0, 0)
    moved = Layout(tuple(unit._replace(offset=unit.offset + 1) for unit in layout.units))
    late = layout_of({**{unit.name: unit.shape for unit in layout.units}, "bias": (8,)})
    others: list[tuple[int, Any]] = [
        (0, member("two_stage(sign)")),
        (1, moved),
        (1, late),
        (2, "float16"),
        (3, "mean"),
        (4, 1),
        (5, 1),
    ]
    texts = {describe(*base)} | {describe(*base[:place], value, *base[place + 1 :]) for place, value in others}
    assert len(texts) == 1 + len(others)
    text = describe(*base)
    for part in ("sum of float32", "matrix[13, 11]", "gather(sign)", "endian", "mpicomp "):
        assert part in text


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_the_agreement_covers_the_kernels_of_every_reducer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose kernels compute otherwise has another digest: every kernel that a step runs is rehearsed."""
    specs = {
        "gather": "gather(uniform(bits=4))",
        "two_stage": "two_stage(topk(density=0.1), topk(density=0.1, values=bf16))",
        "shared_support": "shared_support(randomk(density=0.1))",
        "split": "split(topk(density=0.3), dense_after=0.5, dense=uniform(bits=8))",
        "tree": "tree(topk(density=0.2))",
        "auto": "auto(allow=(topk(density=0.1), integer))",
        "hierarchical": "hierarchical(two_stage(sign))",
        "error_feedback": "error_feedback(integer)",
        "after": "after(low_rank, steps=3)",
        "decay": "decay(error_feedback(integer), factor=0.5)",
        "joined": "joined(tree(topk(density=0.1)))",
        "partition": "partition(small=dense, large=integer)",
        "by_name": "by_name({'m*': integer, '*': dense})",
        "momentum_correction": "momentum_correction(integer, masking=False)",
        "warmup": "warmup(tree(topk(density=0.1)), densities=(0.5,), steps=3)",
    }
    reducer = cast(Any, parse(specs.get(name, name)))
    right = _arithmetic.__wrapped__(reducer, float_mode())
    own = {
        "split": ["add_marked", "collect"],
        "tree": ["merge", "select_top"],
        "integer": ["block_tops", "encode_blocks", "add_codes", "pack_sums", "decode_sums"],
        "partition": ["block_tops", "add_codes"],
        "by_name": ["block_tops", "add_codes"],
        "momentum_correction": ["correct", "add_codes"],
        "warmup": ["merge"],
        "auto": ["add_codes", "merge", "add_marked"],
        "low_rank": ["orthogonalise", "outer_add"],
        "after": ["orthogonalise", "outer_add"],
        "gather": ["encode_blocks", "decode_blocks"],
        "dense": ["divide"],
    }
    for kernel in own.get(name, ["divide"]):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, kernel, _perturbed(getattr(cpu, kernel)))
            assert _arithmetic.__wrapped__(reducer, float_mode()) != right, kernel
    assert _arithmetic.__wrapped__(reducer, float_mode()) == right


def _perturbed(kernel: Any) -> Any:
    """A kernel that computes another bit in every array that it writes to."""

    def run(*args: Any, **kwargs: Any) -> Any:
        arrays = [each for each in (*args, *kwargs.values()) if isinstance(each, np.ndarray) and each.size]
        before = [each.copy() for each in arrays]
        result = kernel(*args, **kwargs)
        if hasattr(result, "write"):  # a selection: perturb what was given, which it writes from
            arrays[0].view(np.uint8)[...] ^= 1
            return kernel(*args, **kwargs)
        for each, old in zip(arrays, before, strict=True):
            if each.tobytes() != old.tobytes():
                each.reshape(-1).view(np.uint8)[0] ^= 1
        return result

    return run


def test_a_member_nested_too_deep_is_refused() -> None:
    method: Any = parse("dense")
    for _ in range(2000):
        method = After(method, steps=1)
    with pytest.raises(SpecError, match="nested deeper than 50 levels"):
        resolve(method, LAYOUT, "float32", 2)
