"""The code that a user would write with NumPy or torch for the same codes; `kernels.py` times it beside ours.

Each peer is an encoder and a decoder made of whole-array operations, which allocate their results, as such code does.
On a GPU torch's are the same, and bitsandbytes, where it is installed, quantises blocks with its own kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from mpicomp.arrays import Array
from mpicomp.codecs import Cast, Sign, TopK, Uniform

Arrays = tuple[Any, ...]  # NumPy arrays or tensors


class Peer(NamedTuple):
    """One system's way to code an array: `encode(x)` returns arrays, `decode_add(arrays, out)` adds them to out."""

    system: str
    encode: Callable[[Any], Arrays]
    decode_add: Callable[[Arrays, Any], None]
    decode: Callable[[Arrays], Any] | None = None
    """The decoded array, where `encode_residual` subtracts it; None where it sets the elements kept to zero."""
    same_code: bool = True
    """Whether its error should be that of the codec."""

    def encode_residual(self, x: Any, old: Any) -> tuple[Arrays, Any]:
        """Return the code of x + old and its error."""
        total = x + old
        arrays = self.encode(total)
        if self.decode is None:
            total[arrays[1]] = 0  # (values, indices)
            return arrays, total
        return arrays, total - self.decode(arrays)

    def array(self, x: Array) -> Any:
        """View an array of NumPy or CuPy as this system's own kind."""
        return x if self.system == "numpy" else from_dlpack(x)


def peers_of(codec: object, size: int, device: str = "cpu") -> Iterator[Peer]:
    """Yield the peers of a codec for arrays of `size` float32 elements; none where there is no obvious way."""
    torch.set_num_threads(1)
    if isinstance(codec, TopK) and str(codec) == f"topk(density={codec.density!r})":
        k = codec.fields(size, "float32")[0].shape[0]
        yield from top_k(k)
    elif isinstance(codec, Uniform) and codec.bits in (4, 8) and size % codec.block == 0 and codec.scaled:
        if str(codec) in (str(Uniform(codec.bits, codec.block, stochastic)) for stochastic in (False, True)):
            yield numpy_uniform(codec.bits, codec.block, codec.stochastic)
            yield torch_uniform(codec.bits, codec.block, codec.stochastic)
        if str(codec) == str(Uniform(codec.bits, codec.block)) and device != "cpu":
            yield from bitsandbytes_blocks(codec.bits, codec.block)
    elif isinstance(codec, Sign) and str(codec) == "sign" and size % 8 == 0:
        yield from sign(size, device)
    elif isinstance(codec, Cast):
        yield from cast(codec.dtype)


def adding(decode: Callable[[Arrays], Any]) -> Callable[[Arrays, Any], None]:
    """Return a function that adds a decoded array to `out`."""

    def decode_add(arrays: Arrays, out: Any) -> None:
        out += decode(arrays)

    return decode_add


def top_k(k: int) -> Iterator[Peer]:
    """Yield argpartition and torch.topk of the magnitudes; indices of 32 bits (NumPy) and 64 bits (torch)."""

    def encode(x: Array) -> Arrays:
        indices = np.argpartition(np.abs(x), x.size - k)[x.size - k :]
        return x[indices], indices.astype(np.uint32)

    def decode_add(arrays: Arrays, out: Array) -> None:
        values, indices = arrays
        out[indices] += values

    yield Peer("numpy", encode, decode_add)

    def torch_encode(x: torch.Tensor) -> Arrays:
        indices = torch.topk(x.abs(), k, sorted=False).indices
        return x[indices], indices

    def torch_decode_add(arrays: Arrays, out: torch.Tensor) -> None:
        values, indices = arrays
        out.index_add_(0, indices, values)

    yield Peer("torch", torch_encode, torch_decode_add)


def numpy_uniform(bits: int, block: int, stochastic: bool) -> Peer:
    """Return a chain of array operations; codes as bytes, two of them in one for 4 bits."""
    levels = (1 << (bits - 1)) - 1
    rng = np.random.default_rng(0)

    def encode(x: Array) -> Arrays:
        blocks = x.reshape(-1, block)
        scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(levels)
        steps = blocks / scales
        rounded = np.floor(steps + rng.random(steps.shape, np.float32)) if stochastic else np.rint(steps)
        codes = rounded.astype(np.int8).reshape(-1)
        if bits == 4:
            codes = (codes[0::2] & 15) | (codes[1::2] << 4)
        return scales, codes

    def decode(arrays: Arrays) -> Array:
        scales, codes = arrays
        if bits == 4:
            both = np.empty(2 * codes.size, np.int8)
            both[0::2], both[1::2] = codes << 4 >> 4, codes >> 4
            codes = both
        decoded: Array = (codes.reshape(-1, block) * scales).reshape(-1)
        return decoded

    return Peer("numpy", encode, adding(decode), decode)


def torch_uniform(bits: int, block: int, stochastic: bool) -> Peer:
    """Return a chain of ATen operations; codes as bytes, two of them in one for 4 bits."""
    levels = (1 << (bits - 1)) - 1

    def encode(x: torch.Tensor) -> Arrays:
        blocks = x.view(-1, block)
        scales = blocks.abs().amax(dim=1, keepdim=True) / levels
        steps = blocks / scales
        rounded = torch.floor(steps + torch.rand_like(steps)) if stochastic else torch.round(steps)
        codes = rounded.to(torch.int8).view(-1)
        if bits == 4:
            codes = (codes[0::2] & 15) | (codes[1::2] << 4)
        return scales, codes

    def decode(arrays: Arrays) -> torch.Tensor:
        scales, codes = arrays
        if bits == 4:
            codes = torch.stack((codes << 4 >> 4, codes >> 4), dim=1)
        decoded: torch.Tensor = (codes.view(-1, block) * scales).view(-1)
        return decoded

    return Peer("torch", encode, adding(decode), decode)


class Scales(NamedTuple):
    """The second result of bitsandbytes, beside its codes."""

    state: Any

    @property
    def nbytes(self) -> int:
        """The bytes of the largest magnitudes of blocks: the part that is sent."""
        return int(self.state.absmax.nbytes)


def bitsandbytes_blocks(bits: int, block: int) -> Iterator[Peer]:
    """Yield its NormalFloat of 4 bits or its dynamic code of 8: as many bits as ours, values for normal numbers."""
    if importlib.util.find_spec("bitsandbytes") is None or block not in (64, 128, 256, 512, 1024, 2048, 4096):
        return
    functional = importlib.import_module("bitsandbytes.functional")

    def encode(x: torch.Tensor) -> Arrays:
        if bits == 4:
            codes, state = functional.quantize_4bit(x, blocksize=block, quant_type="nf4")
        else:
            codes, state = functional.quantize_blockwise(x, blocksize=block)
        return codes, Scales(state)

    def decode(arrays: Arrays) -> torch.Tensor:
        codes, scales = arrays
        dequantize = functional.dequantize_4bit if bits == 4 else functional.dequantize_blockwise
        decoded: torch.Tensor = dequantize(codes, scales.state).view(-1)
        return decoded

    yield Peer("bitsandbytes", encode, adding(decode), decode, same_code=False)


def sign(size: int, device: str) -> Iterator[Peer]:
    """Yield packbits and the mean magnitude; torch, which has no packbits, multiplies by powers of two."""

    def encode(x: Array) -> Arrays:
        return np.packbits(x < 0), np.abs(x).mean(keepdims=True)

    def decode(arrays: Arrays) -> Array:
        packed, scale = arrays
        decoded: Array = np.where(np.unpackbits(packed, count=size), -scale, scale)
        return decoded

    yield Peer("numpy", encode, adding(decode), decode)

    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)

    def torch_encode(x: torch.Tensor) -> Arrays:
        return ((x < 0).view(-1, 8) * powers).sum(dim=1, dtype=torch.uint8), x.abs().mean()

    def torch_decode(arrays: Arrays) -> torch.Tensor:
        packed, scale = arrays
        return torch.where((packed[:, None] & powers).view(-1) != 0, -scale, scale)

    yield Peer("torch", torch_encode, adding(torch_decode), torch_decode)


def cast(dtype: str) -> Iterator[Peer]:
    """Yield astype (of ml_dtypes for bfloat16) and Tensor.to."""
    narrow = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]

    def encode(x: Array) -> Arrays:
        return (x.astype(narrow),)

    def decode(arrays: Arrays) -> Array:
        wide: Array = arrays[0].astype(np.float32)
        return wide

    yield Peer("numpy", encode, adding(decode), decode)

    torch_narrow = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]

    def torch_encode(x: torch.Tensor) -> Arrays:
        return (x.to(torch_narrow),)

    def torch_decode_add(arrays: Arrays, out: torch.Tensor) -> None:
        out += arrays[0]  # ATen widens as it goes

    yield Peer("torch", torch_encode, torch_decode_add, lambda arrays: arrays[0].float())
