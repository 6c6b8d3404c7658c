"""Companions: methods that the nine works are measured against, each by its spec, beside dense on the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from bench.reproduce.entry import Entry
from bench.reproduce.session import Session

NAME = "Companions"
TASKS = ("digits",)


class Companion(NamedTuple):
    """A method of the literature, as the spec that runs it."""

    name: str
    spec: str
    paper: str
    claim: str


COMPANIONS = (
    Companion("EF-signSGD", "sign", "Karimireddy et al. 2019", "generalises as SGD does, 1 bit"),
    Companion("sign per block", "sign(block=64)", "Karimireddy et al. 2019", "layer-wise scales"),
    Companion("1-bit SGD", "sign(two_means=True)", "Seide et al. 2014", "no loss of accuracy, 1 bit"),
    Companion("QSGD", "two_stage(qsgd)", "Alistarh et al. 2017", "4 bits, no loss of accuracy"),
    Companion("TernGrad", "two_stage(ternary(clip=2.5))", "Wen et al. 2017", "less than 2 % lower on GoogLeNet"),
    Companion("gTop-k", "error_feedback(tree(topk(density=0.01)))", "Shi et al. 2019", "O(k log P), as dense"),
    Companion("natural compression", "two_stage(natural)", "Horvath et al. 2019", "9 bits, variance factor 9/8"),
    Companion("DRIVE", "gather(rotated(sign, rescale=True))", "Vargaftik et al. 2021", "1 bit, unbiased"),
    Companion(
        "EDEN",
        "gather(rotated(uniform(bits=3), rescale=True))",
        "Vargaftik et al. 2022",
        "any number of bits, unbiased (theirs: Lloyd-Max levels)",
    ),
    Companion("stochastic bf16", "two_stage(bf16(stochastic=True))", "Gupta et al. 2015", "16 bits, unbiased"),
    Companion(
        "SparseLoCo's decay",
        "decay(error_feedback(two_stage(topk(density=0.01))), factor=0.95)",
        "Sarfi et al. 2025",
        "residuals fade by 0.95",
    ),
    Companion(
        "the same without decay",
        "error_feedback(two_stage(topk(density=0.01)))",
        "Sarfi et al. 2025",
        "residuals stay",
    ),
)


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield a row per companion; there are no bars."""
    for name, spec, paper, claim in COMPANIONS:
        runs = session.over_seeds(partial(session.train, task, method=spec))
        yield session.entry(f"{NAME}: {name}", task, spec, runs, paper, claim)
