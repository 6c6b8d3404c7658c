"""The buffers of a reducer on one communicator, and the divisor of its total.

A state is values, a workspace is not: it is never stored or exported, and a copy of it is empty. It belongs to one
communicator and one layout, and is emptied where either changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

from mpicomp.arrays import Array, empty
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm

T = TypeVar("T")

BLOCK = 1 << 23  # bytes


class Arena:
    """Host memory for messages that several workspaces use in turn: those of one reduction at a time are under way."""

    def __init__(self) -> None:
        self._comm: weakref.ref[Comm] | None = None
        self._blocks: list[Array] = []

    def belong(self, comm: Comm) -> None:
        """Prepare for a call. Receives that were given up may still write to the memory of another communicator."""
        if self._comm is None or self._comm() is not comm:
            self._comm, self._blocks = weakref.ref(comm), []

    def __reduce__(self) -> tuple[type[Arena], tuple[()]]:
        return Arena, ()  # a copy is empty

    def take(self, block: int, start: int, nbytes: int) -> tuple[Array, int, int]:
        """Return memory at or behind a byte of a block, (nbytes,) uint8, and the block and the byte where it ends."""
        while block < len(self._blocks) and self._blocks[block].size < start + nbytes:
            block, start = block + 1, 0
        if block == len(self._blocks):
            self._blocks.append(np.empty(max(nbytes, BLOCK), np.uint8))
        end = start + -(-nbytes // 64) * 64  # cache lines
        return self._blocks[block][start : start + nbytes], block, end


class Workspace:
    """The buffers of one reducer, by name, and the workspaces of those inside it.

    The caller will divide the total by `divisor`, 1 for a sum. A reducer may do so itself where that costs no pass over
    memory; its `Reduction` says so. An input is the sum of up to `terms` ranks.

    Workspaces with one `arena` must not be in use at the same time.
    """

    def __init__(self, device: bool = False, divisor: int = 1, arena: Arena | None = None) -> None:
        self.device = device
        """Whether buffers are CuPy's."""
        self.divisor = divisor
        self.terms = 1
        self.asks = False
        """Whether the caller asks what this rank sent: see `Reduction.sent`."""
        self._made: dict[Hashable, Any] = {}
        self._inner: dict[str, Workspace] = {}
        self._comm: weakref.ref[Comm] | None = None
        self._form: Hashable = None
        self._arena = arena or Arena()
        self._end = [0, 0]  # block and byte of the arena behind the messages of this workspace and those inside it

    def belong(self, comm: Comm, form: Hashable, device: bool, divisor: int) -> Workspace:
        """Prepare for a call and return this; buffers of another communicator, form or device are dropped."""
        self._arena.belong(comm)
        same = self._comm is not None and self._comm() is comm and self.device == device
        if not same or (self._form is not form and self._form != form):
            self._made, self._inner, self._end = {}, {}, [0, 0]
            self._comm, self._form, self.device = weakref.ref(comm), form, device
        self.divisor = divisor
        return self

    def inner(self, name: str, terms: int = 1) -> Workspace:
        """Return the workspace of a reducer inside this one; its total is divided by the same number."""
        found = self._inner.get(name)
        if found is None:
            found = self._inner[name] = Workspace(self.device, arena=self._arena)
            found._end = self._end
        found.divisor, found.terms, found.asks = self.divisor, self.terms * terms, self.asks
        return found

    def renewed(self) -> Workspace:
        """Return an empty workspace in the same memory, for another state: this one must not be used any more."""
        return Workspace(self.device, arena=self._arena)

    def forget(self, kept: set[str]) -> None:
        """Drop all inner workspaces but those of the given names."""
        self._inner = {name: inner for name, inner in self._inner.items() if name in kept}

    def made(self, name: Hashable, make: Callable[[], T]) -> T:
        """Return the object of a name; the first call makes it."""
        if name not in self._made:
            self._made[name] = make()
        found: T = self._made[name]
        return found

    def buffer(self, name: str, size: int, dtype: str, host: bool = False) -> Array:
        """Return an uninitialised array, (size,), the same one for a name; on the GPU if `device` and not `host`."""
        known: Array | None = self._made.get(name)
        if known is None or known.size != size:
            known = self._made[name] = empty(size, dtype, self.device and not host)
        return known

    def message(self, nbytes: int) -> Array:
        """Return host memory for a message, (nbytes,) uint8: its content lasts for one reduction."""
        data, self._end[0], self._end[1] = self._arena.take(self._end[0], self._end[1], nbytes)
        return data

    def roomy(self, name: str, size: int, make: Callable[[int], Array]) -> Array:
        """Return the first `size` elements of the array of a name, which grows by more than it must."""
        known: Array | None = self._made.get(name)
        if known is None or known.size < size:
            known = self._made[name] = make(size + size // 8)
        return known[:size]

    @property
    def exact(self) -> bool:
        """Whether `factor` divides by `divisor`, to the bit: powers of two."""
        return self.divisor & (self.divisor - 1) == 0

    @property
    def factor(self) -> float:
        """The factor that a reducer may fold into a pass: 1 / divisor where that is exact, otherwise 1."""
        return 1.0 / self.divisor if self.exact else 1.0

    def shrink(self, codec: Codec | None, ranks: int) -> float:
        """Return the factor of a sum over `ranks` inputs before `codec` encodes it: a power of two.

        For a mean it is at most 1 / ranks if the codec has no scale of its own, which must not saturate on a sum whose
        mean it can represent; otherwise it is 1.
        """
        if self.divisor == 1 or codec is None or not codec.ranged:
            return 1.0
        return 0.5 ** (ranks * self.terms - 1).bit_length()

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace(self.device)

    def __reduce__(self) -> tuple[type[Workspace], tuple[bool]]:
        return Workspace, (self.device,)
