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
    Companion("EF-signSGD", "sign", "Karimireddy et al. 2019", "1 bit; the rate of convergence of SGD"),
    Companion("sign per block", "sign(block=64)", "Karimireddy et al. 2019", "no figure for blocks"),
    Companion("1-bit SGD", "sign(two_means=True)", "Seide et al. 2014", "1 bit; no or nearly no loss of accuracy"),
    Companion(
        "QSGD", "two_stage(qsgd)", "Alistarh et al. 2017", "unbiased, variance at most min(n / s^2, sqrt(n) / s)"
    ),
    Companion(
        "TernGrad", "two_stage(ternary(clip=2.5))", "Wen et al. 2017", "less than 2 % lower on GoogLeNet on average"
    ),
    Companion("gTop-k", "error_feedback(tree(topk(density=0.01)))", "Shi et al. 2019", "O(k log P) in place of O(k P)"),
    Companion(
        "natural compression", "two_stage(natural)", "Horvath et al. 2019", "9 bits, unbiased, variance at most 1/8"
    ),
    Companion("DRIVE", "gather(rotated(sign, rescale=True))", "Vargaftik et al. 2021", "1 bit, unbiased"),
    Companion(
        "EDEN",
        "gather(rotated(uniform(bits=3), rescale=True))",
        "Vargaftik et al. 2022",
        "any number of bits, unbiased (theirs: Lloyd-Max levels)",
    ),
    Companion(
        "stochastic bf16",
        "two_stage(bf16(stochastic=True))",
        "Gupta et al. 2015",
        "16-bit fixed point, little to no loss of accuracy",
    ),
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
