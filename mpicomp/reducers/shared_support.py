"""shared_support: payloads of a linear codec are summed without decoding, since all ranks keep the same elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost
from mpicomp.reducers.base import Reducer, check_codec
from mpicomp.reducers.dense import two_shot_cost, two_shot_rows, two_shot_sum
from mpicomp.reducers.parts.layout import Layout
from mpicomp.reducers.parts.messages import Message, coding, message_nbytes, sent_by
from mpicomp.reducers.parts.state import Reduction, State, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import ALIGN, HEADER, Field


@dataclass(frozen=True)
class SharedSupport(Reducer):
    """One dense sum of the k values that the codec keeps of n; exact except for what the codec leaves out.

    The sum has one more number, which is NaN unless all inputs are finite, and else 0.
    """

    spec_name: ClassVar[str] = "shared_support"
    on_gpu: ClassVar[bool] = True
    codec: Codec

    def __post_init__(self) -> None:
        if not check_codec(self, self.codec).linear:
            raise ValueError(f"shared_support needs a linear codec such as randomk, got {self.codec}; use two_stage")

    @property
    def reports(self) -> bool:
        return self.codec.sparse

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        values = message_nbytes(self.codec, layout.whole(), dtype)
        if not values:
            return Cost()
        itemsize = np.dtype(dtype).itemsize
        work = (coding(self.codec, layout.size, feedback=feedback), coding(self.codec, layout.size, "decode_add"))
        summed = two_shot_cost(values - HEADER + ALIGN, itemsize, topology.size, me)
        return summed + Cost(lossy=1, work=work)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        comm.next_call()
        mine, total = work.made("messages", lambda: self._messages(state))
        values, sums = (message.host[HEADER:].view(state.dtype) for message in (mine, total))

        finite = mine.encode(x, state, 0, comm.rank)
        sent = sent_by(mine, x, state, 0, comm.rank) if work.asks and finite else None
        mine.host_payloads[-1][0][0] = 0.0 if finite else np.nan
        total.wait_idle()
        rows = work.buffer("rows", two_shot_rows(values.nbytes, values.itemsize, comm.size), state.dtype, host=True)
        two_shot_sum(comm, values, sums, rows, str(self))
        if not all(np.isfinite(part).all() for payload in total.host_payloads for part in payload):
            return poisoned_total(out, state.layout), state

        state.layout.fill(out, 0)
        total.decode_add(out, state, 0, 0)
        return Reduction(out, sent=sent), state.advanced()

    def _messages(self, state: State) -> list[Message]:
        """Return the messages for this rank's payloads and for their sum, each with one more number."""
        slot = (Field((1,), np.dtype(state.dtype).newbyteorder("<").str),)
        messages = [
            Message(self.codec, state.layout.whole(), state.dtype, extra=slot, device=state.device) for _ in range(2)
        ]
        for message in messages:
            message.direct = False  # the sum is formed on the host
        return messages
