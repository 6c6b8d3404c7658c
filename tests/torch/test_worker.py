"""The communication thread: order, what runs inline, and where errors go."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from mpicomp.errors import ConfigMismatchError
from mpicomp.torch.worker import Worker


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Errors that would have ended the job."""
    found: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(args.exc_value))
    return found


@pytest.fixture
def worker(reported: list[BaseException]) -> Iterator[Worker]:
    made = Worker(SimpleNamespace(rank=3))  # type: ignore[arg-type]
    yield made
    made.close()


def fail(error: BaseException | None = None) -> None:
    raise error or ZeroDivisionError("no luck")


def test_runs_in_order_on_one_thread(worker: Worker) -> None:
    seen: list[Any] = []
    works = [worker.submit(lambda i=i: seen.append((i, threading.get_ident()))) for i in range(50)]
    works[-1].wait()
    assert [i for i, _ in seen] == list(range(50))
    assert len({thread for _, thread in seen}) == 1
    assert seen[0][1] != threading.get_ident()
    assert works[0].is_completed()
    assert works[0].is_success()


def test_result_reaches_the_future(worker: Worker) -> None:
    gate = threading.Event()
    work = worker.submit(lambda: gate.wait(10))
    future = work.get_future()
    assert not future.done()
    assert not work.is_completed()
    gate.set()
    assert future.wait() is True
    assert work.result() is True


def test_a_call_is_released_before_its_wait_returns(worker: Worker) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the waiting thread continues at the earliest moment
    try:
        for _ in range(300):
            held = threading.Event()
            gone = weakref.ref(held)
            work = worker.submit(partial(bool, held))
            del held
            work.wait()
            assert gone() is None
    finally:
        sys.setswitchinterval(interval)


def test_submitted_from_a_callback_runs_inline(worker: Worker) -> None:
    """Before anything that was queued in the meantime, so that ranks cannot disagree on the order."""
    seen: list[str] = []
    gate = threading.Event()

    def inner(_: Any) -> None:
        work = worker.submit(lambda: seen.append("inner"))
        work.wait()
        seen.append("after inner")

    first = worker.submit(lambda: gate.wait(10)).get_future().then(inner)
    last = worker.submit(lambda: seen.append("last"))
    gate.set()
    last.wait()
    first.wait()
    assert seen == ["inner", "after inner", "last"]


def test_waiting_for_what_is_queued_behind_is_an_error(worker: Worker) -> None:
    gate = threading.Event()
    later: list[Any] = []
    first = worker.submit(lambda: gate.wait(10)).get_future().then(lambda _: later[0].wait())
    later.append(worker.submit(lambda: None))
    gate.set()
    with pytest.raises(RuntimeError, match="queued behind itself"):
        first.wait()


def test_error_keeps_its_type_and_traceback(worker: Worker) -> None:
    work = worker.submit(fail)
    with pytest.raises(ZeroDivisionError, match="no luck") as caught:
        work.wait()
    assert "fail" in [entry.name for entry in caught.traceback]
    assert isinstance(work.exception(), ZeroDivisionError)
    assert not work.is_success()


def test_error_through_a_future_says_where(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)communication thread of rank 3.*in fail.*no luck"):
        worker.submit(fail).get_future().wait()
    with pytest.raises(RuntimeError, match="ConfigMismatchError: they differ"):
        worker.submit(lambda: fail(ConfigMismatchError("they differ"))).get_future().wait()


def test_nothing_is_sent_between_an_error_and_its_report(worker: Worker) -> None:
    gate, ran = threading.Event(), []
    first = worker.submit(lambda: (gate.wait(10), fail()))
    second = worker.submit(lambda: ran.append(2))
    gate.set()
    with pytest.raises(ZeroDivisionError):
        second.wait()
    with pytest.raises(ZeroDivisionError):
        first.wait()
    worker.submit(lambda: ran.append(3)).wait()
    assert ran == [3]


def test_an_error_without_a_wait_ends_the_job(worker: Worker, reported: list[BaseException]) -> None:
    worker.submit(fail)
    worker.submit(lambda: None)
    worker.close()
    gc.collect()
    assert [type(error) for error in reported] == [ZeroDivisionError]


def test_error_of_a_dropped_work_is_reported_at_once(worker: Worker, reported: list[BaseException]) -> None:
    gc.disable()
    try:
        worker.submit(fail)
        done = threading.Event()
        keep = worker.submit(done.set)  # refused, and so another holder of the same failure
        assert keep.request.done.wait(10)
    finally:
        gc.enable()
    assert [type(error) for error in reported] == [ZeroDivisionError]


def test_error_that_was_seen_is_not_reported_again(worker: Worker, reported: list[BaseException]) -> None:
    work = worker.submit(fail)
    with pytest.raises(ZeroDivisionError):
        work.wait()
    future = worker.submit(fail).get_future()
    with pytest.raises(RuntimeError):
        future.wait()
    del work, future
    worker.close()
    gc.collect()
    assert reported == []


def test_close_finishes_what_is_queued_and_ends_the_thread(worker: Worker) -> None:
    seen: list[int] = []
    for i in range(10):
        worker.submit(lambda i=i: seen.append(i))
    worker.close()
    worker.close()
    assert seen == list(range(10))
    thread = worker._thread._thread
    assert thread is not None
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="destroyed"):
        worker.submit(lambda: None)
