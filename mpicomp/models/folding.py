"""From a trained binary model to its packed network: what follows a product up to the next signs becomes thresholds.

Every unit sees its sum, an integer, through functions that rise or fall: a bias, a BatchNorm. So there is one sum where
its sign changes. A bisection over all sums finds it with the model's own layers: nothing is rounded in another way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpicomp.arrays import Array
from mpicomp.models.binary import BinaryActivation, BinaryConv2d, BinaryLayer, BinaryLinear, FixedPoint
from mpicomp.models.modules import inner_of
from mpicomp.models.packed import PackedLayer, PackedNetwork, Window, check_chain, edged, pack

IDLE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)
MAX_SUM = 1 << 24  # up to here a float32 holds every sum


@torch.no_grad()
def fold(model: nn.Module) -> PackedNetwork:
    """Return the packed network of a model of binary layers, as `model.eval().float()` computes.

    `model` is nested `nn.Sequential`s of: `FixedPoint` or `BinaryActivation`; any number of `BinaryLinear` or
    `BinaryConv2d`, each followed by BatchNorm (behind a convolution MaxPool2d may stand first) and `BinaryActivation`;
    at last a `BinaryLinear`, with or without a BatchNorm. Hidden signs are those of the model, bit by bit; the results
    of the last layer differ by the rounding of one product and one sum. Dropout is left out. The model stays as it is.

    ValueError for another model, and for parameters that are NaN or infinite.
    """
    inner = copy.deepcopy(inner_of(model)).eval().cpu().float()
    for name, tensor in (*inner.named_parameters(), *inner.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinity: such a model has no thresholds")
    modules = [each for each in _leaves(inner) if not _idle(each)]
    first = modules.pop(0) if modules else None
    if not isinstance(first, FixedPoint | BinaryActivation):
        raise ValueError(f"the model must begin with FixedPoint(...) or BinaryActivation(), got {first}")
    bits = first.bits if isinstance(first, FixedPoint) else 0
    layers: list[PackedLayer] = []
    while modules:
        layer = modules.pop(0)
        if not isinstance(layer, BinaryLayer):
            raise ValueError(f"{layer} cannot follow signs: expected BinaryLinear or BinaryConv2d")
        window = _window(layer, 0.0 if bits and not layers else 1.0)
        if window and modules and isinstance(modules[0], nn.MaxPool2d):
            window = window._replace(pool=_pool(modules.pop(0)))
        after: list[nn.Module] = []
        while modules and isinstance(modules[0], _BatchNorm):
            after.append(modules.pop(0))
            if after[-1].running_mean is None:
                raise ValueError(f"{after[-1]} keeps no running statistics, which thresholds are made of")
        chain = _chain(layer, after)
        signs = pack(layer.weight.detach().reshape(len(layer.weight), -1).numpy() < 0)
        size = layer.weight[0].numel()
        most = size * (max(1, (1 << bits) - 1) if not layers else 1)
        if most >= MAX_SUM:
            raise ValueError(f"sums of {layer} reach {most}, and float32 holds integers below {MAX_SUM} exactly")
        if modules and isinstance(modules[0], BinaryActivation):
            modules.pop(0)
            limits, flips = thresholds(chain, len(signs), most)
            layers.append(PackedLayer(signs, size, limits, flips, window=window))
        elif not modules and window is None:
            factors, offsets = _line(layer, after)
            layers.append(PackedLayer(signs, size, factors=factors, offsets=offsets))
        else:
            raise ValueError(
                f"{layer} must be followed by BatchNorm and BinaryActivation, or be linear and the last one"
            )
    if not layers or layers[-1].limits is not None:
        raise ValueError("the model must end with a BinaryLinear layer, without a BinaryActivation behind it")
    check_chain(layers, ValueError)
    if isinstance(first, FixedPoint):
        return PackedNetwork(tuple(layers), bits, first.low, first.high)
    return PackedNetwork(tuple(layers))


def thresholds(chain: Callable[[Tensor], Tensor], units: int, most: int) -> tuple[Array, Array]:
    """Return limits, (units,) int32, and flips, (units,) uint8, of functions of sums in -most..most.

    `chain` maps sums, (1, units) float32, to values of their shape, unit by unit, each rising or falling. Unit j is
    negative where (sum < limits[j]) ^ flips[j].
    """

    def negative(sums: Array) -> Array:
        found: Array = (chain(torch.from_numpy(sums.astype(np.float32))[None])[0] < 0).numpy()
        return found

    low = np.full(units, -most - 1, np.int64)  # behaves as the smallest sum
    high = np.full(units, most, np.int64)
    at_low, at_high = negative(np.full(units, -most)), negative(high)
    while (high - low > 1).any():
        middle = (low + high) // 2
        same = negative(middle) == at_high
        low, high = np.where(same, low, middle), np.where(same, middle, high)
    limits = np.where(at_low == at_high, -most, high)  # from here on every sum behaves as the largest
    return limits.astype(np.int32), at_high.astype(np.uint8)


def _leaves(module: nn.Module) -> list[nn.Module]:
    """Return the modules of nested `nn.Sequential`s, in order; one with a `forward` of its own is no such."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return [leaf for child in module for leaf in _leaves(child)]
    return [module]


def _idle(module: nn.Module) -> bool:
    """Whether a packed network, which flattens what a matrix is given, has nothing to do for a module."""
    whole = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    return whole or isinstance(module, IDLE)


def _window(layer: BinaryLayer, border: float) -> Window | None:
    if isinstance(layer, BinaryLinear):
        return None
    if layer.border != border and any(int(each) for each in layer.padding):
        raise ValueError(f"{layer} has a border of {layer.border}; only {border} can be packed here")
    kernel, stride, padding = (
        (int(pair[0]), int(pair[1])) for pair in (layer.kernel_size, layer.stride, layer.padding)
    )
    if not edged(kernel, padding):
        raise ValueError(f"{layer}: only padding below the size of the kernel can be packed")
    return Window(layer.in_channels, kernel, stride, padding)


def _pool(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.MaxPool2d)
    size = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,) * 2
    stride = module.stride if isinstance(module.stride, tuple) else (module.stride,) * 2
    if size != stride or module.padding not in (0, (0, 0)) or module.dilation not in (1, (1, 1)) or module.ceil_mode:
        raise ValueError(f"{module}: only squares side by side can be packed, without padding")
    return size[0], size[1]


def _chain(layer: BinaryLayer, after: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """Return what becomes of sums, (1, units): the bias is added, then the modules follow."""
    shape = (1, -1, 1, 1) if isinstance(layer, BinaryConv2d) else (1, -1)

    def run(sums: Tensor) -> Tensor:
        values = sums.view(shape) if layer.bias is None else sums.view(shape) + layer.bias.view(shape)
        for module in after:
            values = module(values)
        return values.view(1, -1)

    return run


def _line(layer: BinaryLayer, after: list[nn.Module]) -> tuple[Array, Array]:
    """Return factors and offsets of the last layer, (units,) float32, computed in float64."""
    chain = _chain(copy.deepcopy(layer).double(), [copy.deepcopy(module).double() for module in after])
    zero = chain(torch.zeros(1, len(layer.weight), dtype=torch.float64))[0]
    one = chain(torch.ones(1, len(layer.weight), dtype=torch.float64))[0]
    return (one - zero).numpy().astype(np.float32), zero.numpy().astype(np.float32)
