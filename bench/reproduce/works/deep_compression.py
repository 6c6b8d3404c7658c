"""Deep Compression: prune and retrain, share weights and fine-tune them, code, and send the file to all ranks."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mpicomp.torch
from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.session import Session
from bench.train.meter import gathered
from mpicomp.models import Codebooks, Masks, bcast, compress_model, decompress_model, sharing

NAME = "Deep Compression"
TASKS = ("digits", "mnist")
PAPER = "Han et al. 2015"
BITS = 5
SPARSITIES = (0.7, 0.84, 0.9, 0.92)  # after each of them the survivors are trained again
RETRAIN, FINE_TUNE = 0.4, 0.01  # times the task's learning rate
LAST_LAYER = 0.74  # its sparsity at most: ten rows decide the classes, and are a small part of the model


class Bars(NamedTuple):
    """What a task must reach."""

    ratio: float  # of the bytes of the dense model to those of the file
    loss: float  # points below dense, at most
    recovered: str  # what retraining must win back, in words
    share: float  # of what one-shot pruning lost
    points: float


BARS = {
    "digits": Bars(25, 2.0, "at least 10 points", 0, 10),
    "mnist": Bars(35, 0.5, "at least 80 % of the loss", 0.8, 0),
}


class Result(NamedTuple):
    """The accuracies and bytes of one seed."""

    dense: float
    one_shot: float  # pruned at once, without training
    pruned: float  # pruned in steps and trained
    shared: float
    decoded: float
    exact: bool  # the weights that every rank decodes have the bits of the shared ones
    above: float  # the squares of Lloyd's clusters over those of the 1-D optimum
    file: int  # bytes
    plain: int  # bytes of the dense model's tensors
    sent: float  # bytes that a rank sends when the file is broadcast, mean over ranks
    sent_plain: float  # and when the dense model is


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Run all seeds; yield an entry per bar."""
    results = [pipeline(session, task, seed) for seed in session.chosen()]
    bars = BARS[task]

    def mean(field: str) -> float:
        return statistics.fmean(getattr(each, field) for each in results)

    dense, ratio = mean("dense"), mean("plain") / mean("file")
    won, lost = mean("pruned") - mean("one_shot"), dense - mean("one_shot")

    def entry(variant: str, setting: str, name: str, values: list[float], met: bool, **more: Any) -> Entry:
        figures: dict[str, Any] = {
            **mean_and_spread(values),
            "dense_mean": dense,
            "bytes": mean("file"),
            "dense_bytes": mean("plain"),
            "ratio": ratio,
            **more,
        }
        return Entry(
            row=f"{NAME}: {variant}",
            task=task,
            setting=setting,
            ranks=session.ranks,
            seeds=session.chosen(),
            metric_name=name,
            paper=PAPER,
            met=None if session.quick else met,
            **figures,
        )

    recipe = f"Masks.magnitude to {SPARSITIES[-1]:.0%} in {len(SPARSITIES)} steps, Codebooks.fit(bits={BITS}), file"
    yield entry(
        f"at least {bars.ratio:g}x, at most {bars.loss:g} points below dense",
        f"{recipe}; bytes of the whole file, against the dense tensors; squares are {mean('above'):.2f} times "
        f"those of the 1-D optimum, and sharing costs {mean('pruned') - mean('decoded'):.2f} points",
        "accuracy_percent",
        [each.decoded for each in results],
        ratio >= bars.ratio and dense - mean("decoded") <= bars.loss,
        paper_claim="LeNet-300-100 40x, 1.64 % error becomes 1.58 %",
    )
    yield entry(
        f"retraining recovers {bars.recovered}",
        f"pruned to {SPARSITIES[-1]:.0%} at once without training: {mean('one_shot'):.2f}; it recovers "
        f"{won:.2f} points of {lost:.2f}",
        "accuracy_percent",
        [each.pruned for each in results],
        won >= bars.points and won >= bars.share * lost,
        bytes=None,
        dense_bytes=None,
        ratio=None,
        paper_claim="pruning alone 9x (AlexNet), 13x (VGG-16) without loss of accuracy",
    )
    yield entry(
        "decoded weights bit-exact on all ranks",
        "mpicomp.models.bcast(group, model) from rank 0; bytes that a rank sends, against those for the dense model",
        "share_exact_percent",
        [100.0 * each.exact for each in results],
        all(each.exact for each in results),
        dense_mean=None,
        bytes=mean("sent"),
        dense_bytes=mean("sent_plain"),
        ratio=mean("sent_plain") / mean("sent") if mean("sent") else None,
        paper_claim="no figure: models are stored",
    )


def pipeline(session: Session, task: str, seed: int) -> Result:
    """Prune, retrain, share, fine-tune, code and send one seed's dense model. Collective."""
    data, steps = session.task(task), session.steps(task)
    dense = session.dense(task, seed)
    once, model = copy.deepcopy(dense.model), copy.deepcopy(dense.model)
    Masks.magnitude(once, sparsities(once, SPARSITIES[-1])).apply(once)

    def trained(keep: Masks | Codebooks, steps: int, rate: float) -> float:
        def optimizer(ddp: nn.Module, lr: float) -> torch.optim.Optimizer:
            made = data.optimizer(ddp.parameters(), lr)
            keep.attach(made, ddp)
            return made

        keep.apply(model)
        run = session.train(task, seed, model=lambda: model, steps=steps, optimizer=optimizer, lr=data.lr * rate)
        return run.metric

    masks, pruned = None, 0.0
    for sparsity in SPARSITIES:
        masks = Masks.magnitude(model, sparsities(model, sparsity), masks)
        pruned = trained(masks, steps if sparsity == SPARSITIES[-1] else steps // 4, RETRAIN)
    above = above_optimum(model)
    shared = trained(Codebooks.fit(model, BITS), steps // 4, FINE_TUNE)

    file = compress_model(model)
    received = model if dist.get_rank() == 0 else data.model()
    sent = sent_by(received)
    decoded = data.model()
    decompress_model(file, into=decoded)
    exact = same_bits(received.state_dict(), model.state_dict()) and same_bits(decoded.state_dict(), model.state_dict())
    return Result(
        dense=dense.metric,
        one_shot=data.evaluate(once),
        pruned=pruned,
        shared=shared,
        decoded=data.evaluate(decoded),
        above=above,
        exact=bool(gathered(torch.tensor([float(exact)])).min().item()),
        file=len(file),
        plain=sum(tensor.nbytes for tensor in model.state_dict().values()),
        sent=sent,
        sent_plain=sent_by(copy.deepcopy(dense.model)),
    )


def above_optimum(model: nn.Module) -> float:
    """Return the squared distances of surviving weights to Lloyd's centroids, over the least that there are."""
    found = least = 0.0
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            weights = parameter.detach().reshape(-1).numpy()
            ordered, k = np.sort(weights[weights != 0]), 1 << BITS
            found += sharing.squares(ordered, sharing.lloyd(ordered, sharing.linear(ordered, k)))
            least += sharing.squares(ordered, sharing.optimum(ordered, k))
    return found / least


def sparsities(model: nn.Module, sparsity: float) -> dict[str, float]:
    """Return the sparsity of every weight matrix; the last layer keeps more."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    return {name: min(sparsity, LAST_LAYER) if name == names[-1] else sparsity for name in names}


def sent_by(model: nn.Module) -> float:
    """Broadcast a model from rank 0; return the bytes that a rank sends for it, mean over ranks. Collective."""
    traffic = mpicomp.torch.traffic()
    before = traffic.bytes
    bcast(dist.group.WORLD, model)
    return float(gathered(torch.tensor([float(traffic.bytes - before)])).mean())


def same_bits(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two states of float32 tensors have the same bits."""
    return all(torch.equal(some[name].view(torch.int32), others[name].view(torch.int32)) for name in others)
