"""A model from one rank to all: as a file, or as a codec says."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp import __version__
from mpicomp.api.arguments import Form as ArrayForm
from mpicomp.api.arguments import member_of, root_of
from mpicomp.api.call import Call, blocking
from mpicomp.api.carriers import carrier
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import as_bytes, broadcast
from mpicomp.models.files import compress_model, decompress_model
from mpicomp.models.state import Form, State, forms_of, state_of, ties
from mpicomp.reducers.gather import Gather
from mpicomp.registry import Method, arithmetic

CODED = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}
MIN_NDIM = 2  # of a tensor that a codec changes: biases, scales and counters stay exact


def bcast(comm: Any, model: nn.Module | State, codec: Method | None = None, root: int = 0) -> None:
    """Give all ranks the root's model, the same bits everywhere. Collective.

    comm: an mpi4py communicator, or a process group of backend "mpicomp". model: on every rank a model or a state dict
    with the same names, dtypes and shapes, whose tensors are written to in place. Without a codec the root sends the
    file of `compress_model`, small for a model that is pruned and shared, and everything arrives exactly. With one,
    floating-point tensors of two dimensions and more arrive as the codec says, on the root, too, and all others
    exactly.

    Raises ConfigMismatchError on all ranks where the models or arguments differ, and SpecError, TypeError or ValueError
    for arguments that cannot be used, the other ranks then ConfigMismatchError; no model is changed then.
    """
    worker = getattr(comm, "worker", None)  # a process group's own thread, which keeps its collectives in order
    if worker is None:
        _among_ranks(comm, model, codec, root)
    else:
        worker.submit(lambda: _among_ranks(comm.comm, model, codec, root)).wait()


def _bcast(comm: Comm, model: nn.Module | State, codec: Method | None, root: int) -> Call[None]:
    """Prepare `bcast`."""
    member = None if codec is None else member_of(codec)
    if member is not None and not isinstance(member, Codec):
        raise TypeError(f"bcast takes a codec, or None for the exact model, got {member}")
    root = root_of(comm, root)
    state = state_of(model)
    forms, tied = forms_of(state), ties(state)
    coded = [
        name
        for name, form in forms.items()
        if member is not None and len(form.shape) >= MIN_NDIM and form.dtype in CODED and name not in tied
    ]
    exact = {name: tensor for name, tensor in state.items() if name not in coded and tied.get(name) not in coded}
    file = compress_model(exact) if comm.rank == root else b""

    def run() -> None:
        _file(comm, exact, file, root)
        for dtype in CODED:
            some = [state[name] for name in coded if forms[name].dtype == dtype]
            if some and member is not None:
                _coded(comm, some, member, CODED[dtype], root)

    how = "as a file" if member is None else f"by {member}, arithmetic {arithmetic(Gather(member))}"
    where = f"models.bcast from rank {root} {how}, mpicomp {__version__}, {sys.byteorder} endian"
    return Call(lambda _: f"{where}, of {_listed(forms, tied)}", run)


_among_ranks = blocking(_bcast)


def _listed(forms: dict[str, Form], tied: dict[str, str]) -> str:
    """Describe a state, with a digest of all of it in front: a statement of a rank may be cut off."""
    each = [f"{name} {form}" + (f" = {tied[name]}" if name in tied else "") for name, form in forms.items()]
    text = "; ".join(each)
    return f"{len(each)} tensors, {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}: {text}"


def _file(comm: Comm, state: State, file: bytes, root: int) -> None:
    """Load the root's file on the other ranks."""
    comm.next_call()
    length = np.array([len(file)], "<u8")
    broadcast(comm, as_bytes(length), root)
    message = np.frombuffer(file, np.uint8) if comm.rank == root else np.empty(int(length[0]), np.uint8)
    broadcast(comm, message, root)
    if comm.rank != root:
        decompress_model(message.data, state)


def _coded(comm: Comm, tensors: list[Tensor], codec: Codec, dtype: str, root: int) -> None:
    """Replace tensors of one dtype on all ranks by what a codec makes of the root's."""
    form = ArrayForm(tuple(tuple(tensor.shape) for tensor in tensors), (dtype,) * len(tensors), listed=True)
    flats = [_flat(tensor) for tensor in tensors]
    results = [np.empty_like(flat) for flat in flats]
    carrier(comm, codec, form).broadcast(comm, flats, results, root)
    with torch.no_grad():
        for tensor, result in zip(tensors, results, strict=True):
            same = torch.from_numpy(result.view(np.uint8)).view(tensor.dtype).reshape(tensor.shape)
            tensor.copy_(same)


def _flat(tensor: Tensor) -> Array:
    """Return a copy of a tensor's elements in row-major order, half types as their bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).clone()
    array: Array = flat.view(torch.int16).numpy().view(np.uint16) if flat.itemsize == 2 else flat.numpy()
    return array
