"""A future of tensors for DDP's built-in fp16 hook, which is C++ and takes no value that is an object of Python.

Futures that Python makes hold objects of Python. TorchScript makes others: its interpreter waits for one of ours, in no
thread, and ends with tensors. It does so on a thread of torch's pool, where a hook in Python must begin no collective,
since other ranks may have another order there. So none gets this future.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

SOURCE = """
def after(done: Future[int], tensors: List[Tensor]) -> List[Tensor]:
    torch.jit.wait(done)
    return tensors

def begin(done: Future[int], tensors: List[Tensor]) -> Future[List[Tensor]]:
    return torch.jit.fork(after, done, tensors)
"""

_BETWEEN = {__file__, str(Path(__file__).with_name("compiled.py")), str(Path(__file__).with_name("worker.py"))}


def wanted(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether DDP's C++ asks for the future of a collective of these tensors, which may be its fp16 hook.

    Called on behalf of the caller of `Work.get_future`: a hook in Python is a frame between autograd and that.
    """
    if torch._C._current_graph_task_id() == -1 or not tensors:
        return False
    if any(tensor.dtype != torch.float16 or tensor.is_cuda for tensor in tensors):
        return False
    dynamo = getattr(sys.modules.get("torch._dynamo.eval_frame"), "__file__", None)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in (*_BETWEEN, dynamo):
        frame = frame.f_back
    return frame is None or frame.f_code is torch.autograd.graph._engine_run_backward.__code__


def tensors_after(done: torch.futures.Future[Any], tensors: Sequence[torch.Tensor]) -> torch.futures.Future[Any]:
    """Return a future of a list of tensors that ends, or fails, when `done` does."""
    future: torch.futures.Future[Any] = _script().begin(done, list(tensors))
    return future


@functools.cache
def _script() -> Any:
    return torch.jit.CompilationUnit(SOURCE)
