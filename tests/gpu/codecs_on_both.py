"""One codec on both implementations: payload, residual and what is decoded must be the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from codec_members import KEY
from compare import equal_bytes, poisoned

from mpicomp.arrays import to_device, to_host
from mpicomp.wire import MessageLayout


def encoded(codec: Any, x: Any, old: Any, new: Any, dtype: str, device: bool) -> tuple[Any, int]:
    """Encode into a message, with a residual where `new` is given; return the message and the bytes used."""
    layout = MessageLayout([codec.fields(x.size, dtype)])
    message = np.zeros(layout.nbytes, np.uint8)
    message = to_device(message) if device else message
    (payload,) = layout.views(message)
    used = codec.encode(x, payload, KEY) if new is None else codec.encode_residual(x, old, payload, new, KEY)
    return message, used


def check_same_bytes(codec: Any, x: np.ndarray[Any, Any], scale: float = 0.5) -> None:
    """Encode with and without residual, and decode, on a GPU and on the CPU."""
    size, dtype = x.size, x.dtype.name
    rng = np.random.default_rng(size)
    old = (rng.standard_normal(size) * 0.1).astype(dtype)
    start = rng.standard_normal(size).astype(dtype)
    for feedback in (False, True):
        host: list[Any] = [x.copy(), old.copy() if feedback else None, poisoned(size, dtype) if feedback else None]
        there = [None if a is None else to_device(a) for a in host]
        theirs, used = encoded(codec, *host, dtype, False)
        mine, too = encoded(codec, *there, dtype, True)
        assert too == used
        equal_bytes(f"the payload of {codec}", to_host(mine), theirs)
        if feedback:
            equal_bytes(f"the residual of {codec}", to_host(there[2]), host[2])
        outs = start.copy(), to_device(start)
        layout = MessageLayout([codec.fields(size, dtype)])
        for message, out in zip((theirs, mine), outs, strict=True):
            payload = layout.views(message)[0]
            if not codec.fixed:
                payload = (payload[0][:used],)
            codec.decode_add(payload, out, KEY, scale)
        equal_bytes(f"what {codec} decodes", to_host(outs[1]), outs[0])
