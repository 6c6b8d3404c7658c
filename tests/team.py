"""A team: a communicator whose ranks are threads of one process, so that collectives are tested without MPI.

The ranks run truly concurrently, and the team is less forgiving than MPI, so that an error shows that MPI would hide
most of the time:

- a send is matched only by a posted receive, however small the message is (MPI may buffer small ones);
- requests complete after a random number of tests, so in another order on every rank;
- a receive buffer is poisoned (all bytes 0xFF: NaN in every floating-point format) when the receive is posted, and the
  message appears in it only when the request completes;
- a send buffer is poisoned when the last send that overlaps it completes, unless it is read-only, as the caller's own
  array should be: whoever wants to keep what was sent keeps a copy;
- a buffer that changes while it is in use, overlapping buffers, a receive buffer that is not of the message's size,
  ranks that are at different collectives, messages that nobody receives: all are `Misuse`;
- what a rank writes to a window is nowhere to be seen until it calls `sync`, the others' parts are read-only, and new
  windows, and freed ones, are poisoned.

All this holds among some ranks of a team (`Transport.among`) too: a thread has an end in every group that it is in.

If one rank fails, the others are released from their waiting at once. The bytes of each rank are counted here, apart
from `Comm.traffic`, so that tests compare the two.
"""

from __future__ import annotations

import math
import random
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology

T = TypeVar("T")

POISON = 0xFF  # byte
REST = 0.02  # seconds; a request that is not ready may take so long to say so, if there is no news
PATIENCE = (0, 0, 0, 1, 2, 4)  # tests of a request before it admits that it is complete, drawn for each
REDUCTIONS: dict[str, Any] = {
    "sum": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "prod": np.multiply,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
NUMERIC = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"float32", "float64"}


class Misuse(RuntimeError):
    """What a rank did is an error under MPI too, or works there by luck."""


class Released(RuntimeError):
    """Another rank has failed, and this one was waiting."""


class Aborted(RuntimeError):
    """A rank ended the job."""


class Collective(NamedTuple):
    """One of MPI's own collectives, as a rank called it."""

    name: str
    nbytes: int

    def modelled(self, ranks: int) -> int:
        """Return the bytes that `Comm.traffic` is to show for it."""
        factor = 2 if self.name == "allreduce" else 1
        return math.ceil(factor * self.nbytes * (ranks - 1) / ranks)


class Buffer(NamedTuple):
    """Memory that an operation under way reads or writes."""

    start: int
    end: int
    written: bool


class Operation:
    """An operation under way: ready when the peers have done their part, finished when this rank has seen that."""

    def __init__(self, rank: Rank, sent: Array | None, received: Array | None) -> None:
        self.rank = rank
        self.sent, self.received = sent, received
        self.posted = None if sent is None else sent.copy()  # what was to be sent
        self.message: Array | None = None  # what is to be received
        self.made: Any = None  # what a collective makes that moves no data
        self.ready = self.finished = False
        self.error: Exception | None = None
        self.patience = rank.thread.random.choice(PATIENCE)
        self.buffers: list[Buffer] = []
        for data, written in ((received, True), (sent, False)):
            if data is not None and data.size:
                self._use(data, written)
        if received is not None:
            received.view(np.uint8).fill(POISON)
        rank.thread.under_way.append(self)

    def _use(self, data: Array, written: bool) -> None:
        start: int = data.__array_interface__["data"][0]
        mine = Buffer(start, start + data.nbytes, written)
        if written and not data.flags.writeable:
            raise Misuse("a receive buffer is read-only")
        for other in [buffer for op in self.rank.thread.under_way for buffer in op.buffers] + self.buffers:
            if mine.start < other.end and other.start < mine.end and (mine.written or other.written):
                raise Misuse("a buffer overlaps another one in use, and one of the two is written to")
        self.buffers.append(mine)

    def Test(self) -> bool:
        if self.finished:
            return True
        if self.rank.team.failed.is_set():
            raise Released(f"rank {self.rank.rank} was waiting when another rank failed")
        if not self.ready:
            self.rank.thread.rest()
            return False
        if self.patience:
            self.patience -= 1
            return False
        self._finish()
        return True

    def become_ready(self) -> None:
        """Tell the rank that its peers have done their part; called by any thread, with the team's lock."""
        self.ready = True
        self.rank.thread.ready += 1
        self.rank.thread.news.set()

    def _finish(self) -> None:
        self.finished = True
        self.rank.thread.under_way.remove(self)
        with self.rank.team.lock:
            self.rank.thread.ready -= 1
        if self.error is not None:
            raise self.error
        if self.received is not None:
            if not (self.received.view(np.uint8) == POISON).all():
                raise Misuse("a receive buffer was written to while a message was under way to it")
            assert self.message is not None
            self.received[...] = self.message
        if self.sent is not None:
            assert self.posted is not None
            if self.sent.tobytes() != self.posted.tobytes():
                raise Misuse("a send buffer was written to while it was being sent")
            self._poison()

    def _poison(self) -> None:
        """Make the sent bytes useless, unless another operation still reads some of them."""
        assert self.sent is not None
        if not self.sent.size or not self.sent.flags.writeable:
            return
        start: int = self.sent.__array_interface__["data"][0]
        end = start + self.sent.nbytes
        in_use = (buffer for op in self.rank.thread.under_way for buffer in op.buffers)
        if not any(start < buffer.end and buffer.start < end for buffer in in_use):
            self.sent.view(np.uint8).fill(POISON)


class Thread:
    """A rank of the team itself: what is under way in it, in all groups together."""

    def __init__(self, team: Team, rank: int, seed: int) -> None:
        self.team = team
        self.rank = rank
        self.random = random.Random(seed * 1000 + rank)
        self.under_way: list[Operation] = []
        self.ready = 0  # of these, how many are ready
        self.news = threading.Event()
        self.left = False
        self.ends: list[Rank] = []

    def rest(self) -> None:
        """Give the core away until something happens, if nothing has that this rank does not know yet; not for long."""
        self.news.clear()
        if not self.ready and not self.team.failed.is_set():
            self.news.wait(REST)


class Group:
    """Some threads of a team that communicate among themselves: their mailboxes and meetings."""

    def __init__(self, team: Team, threads: Sequence[Thread]) -> None:
        self.sends: Mailboxes = defaultdict(deque)
        self.receives: Mailboxes = defaultdict(deque)
        self.meetings: dict[object, Meeting] = {}
        self.notices: dict[int, deque[tuple[int, Array]]] = defaultdict(deque)  # by receiver: sender, what it says
        self.renewal: Group | None = None  # what takes its place
        self.ranks = [Rank(team, self, thread, rank) for rank, thread in enumerate(threads)]


class Rank:
    """One thread's end of a group: a Transport."""

    ready = True

    def __init__(self, team: Team, group: Group, thread: Thread, rank: int) -> None:
        self.team, self.group, self.thread = team, group, thread
        self.rank = rank
        self.sent = [0, 0]  # bytes, messages
        self.collectives: list[Collective] = []
        self.made: dict[tuple[int, ...], int] = defaultdict(int)  # groups of some ranks, how often
        thread.ends.append(self)

    @property
    def size(self) -> int:
        return len(self.group.ranks)

    @property
    def sent_bytes(self) -> int:
        """What the thread has sent in all its groups."""
        return sum(end.sent[0] for end in self.thread.ends)

    @property
    def sent_messages(self) -> int:
        return sum(end.sent[1] for end in self.thread.ends)

    @property
    def modelled_bytes(self) -> int:
        return sum(collective.modelled(end.size) for end in self.thread.ends for collective in end.collectives)

    def send(self, data: Array, peer: int, tag: int) -> Operation:
        self._check(data, peer, np.dtype(np.uint8))
        operation = Operation(self, data, None)
        self.sent[0] += data.size
        self.sent[1] += 1
        self._post(operation, (self.rank, peer, tag), peer, self.group.sends, self.group.receives)
        return operation

    def receive(self, data: Array, peer: int, tag: int) -> Operation:
        self._check(data, peer, np.dtype(np.uint8))
        operation = Operation(self, None, data)
        self._post(operation, (peer, self.rank, tag), peer, self.group.receives, self.group.sends)
        return operation

    def allreduce(self, x: Array, total: Array, op: str) -> Operation:
        if x.dtype.name not in NUMERIC:
            raise TypeError(f"MPI has no datatype for {x.dtype}")
        self._check(x, None, x.dtype)
        self._check(total, None, x.dtype)
        if total.size != x.size:
            raise Misuse(f"allreduce of {x.size} elements into {total.size}")
        operation = Operation(self, x.copy() if x is total else x, total)
        self._join(operation, ("allreduce", op, x.dtype.name, x.size), x.nbytes)
        return operation

    def broadcast(self, data: Array, root: int) -> Operation:
        if not 0 <= root < self.size:
            raise Misuse(f"no rank {root} in a team of {self.size}")
        self._check(data, None, np.dtype(np.uint8))
        mine = self.rank == root
        operation = Operation(self, data if mine else None, None if mine else data)
        self._join(operation, ("broadcast", root, data.size), data.size)
        return operation

    def progress(self) -> None:
        pass

    def notify(self, data: Array, peer: int) -> None:
        with self.team.lock:
            self.group.notices[peer].append((self.rank, data.copy()))

    def notice(self, nbytes: int) -> tuple[int, Array] | None:
        with self.team.lock:
            waiting = self.group.notices[self.rank]
            if not waiting:
                return None
            sender, data = waiting.popleft()
        if data.size != nbytes:
            raise Misuse(f"a notice of {data.size} bytes, taken as one of {nbytes}")
        return sender, data

    @staticmethod
    def check_threads() -> None:
        pass

    def topology(self) -> Topology:
        everywhere = self.team.topology
        place = {thread_end.thread.rank: thread_end.rank for thread_end in self.group.ranks}
        nodes = [tuple(sorted(place[rank] for rank in node if rank in place)) for node in everywhere.nodes]
        return Topology(tuple(sorted(node for node in nodes if node)))

    def among(self, ranks: Sequence[int]) -> Rank:
        chosen = tuple(ranks)
        if self.rank not in chosen or len(set(chosen)) < len(chosen):
            raise Misuse(f"rank {self.rank} makes a group of the ranks {chosen}")
        self.made[chosen] += 1
        operation = Operation(self, None, None)
        self._meet(operation, (chosen, self.made[chosen]), ("among", *chosen), chosen)
        while not operation.Test():
            pass
        made: Group = operation.made
        return made.ranks[chosen.index(self.rank)]

    def window(self, nbytes: int) -> TeamWindow:
        node = self.team.topology.node_of(self.thread.rank)
        if any(self.team.topology.node_of(end.thread.rank) != node for end in self.group.ranks):
            raise Misuse("a window of ranks on several nodes")
        return TeamWindow(self, self._together(("window", nbytes)))

    def _together(self, what: tuple[Any, ...]) -> Any:
        """Do a collective that moves no data; return what all ranks get."""
        operation = Operation(self, None, None)
        self._join(operation, what, 0)
        while not operation.Test():
            pass
        return operation.made

    def renewed(self) -> tuple[Rank, Operation]:
        with self.team.lock:
            if self.group.renewal is None:
                self.group.renewal = Group(self.team, [end.thread for end in self.group.ranks])
                self.team.groups.append(self.group.renewal)
        made = self.group.renewal.ranks[self.rank]
        operation = Operation(made, None, None)
        made._join(operation, ("renewed",), 0)
        return made, operation

    def remember(self, key: int | None, comm: object) -> None:
        pass

    def abandon(self) -> list[Operation]:
        """Give up what is under way in this group, as MPI cannot: tests see what the library does afterwards."""
        with self.team.lock:
            for operation in [each for each in self.thread.under_way if each.rank is self]:
                self.thread.under_way.remove(operation)
                self.thread.ready -= operation.ready
                operation.finished = True
            for boxes in (self.group.sends, self.group.receives):
                for box in boxes.values():
                    for operation in [each for each in box if each.rank is self]:
                        box.remove(operation)
            for number, meeting in list(self.group.meetings.items()):
                if self.rank in meeting.operations:
                    self.group.meetings.pop(number)
        return []

    def free(self) -> None:
        self._together(("free", self.size))

    def abort(self, code: int) -> None:
        with self.team.lock:
            self.team.aborted = self.team.aborted or (self.rank, code)
        self.team.fail()

    def _check(self, data: Array, peer: int | None, dtype: np.dtype[Any]) -> None:
        if data.ndim != 1 or not data.flags.c_contiguous or data.dtype != dtype:
            raise Misuse(f"a buffer must be contiguous ({dtype}, 1-D), got {data.dtype}, {data.ndim}-D")
        if peer is not None and (peer == self.rank or not 0 <= peer < self.size):
            raise Misuse(f"rank {self.rank} of {self.size} has no peer {peer}")

    def _post(self, mine: Operation, channel: Channel, peer: int, mates: Mailboxes, theirs: Mailboxes) -> None:
        """Match an operation with the peer's oldest one of this channel, or leave it for the peer to match."""
        with self.team.lock:
            if not theirs[channel]:
                mates[channel].append(mine)
                if self.group.ranks[peer].thread.left:
                    raise Misuse(f"rank {self.rank} needs rank {peer}, which has returned")
                return
            other = theirs[channel].popleft()
            send, receive = (mine, other) if mine.sent is not None else (other, mine)
            assert send.posted is not None
            assert receive.received is not None
            if send.posted.size != receive.received.size:
                receive.error = Misuse(
                    f"rank {receive.rank.rank} has a buffer of {receive.received.size} bytes for a message of "
                    f"{send.posted.size} from rank {send.rank.rank}"
                )
            receive.message = send.posted
            send.become_ready()
            receive.become_ready()

    def _join(self, operation: Operation, what: tuple[Any, ...], nbytes: int) -> None:
        """Take part in the next of the group's collectives."""
        self.collectives.append(Collective(what[0], nbytes))
        self._meet(operation, len(self.collectives), what, range(self.size))

    def _meet(self, operation: Operation, number: object, what: tuple[Any, ...], expected: Sequence[int]) -> None:
        """Come to a meeting of these ranks; the last one to come computes its result."""
        with self.team.lock:
            meeting = self.group.meetings.setdefault(number, Meeting(what, {}, expected))
            if meeting.what != what:
                raise Misuse(f"rank {self.rank} is at {what} while others are at {meeting.what}")
            meeting.operations[self.rank] = operation
            for rank in expected:
                if self.group.ranks[rank].thread.left and rank not in meeting.operations:
                    raise Misuse(f"rank {self.rank} is at {what}, but rank {rank} has returned")
            if len(meeting.operations) == len(expected):
                del self.group.meetings[number]
                meeting.conclude()


class TeamWindow:
    """A window among threads; see the module. A rank reads its own part as it wrote it, others' as they synced it."""

    def __init__(self, rank: Rank, seen: list[Array]) -> None:
        self._rank, self._seen = rank, seen
        self._mine = seen[rank.rank].copy()
        self.parts: list[Array] = [part.view() for part in seen]
        for part in self.parts:
            part.flags.writeable = False
        self.parts[rank.rank] = self._mine

    def sync(self) -> None:
        self._seen[self._rank.rank][...] = self._mine

    def free(self) -> None:
        self._rank._together(("free", id(self._seen)))
        for part in (self._mine, self._seen[self._rank.rank]):
            part[...] = POISON
        self.parts = []


class Meeting(NamedTuple):
    """One of a group's collectives: what it is, the operations of the ranks that have come, and who is to come."""

    what: tuple[Any, ...]
    operations: dict[int, Operation]
    expected: Sequence[int]

    def conclude(self) -> None:
        """Compute the result, in rank order, and hand it to everyone."""
        posted = [self.operations[rank].posted for rank in sorted(self.operations)]
        first = next(iter(self.operations.values())).rank
        result: Any = None
        made: Any = None
        if self.what[0] == "among":
            made = Group(first.team, [first.group.ranks[rank].thread for rank in self.expected])
            first.team.groups.append(made)
        elif self.what[0] == "window":
            made = [np.full(self.what[1], POISON, np.uint8) for _ in self.expected]
        elif self.what[0] in ("free", "renewed"):
            pass
        elif self.what[0] == "broadcast":
            result = posted[self.what[1]]
        else:
            result = posted[0]
            with np.errstate(all="ignore"):
                for x in posted[1:]:
                    result = REDUCTIONS[self.what[1]](result, x)
        for operation in self.operations.values():
            operation.message, operation.made = result, made
            operation.become_ready()


Channel = tuple[int, int, int]  # source, destination, tag
Mailboxes = defaultdict[Channel, deque[Operation]]


class Team:
    """Some ranks that are threads; `run` makes them all do the same.

    `comms` and their traffic last as long as the team, so that `run` may be called again, unless a rank fails: then
    the team is finished. `timeout` is that of the library's watchdog, in seconds; long, since the first call of a
    kernel compiles it.
    """

    def __init__(self, size: int, seed: int = 0, timeout: float = 300.0, topology: Topology | None = None) -> None:
        self.size = size
        self.topology = topology or Topology.flat(size)
        self.lock = threading.Lock()
        self.failed = threading.Event()
        self.aborted: tuple[int, int] | None = None  # rank, code
        self.errors: dict[int, BaseException] = {}  # by rank, in the order in which they came
        self.threads = [Thread(self, rank, seed) for rank in range(size)]
        self.groups = [Group(self, self.threads)]  # the whole team, and those made since
        self.ranks = self.groups[0].ranks
        self.comms = [Comm(rank, timeout) for rank in self.ranks]

    def run(self, f: Callable[[Comm], T], alike: bool = True) -> list[T]:
        """Call `f` on all ranks; return what they return, or raise the first error.

        Ranks that are `alike` must have begun equally many collectives: notices of an end depend on it.
        """
        if self.failed.is_set():
            raise RuntimeError("this team has failed")
        results: list[Any] = [None] * self.size

        def work(rank: Rank) -> None:
            try:
                results[rank.rank] = f(self.comms[rank.rank])
                self._leave(rank.thread)
            except BaseException as error:
                with self.lock:
                    self.errors[rank.rank] = error
                self.fail()

        for thread_of in self.threads:
            thread_of.left = False
        threads = [threading.Thread(target=work, args=(rank,), name=f"rank-{rank.rank}") for rank in self.ranks]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C, or a deadline: the main thread alone sees it
            self.fail()
            raise
        self._raise_first()
        begun = [comm.collective_count for comm in self.comms]
        if alike and len(set(begun)) > 1 and not any(comm.broken for comm in self.comms):
            raise Misuse(f"the ranks have begun {begun} collectives")
        return results

    def fail(self) -> None:
        """Release all ranks from their waiting."""
        self.failed.set()
        for thread in self.threads:
            thread.news.set()

    def attempt(self, f: Callable[[Comm], T]) -> list[T | Exception]:
        """Call `f` on all ranks; return what they return or raise. A rank that raises counts as returned."""

        def caught(comm: Comm) -> T | Exception:
            try:
                return f(comm)
            except (Misuse, Released):
                raise
            except Exception as error:
                return error

        return self.run(caught, alike=False)

    def _leave(self, thread: Thread) -> None:
        """Note that a rank has returned, and that whoever waits for it waits in vain."""
        with self.lock:
            thread.left = True
            if thread.under_way:
                raise Misuse(f"rank {thread.rank} returned with {len(thread.under_way)} requests under way")
            for end in thread.ends:
                self._leave_group(end)

    def _leave_group(self, rank: Rank) -> None:
        for box, verb in ((rank.group.sends, "sends to"), (rank.group.receives, "receives from")):
            for (source, destination, _), operations in box.items():
                if operations and rank.rank in (source, destination):
                    raise Misuse(f"rank {rank.rank} returned, but rank {operations[0].rank.rank} {verb} it")
        for meeting in rank.group.meetings.values():
            if rank.rank in meeting.expected and rank.rank not in meeting.operations:
                raise Misuse(f"rank {rank.rank} returned, but others are at {meeting.what}")

    def _raise_first(self) -> None:
        errors = sorted(self.errors.items(), key=lambda item: isinstance(item[1], Released))  # stable
        if errors and not isinstance(errors[0][1], Released):
            rank, error = errors[0]
            if sys.version_info >= (3, 11):
                error.add_note(f"raised on rank {rank} of a team of {self.size}")
            raise error
        if self.aborted:
            raise Aborted("rank {} ended the job with code {}".format(*self.aborted))
