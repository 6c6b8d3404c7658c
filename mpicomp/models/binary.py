"""Networks of +1 and -1 (Hubara et al. 2016): layers that train real weights for the sake of their signs.

A layer keeps *latent* weights in [-1, 1] and computes with their signs; sign(0) is +1, here and wherever signs are
packed, and NaN counts as +1 too. The gradient is taken at the signs and moves the latent weights, which ranks average
as any other gradient; averages of signs mean nothing.

    model = nn.Sequential(FixedPoint(), BinaryLinear(784, 1024), nn.BatchNorm1d(1024), BinaryActivation(), ...)
    optimizer = torch.optim.Adam(binary_groups(model, lr=3e-3))
    clip_after_step(optimizer, model)
    ...
    network = mpicomp.models.fold(model)                                    # one bit per weight

BatchNorm statistics stay each rank's own, as DDP leaves them: `nn.SyncBatchNorm`, or a broadcast of the buffers before
an evaluation, makes them one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpicomp.codecs.checks import check_integer
from mpicomp.models.packed import ranged

Pair = int | tuple[int, int]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() <= 1), None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value`, of the shape of x; its gradient goes to x as it is, as if the two were equal (Bengio 2013)."""
    result: Tensor = _StraightThrough.apply(x, value)  # type: ignore[no-untyped-call]
    return result


def signs(x: Tensor) -> Tensor:
    """Return -1 where x < 0, else +1, in the dtype of x; without a gradient."""
    return (x.detach() < 0).to(x.dtype).mul_(-2).add_(1)


class BinaryActivation(nn.Module):
    """The sign of every element; the gradient passes where |x| <= 1 (the derivative of hard tanh).

    `stochastic`: in training +1 with the probability clip((x + 1) / 2, 0, 1) instead.
    """

    def __init__(self, stochastic: bool = False) -> None:
        super().__init__()
        self.stochastic = stochastic

    def forward(self, x: Tensor) -> Tensor:
        """Return signs of the shape and dtype of x."""
        random = self.stochastic and self.training
        value = signs((x.detach() + 1) / 2 - torch.rand_like(x)) if random else signs(x)
        result: Tensor = _Sign.apply(x, value)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"stochastic={self.stochastic}"


class FixedPoint(nn.Module):
    """Inputs as integers: `low` becomes 0 and `high` 2^bits - 1, everything beyond becomes the nearest of them.

    The first layer then sums integers, exactly as the packed network does, bit plane by bit plane; a BatchNorm behind
    it undoes scale and offset. The gradient is that of the scaling.
    """

    def __init__(self, bits: int = 8, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        check_integer("bits", bits, 1, 8)
        if not ranged(low, high):
            raise ValueError(f"low must be below high, both and 255 / (high - low) in float32, got {low} and {high}")
        self.bits, self.low, self.high = bits, float(low), float(high)

    def forward(self, x: Tensor) -> Tensor:
        """Return integers in the shape and dtype of x."""
        top = (1 << self.bits) - 1
        scaled = ((x - self.low) * (top / (self.high - self.low))).clamp(0, top)
        return straight_through(scaled, scaled.detach().round())

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"bits={self.bits}, low={self.low}, high={self.high}"


class BinaryLinear(nn.Linear):
    """A linear layer of the signs of its latent weights, (out_features, in_features), drawn from [-1, 1]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Draw the latent weights evenly from [-1, 1]; a bias begins at 0."""
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., in_features) times the signs, (..., out_features)."""
        return functional.linear(x, straight_through(self.weight, signs(self.weight)), self.bias)


class BinaryConv2d(nn.Conv2d):
    """A convolution of the signs of its latent weights, (out, in, height, width), drawn from [-1, 1].

    What lies beyond the edge is `border`: +1, which has a sign as everything inside; 0 behind `FixedPoint`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        bias: bool = False,
        border: float = 1.0,
    ) -> None:
        if isinstance(padding, str):
            raise ValueError(f"padding must be a number or one for each axis, got {padding!r}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.border = border

    def reset_parameters(self) -> None:
        """Draw the latent weights evenly from [-1, 1]; a bias begins at 0."""
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (batch, in, height, width) convolved with the signs, (batch, out, height, width)."""
        high, wide = (int(each) for each in self.padding)
        x = functional.pad(x, (wide, wide, high, high), value=self.border)
        return functional.conv2d(x, straight_through(self.weight, signs(self.weight)), self.bias, self.stride)


BinaryLayer = BinaryLinear | BinaryConv2d


def _draw(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.uniform_(layer.weight, -1, 1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def binary_layers(model: nn.Module) -> Iterator[BinaryLayer]:
    """Yield the binary layers of a model, whose `weight` is latent."""
    for module in model.modules():
        if isinstance(module, BinaryLayer):
            yield module


def glorot_factor(layer: BinaryLayer) -> float:
    """Return sqrt((fan in + fan out) / 1.5), by which the published code multiplies a layer's learning rate."""
    field = math.prod(layer.weight.shape[2:])
    return math.sqrt(field * (layer.weight.shape[0] + layer.weight.shape[1]) / 1.5)


def binary_groups(model: nn.Module, lr: float, weight_decay: float = 0.0, glorot: bool = True) -> list[dict[str, Any]]:
    """Return groups of parameters for an optimizer: latent weights without decay, everything else with it.

    Decay pulls latent weights to 0, where their signs flip. With `glorot` the rate of a layer is `lr` times its
    `glorot_factor`. Every group has its own `lr`, which schedulers multiply.
    """
    latent = list({layer.weight: layer for layer in binary_layers(model)}.values())  # layers may share a weight
    known = {id(layer.weight) for layer in latent}
    groups = [
        {"params": [layer.weight], "lr": lr * (glorot_factor(layer) if glorot else 1.0), "weight_decay": 0.0}
        for layer in latent
    ]
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [*groups, {"params": rest, "lr": lr, "weight_decay": weight_decay}] if rest else groups


@torch.no_grad()
def clip_latents(model: nn.Module) -> None:
    """Clip all latent weights to [-1, 1] in place: beyond, a gradient would have to undo what does not count."""
    for layer in binary_layers(model):
        layer.weight.clamp_(-1, 1)


def clip_after_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
    """Clip the latent weights of a model after every step of its optimizer; return a handle with `remove`.

    ValueError where the optimizer decays latent weights.
    """
    latent = {id(layer.weight) for layer in binary_layers(model)}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and any(id(parameter) in latent for parameter in group["params"]):
            raise ValueError(
                f"weight decay of {group['weight_decay']} pulls latent weights to 0, where their signs flip; take the "
                "groups that binary_groups(model, lr, weight_decay) makes"
            )
    return optimizer.register_step_post_hook(lambda *_: clip_latents(model))
