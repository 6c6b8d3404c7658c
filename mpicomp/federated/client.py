"""What a client does in a round, on the rank that hosts it: decode a sub-model, train it, and encode what has changed.

Nothing that goes wrong here reaches the other clients: the answer is then the reason why there is no message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mpicomp.federated.links import Weights
from mpicomp.federated.mail import Letter
from mpicomp.federated.submodels import check_shapes

if TYPE_CHECKING:
    from mpicomp.federated.rounds import Federation

REASON = 400  # characters of the reason why a client was left out
DOWN, UP = 0, 1  # the stage of a key

Train = Callable[[int, int, Weights], Mapping[str, Any]]
"""train(client, round, weights): returns the client's new weights; may change the arrays that it gets."""
Channel = Callable[[int, bytes], bytes | None]
"""channel(client, message): what becomes of a client's message on its way to the server; None: it is lost."""


def answer(rounds: Federation, letter: Letter, train: Train, channel: Channel | None) -> Letter:
    """Return a client's message, or the reason why there is none."""
    client = letter.client
    try:
        message: bytes | None = _trained(rounds, client, letter.content, train)
        if channel is not None and message is not None:
            message = channel(client, message)
        return Letter(client, b"its message was lost", True) if message is None else Letter(client, bytes(message))
    except Exception as error:
        return Letter(client, _described(error)[:REASON].encode(errors="replace"), True)


def _described(error: Exception) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # the text is code of the user's, too, and the other ranks wait for an answer
        return name


def _trained(rounds: Federation, client: int, message: bytes, train: Train) -> bytes:
    """Return the message of a client that has trained on what it got."""
    choice = rounds.choice(client)
    start = rounds.bundle(choice, DOWN).decode(message, rounds.key(client, DOWN))
    if rounds.settings.differences:
        known = choice.extract(rounds.reference)
        start = {name: known[name] + each for name, each in start.items()}
    found = train(client, rounds.rounds, {name: each.copy() for name, each in start.items()})
    if not isinstance(found, Mapping):
        raise TypeError(f"train must return the new weights by name, got {type(found).__name__}")
    trained = {name: np.asarray(each) for name, each in found.items()}
    check_shapes(trained, choice.shapes, "the sub-model")
    for name, each in trained.items():
        if each.dtype.name != rounds.dtype:
            raise TypeError(f"{name} has dtype {each.dtype.name}, expected {rounds.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused when it is encoded
        update = {name: trained[name] - start[name] for name in start}
    return rounds.bundle(choice, UP).encode(update, rounds.key(client, UP))
