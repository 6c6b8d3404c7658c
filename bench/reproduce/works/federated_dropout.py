"""Federated Dropout and lossy links (Caldas et al. 2018): rounds of sub-models, counted in the frames of both ways."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn import functional

from bench.reproduce.entry import Entry, mean_and_spread
from bench.reproduce.session import Session
from bench.train.tasks import Images
from mpicomp import federated

NAME, TASKS = "Federated Dropout", ("digits", "mnist")
PAPER, CLAIM = "Caldas et al. 2018", "14x down and 28x up at p = 0.75 without loss of accuracy (MNIST, EMNIST)"
BATCH = 10  # images of a step of a client, one epoch a round
LAST = 10  # models whose mean accuracy is the result
EARLY = 30  # rounds of the runs with 2 bits in one direction, which differ in how fast they learn
MODERATE: dict[str, Any] = {
    "keep": 0.75,
    "down": federated.lossy(4),
    "up": federated.lossy(2),
    "divisor": "covering",
}
SAID = "keep=0.75, down=lossy(4), up=lossy(2), divisor=covering"
WHOLE = 1 << 16  # elements: the range of a matrix, as in the paper


@dataclass
class Course:
    """What a training in rounds gave; the same on all ranks."""

    accuracies: dict[int, float] = field(default_factory=dict)  # by the number of rounds before
    reports: list[federated.Report] = field(default_factory=list)

    def metric(self, rounds: int | None = None) -> float:
        """The mean accuracy of the last models that were evaluated, or of the last until a round."""
        until = [accuracy for number, accuracy in self.accuracies.items() if rounds is None or number <= rounds]
        return statistics.fmean(until[-LAST:])

    def per_client(self, way: str) -> float:
        """Bytes of a client and round."""
        total: float = sum(getattr(report, f"{way}_bytes") for report in self.reports)
        return total / sum(len(report.invited) if way == "down" else report.arrived for report in self.reports)


def forward(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return the logits (images, classes) of an MLP, or of convolutions with 2 x 2 pooling before one."""
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    if weights[f"{names[0]}.weight"].ndim == 4:
        x = x.reshape(-1, 1, 28, 28)
    for name in names:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if weight.ndim == 4:
            x = functional.max_pool2d(functional.conv2d(x, weight, bias, padding="same").relu(), 2)
            continue
        x = functional.linear(x.flatten(1), weight, bias)
        x = x.relu() if name != names[-1] else x
    return x


def cnn() -> nn.Sequential:
    """The CNN of the paper, 1.66 million parameters."""
    first = [nn.Conv2d(1, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10))


def course(
    task: Images,
    seed: int,
    model: nn.Module,
    *,
    rounds: int,
    clients: int,
    chosen: int,
    lr: float,
    judged: int,
    lost: bool = False,
    **how: Any,
) -> Course:
    """Train in rounds, and evaluate the model after each from round `judged` on. Collective.

    With `lost` a tenth of the clients fails in training, and a tenth sends garbage.
    """
    weights = {name: each.detach().numpy() for name, each in model.state_dict().items()}
    network = federated.Network(federated.layers_of(model), weights)
    shards = np.array_split(np.random.default_rng(seed).permutation(task.train), clients)
    federation = federated.federation(
        MPI.COMM_WORLD, network, weights, [len(shard) for shard in shards], seed=seed, **how
    )

    def unlucky(client: int) -> float:
        """Where a client stands among those of the round, in [0, 1)."""
        invited = federation.invited(chosen)
        return invited.index(client) / len(invited)

    def local(client: int, number: int, arrays: dict[str, Any]) -> dict[str, Any]:
        if lost and unlucky(client) >= 0.9:
            raise RuntimeError("the client has gone")
        params = {name: torch.from_numpy(each).requires_grad_() for name, each in arrays.items()}
        order = np.random.default_rng([seed, number, client]).permutation(shards[client])
        for start in range(0, len(order), BATCH):
            images = torch.from_numpy(order[start : start + BATCH])
            loss = functional.cross_entropy(forward(params, task.inputs[images]), task.targets[images])
            gradients = torch.autograd.grad(loss, list(params.values()))
            with torch.no_grad():
                for param, gradient in zip(params.values(), gradients, strict=True):
                    param.sub_(gradient, alpha=lr)
        return {name: each.detach().numpy() for name, each in params.items()}

    def channel(client: int, message: bytes) -> bytes:
        return message[:-3] + b"???" if lost and 0.8 <= unlucky(client) < 0.9 else message

    found = Course()
    for number in range(rounds):
        found.reports.append(federation.round(local, chosen, channel=channel))
        if number + 1 >= judged:
            new = {name: torch.from_numpy(each) for name, each in federation.publish().items()}
            with torch.no_grad():
                test, truth = task.inputs[task.train :], task.targets[task.train :]
                right = int((forward(new, test).argmax(1) == truth).sum())
            found.accuracies[number + 1] = 100 * right / len(truth)
    return found


def entries(session: Session, task: str) -> Iterator[Entry]:
    """Yield the bars of a task."""
    yield from (digits if task == "digits" else mnist)(session)


def entry(
    session: Session,
    task: str,
    variant: str,
    setting: str,
    courses: Sequence[Course],
    way: str,
    met: bool | None,
    **more: Any,
) -> Entry:
    """Return the entry of courses over the first seeds; bytes are those of a client and round."""
    sent = statistics.fmean(each.per_client(way) for each in courses)
    plain = courses[0].reports[0].dense_bytes
    figures: dict[str, Any] = {"dense_mean": None, **mean_and_spread([each.metric() for each in courses]), **more}
    return Entry(
        row=f"{NAME}: {variant}",
        task=task,
        setting=setting,
        ranks=session.ranks,
        seeds=list(session.seeds)[: len(courses)],
        metric_name="accuracy_percent",
        bytes=sent,
        dense_bytes=plain,
        ratio=plain / sent,
        paper=PAPER,
        paper_claim=CLAIM,
        met=None if session.quick else met,
        **figures,
    )


def digits(session: Session) -> Iterator[Entry]:
    """20 clients, 10 a round, 60 rounds."""
    task: Any = session.task("digits")
    rounds, early = (6, 3) if session.quick else (60, EARLY)
    about = f"20 clients, 10 a round, {rounds} rounds, mean of the last {LAST} models"

    def run(**how: Any) -> list[Course]:
        found = []
        for seed in session.seeds:
            torch.manual_seed(seed)
            settings = {"rounds": rounds, "clients": 20, "chosen": 10, "lr": 0.2, "divisor": "all", "judged": 1, **how}
            found.append(course(task, seed, task.model(), **settings))
        return found

    plain = run()
    dense = statistics.fmean(each.metric() for each in plain)
    moderate = run(**MODERATE)
    gap = dense - statistics.fmean(each.metric() for each in moderate)
    for way, least in (("down", 11), ("up", 20)):
        fewer = min(each.reports[0].dense_bytes / each.per_client(way) for each in moderate)
        yield entry(
            session,
            "digits",
            f"moderate, within 1.5 points of FedAvg at {least}x {way}",
            f"{SAID}; {about}",
            moderate,
            way,
            gap <= 1.5 and fewer >= least,
            dense_mean=dense,
        )
    two = federated.lossy(2, transform="none", block=WHOLE)
    down, up = run(rounds=early, down=two), run(rounds=early, up=two)
    half = about.replace(f"{rounds} rounds", f"{early} rounds")
    dense_early = statistics.fmean(each.metric(early) for each in plain)
    means = [statistics.fmean(each.metric() for each in courses) for courses in (down, up)]
    said = "lossy(2, transform=none, block=65536), the other way dense"
    yield entry(session, "digits", "2 bits up alone", f"up={said}; {half}", up, "up", None, dense_mean=dense_early)
    yield entry(
        session,
        "digits",
        "2 bits down alone are worse than 2 bits up alone",
        f"down={said}; {half}",
        down,
        "down",
        means[0] < means[1],
        dense_mean=dense_early,
    )
    lossy = run(lost=True, **MODERATE)
    named = all(len(report.left_out) == 2 and report.arrived == 9 for each in lossy for report in each.reports)
    yield entry(
        session,
        "digits",
        "a run that loses 20 % of the clients each round ends",
        f"{SAID}; one in ten fails in training, one in ten sends garbage, all named; {about}",
        lossy,
        "up",
        named and all(len(each.reports) == rounds for each in lossy),
        dense_mean=dense,
    )
    few = 2 if session.quick else 10
    hundred = run(rounds=few, clients=100, chosen=100, **MODERATE)
    everyone = all(report.averaged == tuple(range(100)) for each in hundred for report in each.reports)
    yield entry(
        session,
        "digits",
        f"100 clients on {session.ranks} ranks",
        f"{SAID}; all 100 clients in each of {few} rounds",
        hundred,
        "up",
        everyone if session.ranks == 4 else None,
    )


def mnist(session: Session) -> Iterator[Entry]:
    """The CNN of the paper: bytes of a round, and a run of one seed."""
    task: Any = session.task("mnist")
    rounds = 2 if session.quick else 20
    seed = session.seeds[0]
    settings: dict[str, Any] = {"rounds": rounds, "clients": 100, "chosen": 10, "lr": 0.15, "judged": rounds}

    def run(**how: Any) -> Course:
        torch.manual_seed(seed)
        return course(task, seed, cnn(), **settings, **how)

    dense, moderate = run(divisor="all"), run(**MODERATE)
    said = f"{SAID}; CNN 32 and 64 filters, 3136-512-10; 100 clients, 10 a round, {rounds} rounds"
    for way, least in (("down", 13.5), ("up", 25)):
        fewer = moderate.reports[0].dense_bytes / moderate.per_client(way)
        yield entry(
            session, "mnist", f"CNN, {least}x {way}", said, [moderate], way, fewer >= least, dense_mean=dense.metric()
        )
