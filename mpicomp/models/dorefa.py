"""Layers of few bits, in weights, activations and the gradients of outputs (DoReFa-Net, Zhou and others 2016).

    model = dorefa_layers(model, bits=(1, 2, 6), seed=seed)     # all Linear and Conv2d but the first and the last
    ddp = DistributedDataParallel(model)

`bits` are those of weights, activations and gradients, 1 to 8 each, or 32 for a quantity that stays as it is. A layer
quantises its input, its weight, and in the backward pass the gradient of its output; the weight that the optimizer
moves stays in full precision.

This happens inside a rank. The gradients that ranks exchange are those of the weights: the codec `dorefa` applies the
same quantiser to them, `mpicomp.torch.compress(ddp, "gather(dorefa(bits=2))")`.

**Noise.** Rounding of gradients is random, and every rank must draw other numbers, or their errors do not average out.
The numbers of a backward pass come from (seed, number of the pass, name of the layer, rank), so a run repeats; the
number of the pass is part of `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpicomp.codecs.base import Key, stream_of
from mpicomp.codecs.checks import check_integer
from mpicomp.models.binary import straight_through
from mpicomp.models.modules import replace

Bits = tuple[int, int, int]
FULL = 32  # bits of what is not quantised
WORD = (1 << 63) - 1  # seeds of torch's generators are below 2^64; half of them are enough


def quantize(x: Tensor, bits: int) -> Tensor:
    """Return round((2^bits - 1) x) / (2^bits - 1) for x in [0, 1] (eq. 5); the gradient passes as it is."""
    levels = (1 << bits) - 1
    return straight_through(x, torch.round(x.detach() * levels) / levels)


def quantize_weight(weight: Tensor, bits: int) -> Tensor:
    """Return a layer's weight in 2^bits values (eq. 8 and 9); 32 bits: as it is.

    One bit: the sign, of zero +1, times the mean magnitude of the whole layer; the gradient passes as it is. More: 2
    quantize(tanh(w) / (2 max |tanh(w)|) + 1/2) - 1, in [-1, 1], whose gradient is that of tanh over the largest one.
    """
    if bits == FULL:
        return weight
    if bits == 1:
        scale = weight.detach().abs().mean()
        return straight_through(weight, torch.where(weight.detach() < 0, -scale, scale))
    bounded = torch.tanh(weight)
    largest = bounded.detach().abs().amax().clamp_min(torch.finfo(weight.dtype).tiny)
    return 2 * quantize(bounded / (2 * largest) + 0.5, bits) - 1


def quantize_activation(x: Tensor, bits: int) -> Tensor:
    """Return quantize(clip(x, 0, 1)) (eq. 11), whose gradient is zero outside [0, 1]; 32 bits: x as it is."""
    return x if bits == FULL else quantize(x.clamp(0, 1), bits)


def quantize_gradient(gradient: Tensor, bits: int, noise: Tensor, batched: bool = True) -> Tensor:
    """Return gradients in 2^bits values from -m to m, m the largest magnitude of a sample (eq. 12).

        2 m (quantize(g / 2m + 1/2 + noise / (2^bits - 1)) - 1/2)

    `noise`, of the shape of `gradient`, is uniform in [-1/2, 1/2): as wide as a cell, so that the mean is exactly g
    over the whole range, and no error reaches a step, 2 m / (2^bits - 1). It is added before the clip to [0, 1], which
    only guards against rounding. A sample is what lies at one place of the first axis, or all where not `batched`. A
    sample of zeros stays zeros; no other value is zero. NaN or infinity makes NaN of its sample.
    """
    if not gradient.numel():
        return gradient
    levels, wide = (1 << bits) - 1, gradient.float() if gradient.element_size() < 4 else gradient
    axes = tuple(range(1 if batched else 0, wide.ndim))
    largest = wide.abs().amax(axes, keepdim=True) if axes else wide.abs()
    inside = wide / torch.where(largest > 0, largest, 1) / 2 + 0.5  # in [0, 1]; 2m might overflow
    codes = torch.round((inside + noise / levels).clamp(0, 1) * levels)
    return ((2 * codes / levels - 1) * largest).to(gradient.dtype)


class Noise:
    """The random numbers of one layer on one rank."""

    def __init__(self, seed: int = 0, rank: int | None = None, name: str = "") -> None:
        """Take the rank of torch.distributed where none is given, 0 without a process group."""
        self.seed, self.name = seed, name
        self.rank = rank if rank is not None else dist.get_rank() if dist.is_initialized() else 0
        self.passes = 0
        """Backward passes so far."""

    def draw(self, like: Tensor) -> Tensor:
        """Return the numbers of the next pass, uniform in [-1/2, 1/2), of the shape of a tensor and on its device."""
        base = Key(self.seed, self.passes, stream_of(self.name), 0, self.rank).base()
        generator = torch.Generator(like.device).manual_seed(base & WORD)
        self.passes += 1
        dtype = torch.float32 if like.element_size() < 4 else like.dtype
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=dtype) - 0.5


class _QuantizedGradient(torch.autograd.Function):
    """x as it is, with a quantised gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, noise: Noise, batched: bool) -> Tensor:
        ctx.settings = bits, noise, batched
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        bits, noise, batched = ctx.settings
        return quantize_gradient(gradients[0], bits, noise.draw(gradients[0]), batched), None, None, None


class _Quantized(nn.Module):
    """What the layers share."""

    bits: Bits
    noise: Noise

    def settle(self, bits: Bits, noise: Noise | None) -> None:
        """Check and keep the settings."""
        self.bits, self.noise = check_bits(bits), noise or Noise()

    def through(
        self, compute: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, batched: bool = True
    ) -> Tensor:
        """Compute with quantised input and weight; the gradient of the result is quantised on its way back."""
        weights, activations, gradients = self.bits
        y = compute(quantize_activation(x, activations), quantize_weight(weight, weights))
        if gradients == FULL or not y.requires_grad:
            return y
        made: Tensor = _QuantizedGradient.apply(y, gradients, self.noise, batched)  # type: ignore[no-untyped-call]
        return made

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, seed={self.noise.seed}, rank={self.noise.rank}"

    def get_extra_state(self) -> Tensor:
        """Return the number of backward passes, (), int64: with it a restart draws what the run would have drawn."""
        return torch.tensor(self.noise.passes)

    def set_extra_state(self, state: Tensor) -> None:
        self.noise.passes = int(state)


class DoReFaLinear(_Quantized, nn.Linear):
    """`nn.Linear` with quantised weight, input and output gradient; see the module docstring."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, bits: Bits, noise: Noise | None = None
    ) -> None:
        """Take the settings of `nn.Linear`, and bits of weights, activations and gradients; ValueError for others."""
        super().__init__(in_features, out_features, bias)
        self.settle(bits, noise)

    def forward(self, input: Tensor) -> Tensor:
        """Map (samples, ..., in_features) to (samples, ..., out_features)."""
        return self.through(
            lambda x, weight: nn.functional.linear(x, weight, self.bias), input, self.weight, input.ndim > 1
        )


class DoReFaConv2d(_Quantized, nn.Conv2d):
    """`nn.Conv2d` with quantised weight, input and output gradient; see the module docstring."""

    def __init__(self, *args: Any, bits: Bits, noise: Noise | None = None, **settings: Any) -> None:
        """Take the settings of `nn.Conv2d`, and bits of weights, activations and gradients; ValueError for others."""
        super().__init__(*args, **settings)
        self.settle(bits, noise)

    def forward(self, input: Tensor) -> Tensor:
        """Map (samples, channels, height, width), or an image of its own, as `nn.Conv2d` does."""
        return self.through(
            lambda x, weight: self._conv_forward(x, weight, self.bias), input, self.weight, input.ndim > 3
        )


KINDS: dict[type[nn.Module], type[_Quantized]] = {nn.Linear: DoReFaLinear, nn.Conv2d: DoReFaConv2d}


def check_bits(bits: Bits) -> Bits:
    """Return the bits of weights, activations and gradients; ValueError unless each is 1 to 8, or 32."""
    if not isinstance(bits, tuple) or len(bits) != 3:
        raise ValueError(f"bits must be those of weights, activations and gradients, as in (1, 2, 6), got {bits!r}")
    for name, each in zip(("weights", "activations", "gradients"), bits, strict=True):
        if each != FULL:
            check_integer(f"bits of {name} (or 32)", each, 1, 8)
    return bits


def dorefa_layers(
    model: nn.Module, bits: Bits = (1, 2, 6), *, seed: int = 0, rank: int | None = None, ends: bool = False
) -> nn.Module:
    """Make DoReFa layers of a model's `nn.Linear` and `nn.Conv2d`, in place, and return it.

    The first and the last of them, in the order of `named_modules`, stay in full precision, as in the paper, unless
    `ends`. Parameters stay the same objects. `seed` must be the same on all ranks; `rank` is that of torch.distributed,
    if it is None. ValueError for bits that cannot be used, and where no layer would be quantised.
    """
    check_bits(bits)
    found = [(name, layer) for name, layer in model.named_modules() if type(layer) in KINDS and name]
    inner = found if ends else found[1:-1]
    if not inner:
        raise ValueError(
            f"no layer to quantise: the model has {len(found)} layers of nn.Linear and nn.Conv2d inside it, of which "
            f"the first and the last stay in full precision unless ends=True"
        )
    quantized: dict[nn.Module, nn.Module] = {}
    for name, layer in inner:
        kind = KINDS[type(layer)]
        made = quantized[layer] = kind.__new__(kind)
        vars(made).update(vars(layer))  # the parameters, the settings, the mode and the hooks
        made.settle(bits, Noise(seed, rank, name))
    for parent in model.modules():  # torch evaluates these by a kernel that takes weights past their layers
        if isinstance(parent, nn.TransformerEncoderLayer) and not quantized.keys().isdisjoint(parent.modules()):
            parent.activation_relu_or_gelu = 0
        elif isinstance(parent, nn.TransformerEncoder) and not quantized.keys().isdisjoint(parent.modules()):
            parent.use_nested_tensor = False
    replace(model, quantized)
    return model
