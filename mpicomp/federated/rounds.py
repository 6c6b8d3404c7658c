"""Federated rounds over MPI: rank 0 is the server, and every rank trains some of the clients.

A round: the server sends each invited client its sub-model as the link down encodes it; the client decodes it, trains,
and sends what changed as the link up encodes it; the server checks every message, averages the updates in the order of
the clients, weighted by their examples, and adds the mean to its weights (Caldas et al. 2018). All that is drawn hangs
on (seed, round, client) alone, so the result has the same bits on any number of ranks, if training has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpicomp.api.call import Call, blocking
from mpicomp.api.copies import bcast
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec, Key, stream_of
from mpicomp.codecs.checks import check_bool, check_integer
from mpicomp.comm.communicator import Comm
from mpicomp.comm.share import shared
from mpicomp.errors import WireFormatError
from mpicomp.federated.averaging import DIVISORS, Average
from mpicomp.federated.client import DOWN, REASON, UP, Channel, Train, answer
from mpicomp.federated.links import Bundle, Link, Weights
from mpicomp.federated.mail import SERVER, Letter, sent_down, sent_up
from mpicomp.federated.report import Report
from mpicomp.federated.settings import Settings, check_arrays, copied, digest_of_arrays, examples_of, ordered
from mpicomp.federated.submodels import Choice, Keep, Network
from mpicomp.kernels import kernels_for


class Federation:
    """A server's weights and its clients; made by `federation`."""

    def __init__(self, comm: Comm, network: Network, weights: Weights, how: Settings) -> None:
        self._made = comm
        self.network, self.settings = network, how
        self.rounds = 0
        """Rounds that are complete."""
        self.weights: Weights | None = copied(weights) if comm.rank == SERVER else None
        """The model, at the server; None on other ranks. Arrays are replaced by each round, never changed."""
        self.sent = 0
        """Bytes of the messages of the round under way, at the server."""
        self._hold(weights)
        self.dtype = next(iter(weights.values())).dtype.name
        """Of all arrays."""
        self._text = how.describe(network, self.dtype)

    def _hold(self, reference: Weights) -> None:
        """Take arrays that all ranks hold: the initial weights as this rank was given them, or what was published."""
        self.reference, self._digest = reference, digest_of_arrays(reference)

    @property
    def comm(self) -> Comm:
        """The communicator, or the one that took its place after a reset."""
        return Comm.of(self._made)

    def round(self, train: Train, participants: int | None = None, *, channel: Channel | None = None) -> Report:
        """Do a round with so many clients, drawn anew, or with all; return what happened. Collective.

        `train(client, round, weights)` is called on the rank that hosts the client, in the caller's thread, with the
        arrays of the client's sub-model; it returns arrays of the same names, shapes and dtype. A client whose training
        raises an Exception, or whose weights do not fit or are not finite, is left out and named, as is one whose
        message the server refuses; where none is left the weights stay. `channel` is for experiments: it loses or
        damages messages. A rank that trains for longer than MPICOMP_TIMEOUT is taken for lost.

        Raises ValueError or TypeError for bad arguments, ConfigMismatchError on the other ranks then.
        """
        letters: list[Letter] = invite(self._made, self, train, participants, channel)
        answers = [answer(self, letter, train, channel) for letter in letters]
        report: Report = conclude(self._made, self, answers, participants)
        return report

    def publish(self, codec: Codec | str = "dense") -> Weights:
        """Send the server's weights to all ranks as a codec says; return them, the same bits everywhere. Collective.

        They become the reference: with `differences`, further rounds send what changed since. The server's own weights
        stay as they are. Raises as `mpicomp.bcast` does.
        """
        names = list(self.reference)
        mine = self.reference if self.weights is None else self.weights
        sent = bcast(self.comm, [mine[name] for name in names], codec, SERVER)
        self._hold(dict(zip(names, sent, strict=True)))
        return copied(self.reference)

    def export(self) -> dict[str, Any]:
        """Return the state of this rank, for `restore`: the settings, the round and copies of arrays."""
        arrays = {"reference": copied(self.reference), "weights": copied(self.weights or {})}
        return {"of": self._text, "round": self.rounds, **arrays}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state that `export` returned on this rank.

        Not collective; ranks that restore different rounds are refused by the next one. ValueError or TypeError, and
        nothing changes, for what does not fit.
        """
        if state.get("of") != self._text:
            raise ValueError(f"the state is of {state.get('of')}, and this federation is of {self._text}")
        check_integer("round", state.get("round"), 0)
        held: list[Any] = [state.get(name) for name in ("reference", "weights")]
        held = held[:1] if self.weights is None else held
        for arrays in held:
            check_arrays(arrays, self.network, self.dtype)
        reference, *weights = (ordered(arrays, self.network) for arrays in held)
        self._hold(reference)
        self.rounds = state["round"]
        self.weights = weights[0] if weights else None

    # ------------------------------------------------------------------------------------- what all ranks compute

    def invited(self, participants: int | None) -> list[int]:
        """Return the clients of the next round, ascending."""
        clients = len(self.settings.examples)
        if participants is None or participants == clients:
            return list(range(clients))
        base = Key(self.settings.seed, self.rounds, stream_of("participants")).base()
        found: list[int] = kernels_for(np.empty(0)).random_support(clients, participants, base).tolist()
        return found

    def choice(self, client: int) -> Choice:
        """Return the sub-model of a client in the next round."""
        return self.network.choose(self.settings.keep, Key(self.settings.seed, self.rounds, rank=client))

    def host(self, client: int) -> int:
        """Return the rank that trains a client."""
        size = self.comm.size
        if self.settings.server_trains or size == 1:
            return client % size
        return 1 + client % (size - 1)

    def bundle(self, choice: Choice, stage: int) -> Bundle:
        """Return the format of the messages of a direction."""
        link, name = (self.settings.down, "down") if stage == DOWN else (self.settings.up, "up")
        about = f"federated, {name}"
        if stage == DOWN and self.settings.differences:
            about += f" from {self._digest}"
        return Bundle(link, choice.shapes, self.dtype, about)

    def key(self, client: int, stage: int) -> Key:
        """Return the key of a message of the next round."""
        return Key(self.settings.seed, self.rounds, stream_of("federated"), stage, client)

    def describe(self, participants: int | None) -> str:
        """Return all that must be the same on every rank, as text."""
        reference = f", reference {self._digest}" if self.settings.differences else ""
        return f"federated round {self.rounds} with {participants or 'all'} of {self._text}{reference}"

    # ------------------------------------------------------------------------------------------------- the server

    def letters_down(self, participants: int | None) -> list[tuple[int, Letter]]:
        """Return the message of every invited client, with its rank; of the server."""
        assert self.weights is not None
        sent = self.weights
        if self.settings.differences:
            sent = {name: each - self.reference[name] for name, each in sent.items()}
        found = []
        for client in self.invited(participants):
            choice = self.choice(client)
            data = self.bundle(choice, DOWN).encode(choice.extract(sent), self.key(client, DOWN))
            found.append((self.host(client), Letter(client, data)))
        return found

    def averaged(self, letters: Sequence[Letter]) -> tuple[Weights, list[int], dict[int, str]]:
        """Return the new weights, the clients whose update counts, and why each other one does not; of the server."""
        assert self.weights is not None
        average = Average(self.weights, self.settings.divisor)
        counted: list[int] = []
        left_out: dict[int, str] = {}
        for letter in sorted(letters, key=lambda each: each.client):
            client = letter.client
            if letter.failed:
                left_out[client] = letter.content.decode(errors="replace")
                continue
            choice = self.choice(client)
            try:
                update = self.bundle(choice, UP).decode(letter.content, self.key(client, UP))
            except WireFormatError as error:
                left_out[client] = f"its message was refused: {error}"[:REASON]
                continue
            old = choice.extract(self.weights)
            with np.errstate(over="ignore"):
                large = [name for name, each in update.items() if not np.isfinite(old[name] + each).all()]
            if large:
                left_out[client] = f"its update of {large[0]} exceeds what {self.dtype} holds"
                continue
            average.add(choice, update, self.settings.examples[client])
            counted.append(client)
        return (average.result() if counted else self.weights), counted, left_out


def _federation(
    comm: Comm,
    network: Network,
    weights: Mapping[str, Array],
    clients: Sequence[int],
    *,
    down: Link | Codec | str = "dense",
    up: Link | Codec | str = "dense",
    keep: Keep = 1.0,
    divisor: str,
    differences: bool = False,
    server_trains: bool = True,
    seed: int = 0,
) -> Call[Federation]:
    """Return a federation of a server, rank 0, and clients that the ranks train in turn. Collective.

    `weights` are the arrays of `network` by name, NumPy, float32 or float64; the values on other ranks do not matter,
    except with `differences`, where they must be the same. `clients` has the number of examples of each client, its
    weight in the mean: the server's own knowledge, which no message can change. `down` and `up` are links (`Link.of`).
    `keep` is the share of the units of hidden layers in a sub-model, or a mapping from their names. `divisor` is "all"
    or "covering", see `Average`. With `differences` the server sends the weights minus a reference that all ranks hold:
    the initial weights, then what `publish` sends. Client c is trained by rank c modulo the number of ranks;
    without `server_trains` by the others than rank 0, where there are others.

    Raises SpecError, ValueError or TypeError for bad arguments; the other ranks then raise ConfigMismatchError, as all
    do where they disagree.
    """
    if not isinstance(network, Network):
        raise TypeError(f"network must be a mpicomp.federated.Network, got {type(network).__name__}")
    check_arrays(weights, network)
    examples = examples_of(clients)
    if divisor not in DIVISORS:
        raise ValueError(f"divisor must be one of {', '.join(DIVISORS)}, got {divisor!r}")
    check_bool(differences=differences, server_trains=server_trains)
    check_integer("seed", seed, 0, (1 << 63) - 1)
    network.counts(keep)
    keep = dict(keep) if isinstance(keep, Mapping) else keep
    own = ordered(weights, network)
    how = Settings(examples, Link.of(down), Link.of(up), keep, divisor, differences, server_trains, seed)
    made = Federation(comm, network, own, how)
    return Call(lambda _: f"the beginning of a {made.describe(None)}", lambda: made)


def _invite(
    comm: Comm, rounds: Federation, train: Train, participants: int | None, channel: Channel | None
) -> Call[list[Letter]]:
    if not callable(train) or not (channel is None or callable(channel)):
        raise TypeError("train, and channel where it is given, must be functions")
    if participants is not None:
        check_integer("participants", participants, 1, len(rounds.settings.examples))

    def run() -> list[Letter]:
        letters = rounds.letters_down(participants) if comm.rank == SERVER else []
        rounds.sent = sum(len(letter.content) for _, letter in letters)
        return sent_down(comm, letters)

    return Call(lambda _: rounds.describe(participants), run)


def _conclude(comm: Comm, rounds: Federation, answers: list[Letter], participants: int | None) -> Call[Report]:
    def run() -> Report:
        letters = sent_up(comm, answers)
        weights = rounds.weights
        found: list[Any] = []
        if comm.rank == SERVER:
            weights, counted, left_out = rounds.averaged(letters)
            arrived = [len(letter.content) for letter in letters if not letter.failed]
            found = [counted, list(left_out.items()), rounds.sent, sum(arrived), len(arrived)]
        counted, reasons, down_bytes, up_bytes, messages = shared(comm, found)
        invited = rounds.invited(participants)
        report = Report(
            round=rounds.rounds,
            invited=tuple(invited),
            averaged=tuple(counted),
            left_out=dict(reasons),
            down_bytes=down_bytes,
            up_bytes=up_bytes,
            arrived=messages,
            dense_bytes=sum(each.nbytes for each in rounds.reference.values()),
        )
        rounds.weights, rounds.rounds = weights, rounds.rounds + 1
        return report

    return Call(lambda _: f"the end of {rounds.describe(participants)}", run)


federation = blocking(_federation)
invite, conclude = blocking(_invite), blocking(_conclude)
