"""What `kernels.py --device gpu` measures: its rows, which bytes must move, and the bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kernels_report import OPS, Row
from kernels_subjects import EliasFano, Subject

from mpicomp.codecs import RandomK, Sign, Ternary

BARS: dict[str, tuple[float | None, float | None, float | None]] = {
    "uniform": (0.8, 0.8, 0.8),
    "sign": (0.8, 0.8, 0.8),
    "cast(dtype=bf16)": (0.8, 0.8, 0.8),
    "threshold(at=2.5758)": (0.8, None, None),  # 1 % of x is selected
    "threshold(at=3.6428)": (None, 0.8, None),  # 1 % of x + old
    "topk(density=0.01)": (None, 0.5, None),
}
"""Share of the copy bandwidth that each op must reach, in the order of OPS, by spec; of medians."""
BARS_FROM = 1 << 26  # elements; what is smaller is a matter of launches
TRIP_BAR = 0.1  # of the time that the dense bucket takes to the host and back
TRIPS = ("topk(density=0.01)", "sign")
"""What is held against that bar."""


def bytes_moved(codec: Any, op: str, size: int, subject: Subject) -> int:
    """Return how many bytes an op must move between the GPU and its memory, for `size` float32 elements.

    encode              x is read, the payload written: 4 n + payload. Of `randomk` only the elements kept are read.
    encode_residual     x and old are read, new and the payload written: 12 n + payload.
    decode_add          the payload is read, out read and written: 8 n + payload; where only some elements change, 8
                        bytes for each (memory moves 32 at a time, so such rows cannot come near the copy's bandwidth).

    A scale of the whole array is known only when all of it was read, and the array does not fit into the GPU: what
    needs it is read a second time. That is x and old in `sign`'s encode_residual (its signs need no scale, so its
    encode reads once), 20 n + payload (to write x + old to new first, and read it again, comes to the same), and x in
    both encodings of `ternary`. What else a codec reads twice, or writes in between, is not counted.
    """
    if isinstance(codec, EliasFano):  # the code, and the indices or, to add at them, values and elements
        return (4 if op == "encode" else 12) * subject.touched + subject.nbytes
    twice = isinstance(codec, Ternary) or (isinstance(codec, Sign) and op == "encode_residual")
    if op == "encode":
        read = 4 * (subject.touched if isinstance(codec, RandomK) else size)
        return read * (1 + twice) + subject.nbytes
    if op == "encode_residual":
        return 8 * size * (1 + twice) + 4 * size + subject.residual_nbytes
    return 8 * (subject.touched if hasattr(codec, "values") else size) + subject.nbytes  # `values`: of sparse codecs


@dataclass(frozen=True)
class GPURow(Row):
    """One op of one system on arrays in a GPU's memory; times by CUDA events, memcpy is a copy within that memory."""

    CAPTION: ClassVar[str] = "share of the bandwidth of memcpy ({:.3g} ms), medians, and its times"
    AXIS: ClassVar[str] = "share of memcpy's bandwidth (medians)"
    SIGNS: ClassVar[tuple[str, str]] = ("≥", "<")

    bytes_moved: int = 0
    of_copy_bandwidth: float = 0.0  # bytes_moved / seconds, over the copy's: 8 bytes an element / memcpy_seconds

    @property
    def bar(self) -> float | None:
        """Share of the copy bandwidth that this row must reach, None where none is asked for."""
        if self.system != "mpicomp" or self.size < BARS_FROM:
            return None
        return BARS.get(self.codec, (None,) * 3)[OPS.index(self.op)]

    @property
    def missed(self) -> bool:
        """Whether a bar is missed."""
        return self.bar is not None and self.of_copy_bandwidth < self.bar

    @property
    def figure(self) -> float:
        """See Row."""
        return self.of_copy_bandwidth

    @property
    def text(self) -> str:
        """See Row."""
        return f"{self.of_copy_bandwidth:.2f} {self.over_memcpy:.2f}x"


@dataclass(frozen=True)
class TripRow(Row):
    """A bucket that is encoded, its payload copied to pinned host memory and back, and decoded.

    memcpy is the dense bucket's copy to pinned memory and back. `seconds` is what the GPU took, by CUDA events, while
    the host ran ahead of it; in the waited ones, by the host's clock, the GPU was idle before, and the host waited for
    the payload as it does to send it.
    """

    CAPTION: ClassVar[str] = "times memcpy to the host and back ({:.3g} ms), medians; where the host waits for each"

    waited_seconds: float = 0.0
    waited_memcpy_seconds: float = 0.0

    @property
    def bar(self) -> float | None:
        """Times the dense copies that this row may show."""
        return TRIP_BAR if self.system == "mpicomp" and self.codec in TRIPS else None

    @property
    def missed(self) -> bool:
        """Whether the bar is missed."""
        return self.bar is not None and self.over_memcpy > self.bar

    @property
    def text(self) -> str:
        """See Row."""
        return f"{self.over_memcpy:.3f} {self.waited_seconds / self.waited_memcpy_seconds:.3f}"
