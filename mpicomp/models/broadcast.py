"""A model from one rank to all: as a file, or as a codec says."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp import __version__
from mpicomp.api.arguments import Form as ArrayForm
from mpicomp.api.arguments import member_of, root_of
from mpicomp.api.call import Call, Ordered, blocking
from mpicomp.api.carriers import carrier
from mpicomp.arrays import Array
from mpicomp.codecs.base import Codec
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import as_bytes, broadcast
from mpicomp.models.files import compress_model, decompress_model
from mpicomp.models.state import Form, State, check_fits, forms_of, load, overlaps, target_of, tensor_of, ties
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
    exactly; so do those that hold NaN or infinity, as a mask of attention, or overlap with others.

    Raises ConfigMismatchError on all ranks where the models or arguments differ, and SpecError, TypeError or ValueError
    for arguments that cannot be used, the other ranks then ConfigMismatchError; no model is changed then.
    """
    if isinstance(comm, Ordered):
        comm.in_order(lambda: _among_ranks(comm.comm, model, codec, root))
    else:
        _among_ranks(comm, model, codec, root)


def _bcast(comm: Comm, model: nn.Module | State, codec: Method | None, root: int) -> Call[None]:
    """Prepare `bcast`."""
    member = None if codec is None else member_of(codec)
    if member is not None and not isinstance(member, Codec):
        raise TypeError(f"bcast takes a codec, or None for the exact model, got {member}")
    root = root_of(comm, root)
    state = dict(sorted(target_of(model).items()))  # ranks may have them in other orders
    forms, tied, groups = forms_of(state), ties(state), overlaps(state)
    mixed = {name for group in groups if len({tied.get(name, name) for name in group}) > 1 for name in group}
    codable = [
        name
        for name, form in forms.items()
        if member is not None and len(form.shape) >= MIN_NDIM and form.dtype in CODED and name not in {*tied, *mixed}
    ]

    def exact(coded: Collection[str]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if tied.get(name, name) not in coded}

    mine = exact({name for name in codable if bool(state[name].isfinite().all())})
    file = compress_model(mine) if comm.rank == root else b""

    def run() -> None:
        sent = bytes_of_root(comm, file, root)
        most = sum(form.nbytes for form in forms.values())
        new = dict(mine) if comm.rank == root else decompress_model(sent.data, max_bytes=most)
        coded = [name for name in codable if name not in new]
        check_fits(forms_of(new), forms_of(exact(set(coded))), "the root's file is")
        for dtype in CODED:
            some = [name for name in coded if forms[name].dtype == dtype]
            if some and member is not None:
                new.update(zip(some, _coded(comm, [state[name] for name in some], member, dtype, root), strict=True))
        if comm.rank != root or coded:
            load(model, {name: new[tied.get(name, name)] for name in state})

    how = "as a file" if member is None else f"by {member}, arithmetic {arithmetic(Gather(member))}"
    where = f"models.bcast from rank {root} {how}, mpicomp {__version__}, {sys.byteorder} endian"
    return Call(lambda _: f"{where}, of {_listed(forms, tied, groups)}", run)


_among_ranks = blocking(_bcast)


def _listed(forms: dict[str, Form], tied: dict[str, str], groups: list[list[str]]) -> str:
    """Describe a state, with a digest of all of it in front: a statement of a rank may be cut off."""
    each = [f"{name} {form}" + (f" = {tied[name]}" if name in tied else "") for name, form in forms.items()]
    text = "; ".join([*each, *(f"in one place: {', '.join(group)}" for group in groups)])
    return f"{len(each)} tensors, {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}: {text}"


def bytes_of_root(comm: Comm, data: bytes, root: int) -> Array:
    """Return the root's bytes on all ranks, (nbytes,) uint8; the others do not know how many there are. Collective."""
    comm.next_call()
    length = np.array([len(data)], "<u8")
    broadcast(comm, as_bytes(length), root)
    message = np.frombuffer(data, np.uint8) if comm.rank == root else np.empty(int(length[0]), np.uint8)
    broadcast(comm, message, root)
    return message


def _coded(comm: Comm, tensors: list[Tensor], codec: Codec, dtype: torch.dtype, root: int) -> list[Tensor]:
    """Return what a codec makes of the root's tensors of one dtype, on all ranks. Collective."""
    form = ArrayForm(tuple(tuple(tensor.shape) for tensor in tensors), (CODED[dtype],) * len(tensors), listed=True)
    flats = [_flat(tensor) for tensor in tensors]
    results = [np.empty_like(flat) for flat in flats]
    carrier(comm, codec, form).broadcast(comm, flats, results, root)
    return [tensor_of(result, Form(dtype, tuple(x.shape))) for result, x in zip(results, tensors, strict=True)]


def _flat(tensor: Tensor) -> Array:
    """Return a copy of a tensor's elements in row-major order, half types as their bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).clone()
    array: Array = flat.view(torch.int16).numpy().view(np.uint16) if flat.itemsize == 2 else flat.numpy()
    return array
