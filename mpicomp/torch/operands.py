"""The tensors of a plain call: which are taken, and the arrays that it reads and writes for them.

Tensors are checked before the ranks agree, and looked into when their turn has come: a collective that was begun
before, on the same process group, may still write to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch

from mpicomp.api.accept import check_apart, overlaps_itself
from mpicomp.api.arguments import Form, as_list
from mpicomp.api.call import Call, Operation
from mpicomp.arrays import Array
from mpicomp.torch.streams import bound, device_of
from mpicomp.torch.tensors import COMPLEX, NAMES, bits_of, check_local, lent, span, whole

DTYPES = (*NAMES, *COMPLEX)
"""What a method takes."""
INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
"""What `dense` sums, too."""
PLAIN = (torch.Tensor, torch.nn.Parameter)  # other subclasses may be more than their elements

Kinds = Sequence[torch.dtype] | None
"""Dtypes that a call takes, None for all: it sends elements as they are."""


class Operands:
    """The tensors that a call is given, one or a list, and its outputs, once they are checked."""

    def __init__(self, x: Any, kinds: Kinds, what: str = "x") -> None:
        """TypeError or ValueError for what is no tensor, or one that is not taken; `what` is its name there."""
        self.listed = isinstance(x, (list, tuple))
        self.given: list[torch.Tensor] = as_list(x)
        if not self.given:
            raise ValueError(f"{what} is an empty list")
        for place, tensor in enumerate(self.given):
            _check(tensor, f"{what}[{place}]" if self.listed else what, kinds)
        self.device = device_of(self.given)
        if len({tensor.device for tensor in self.given}) > 1:
            raise ValueError(f"the tensors of {what} must be on one device; make a call for each")
        names = tuple(_name(tensor.dtype) for tensor in self.given)
        shapes = tuple(tuple(tensor.shape) for tensor in self.given)
        self.form = Form(shapes, names, self.listed, self.device is not None)
        """Their shapes and dtypes."""
        self._shapes = shapes
        self._outs: list[torch.Tensor] | None = None
        self._inference = torch.is_inference_mode_enabled()  # of the user's thread

    def towards(self, out: Any, form: Form, like: str, over: bool = False) -> None:
        """Take outputs of a form, None for new ones; TypeError or ValueError for what cannot hold the results.

        `like` says why they must be of it, and ends a sentence. With `over` an output may be the input of its place.
        """
        self._shapes = form.shapes
        if out is None:
            return
        outs = as_list(out)
        if isinstance(out, (list, tuple)) != self.listed or len(outs) != len(self.given):
            raise ValueError(f"out must be {form} {like}, got {_described(out)}")
        for place, (tensor, shape, x) in enumerate(zip(outs, form.shapes, self.given, strict=True)):
            _check_out(tensor, shape, x, f"out[{place}]" if self.listed else "out", like)
        if len(outs) > 1 or not ((over and outs[0] is self.given[0]) or _disjoint(outs[0], self.given[0])):
            check_apart(list(map(_footprint, outs)), list(map(_footprint, self.given)), over)
        self._outs = outs

    def call(
        self, operation: Operation, view: Callable[[torch.Tensor], Array] = bits_of, host: bool = False
    ) -> Call[Any]:
        """Return the call of an operation with these tensors, which returns tensors.

        `view` gives the array of a contiguous one; with `host` those of a GPU pass through the host's memory.
        """

        def run() -> Any:
            with self._mode():
                results, rooms = self._results(host)
                xs = [_read_only(view(_in_order(tensor, host))) for tensor in self.given]
                operation.run(xs, [view(room) for room in rooms])
                for result, room in zip(results, rooms, strict=True):
                    if room is not result:
                        result.copy_(room)
            return results if self.listed else results[0]

        return Call(operation.describe, bound(run, self.device), operation.digest)

    def _mode(self) -> AbstractContextManager[Any]:
        """Return the context of the user's thread: what is made there may be written to there alone."""
        same = torch.is_inference_mode_enabled() == self._inference
        return nullcontext() if same else torch.inference_mode(self._inference)

    def _results(self, host: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the results, and where each is written: to itself, or to memory that is copied to it."""
        results: list[torch.Tensor] = self._outs or [
            torch.empty(shape, dtype=x.dtype, device=x.device)
            for shape, x in zip(self._shapes, self.given, strict=True)
        ]
        rooms = [
            result
            if whole(result) and not (host and result.is_cuda)
            else torch.empty(result.shape, dtype=result.dtype, device="cpu" if host else result.device)
            for result in results
        ]
        return results, rooms


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_only(array: Array) -> Array:
    """Return an array that no reducer may write to; NumPy enforces it for arrays on the host."""
    if isinstance(array, np.ndarray):
        array.flags.writeable = False
    return array


def _in_order(tensor: torch.Tensor, host: bool) -> torch.Tensor:
    """Return a tensor whose memory holds the elements in row-major order: itself, or a copy; with `host` there."""
    if whole(tensor) and not (host and tensor.is_cuda):
        return tensor
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if host else tensor.device)
    return made.copy_(tensor)


def _check(tensor: Any, what: str, kinds: Kinds) -> None:
    """Raise TypeError or ValueError for what is no tensor, or one whose elements are not all that it is."""
    if not isinstance(tensor, torch.Tensor):
        name = what.partition("[")[0]
        raise TypeError(
            f"{what} must be a torch tensor, got {type(tensor).__name__}; for arrays use the calls of mpicomp, which "
            f"have the same names, and for a number torch.tensor({name})"
        )
    if type(tensor) not in PLAIN:
        raise TypeError(
            f"{what} is a {type(tensor).__name__}, which may be more than its elements; pass a plain tensor, such as "
            f"{what}.to_local() of a DTensor"
        )
    if tensor.is_nested:
        raise ValueError(f"{what} is a nested tensor; pass {what}.to_padded_tensor(0.0), or its parts one by one")
    if tensor.is_quantized:
        raise TypeError(f"{what} has dtype {tensor.dtype}, which is more than its elements; pass {what}.dequantize()")
    check_local([tensor])
    if kinds is not None and tensor.dtype not in kinds:
        raise TypeError(
            f"{what} has dtype {tensor.dtype}; only {', '.join((*NAMES.values(), *COMPLEX.values()))} can be "
            f"compressed, and integers summed by 'dense'; for others use torch.distributed"
        )
    if tensor.requires_grad:
        raise ValueError(f"{what} requires grad, and a collective has none; pass {what}.detach()")


def _check_out(out: Any, shape: tuple[int, ...], x: torch.Tensor, what: str, like: str) -> None:
    """Raise TypeError or ValueError unless `out` can hold a result of this shape, of the dtype and device of x."""
    _check(out, what, None)
    if (tuple(out.shape), out.dtype, out.device) != (shape, x.dtype, x.device):
        wanted = f"{x.dtype} {list(shape)} on {x.device} {like}"
        raise ValueError(f"{what} must be {wanted}, got {out.dtype} {list(out.shape)} on {out.device}")
    if not out.is_contiguous() and overlaps_itself(out.shape, out.stride(), 1):
        raise ValueError(
            f"{what} has elements that share memory, with strides {out.stride()} for shape {list(shape)}; pass a "
            f"tensor in which each has its own, as {what}.clone() is"
        )
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{what} was made in torch.inference_mode, and can be written to only there")


def _described(x: Any) -> str:
    return f"a list of {len(x)}" if isinstance(x, (list, tuple)) else f"one {type(x).__name__}"


def _disjoint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one tensor's memory ends before that of the other begins: most are found to be apart by this alone."""
    (start, stop), (first, last) = span(a), span(b)
    return stop <= first or last <= start


def _footprint(tensor: torch.Tensor) -> Array:
    """Return an array that lies where a tensor does, on a GPU too, to compare the two; it cannot be looked into."""
    size = tensor.element_size()
    return lent(tensor, tuple(tensor.shape), tuple(stride * size for stride in tensor.stride()), f"|V{size}")
