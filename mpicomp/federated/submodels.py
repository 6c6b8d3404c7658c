"""Sub-models: a network with fewer units per hidden layer, whose weights are smaller dense arrays.

Federated Dropout (Caldas et al. 2018): of every hidden layer a fixed number of units is kept, drawn at random: the
activations of a linear layer, the filters of a convolution. The rows of the dropped units and the columns that read
them are deleted. Inputs and logits stay whole. Activations are not scaled by 1 / p.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.base import Key, stream_of
from mpicomp.codecs.checks import is_number, kept
from mpicomp.federated.links import Shapes, Weights
from mpicomp.kernels import kernels_for

KINDS = ("linear", "conv", "norm", "flatten")
Keep = float | Mapping[str, float]


@dataclass(frozen=True)
class Layer:
    """One layer of a network: its kind, and its name, which its arrays have in front: `name.weight`, `name.bias`."""

    kind: str
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")


def linear(name: str) -> Layer:
    """Return a fully connected layer: weight (units, inputs), bias (units,)."""
    return Layer("linear", name)


def conv(name: str) -> Layer:
    """Return a convolution without groups: weight (filters, channels, ...), bias (filters,)."""
    return Layer("conv", name)


def norm(name: str) -> Layer:
    """Return a normalisation: vectors with an element per unit or channel of the layer before."""
    return Layer("norm", name)


def flatten() -> Layer:
    """Return the step from channels to inputs of a linear layer: a channel becomes its h * w neighbours."""
    return Layer("flatten")


SKIPPED = ("ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Tanh", "Sigmoid", "Identity", "Softmax", "LogSoftmax")
SKIPPED_BEGIN = ("Dropout", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")


def layers_of(module: Any, prefix: str = "") -> list[Layer]:
    """Return the layers of a `torch.nn.Sequential`, nested ones included; ValueError for a module of another kind.

    Modules are told by the names of their classes: torch is not imported.
    """
    if not _is_sequential(module):
        what = f"module {prefix[:-1]}" if prefix else "the module"
        raise ValueError(
            f"{what} is a {type(module).__name__}, and what it does with its parts cannot be told: only a "
            f"torch.nn.Sequential calls them in order; give the list of layers by hand"
        )
    found: list[Layer] = []
    for name, child in module.named_children():
        kind, path = type(child).__name__, f"{prefix}{name}"
        if _is_sequential(child):
            found += layers_of(child, f"{path}.")
        elif kind == "Linear":
            found.append(linear(path))
        elif kind in ("Conv1d", "Conv2d", "Conv3d") and child.groups == 1:
            found.append(conv(path))
        elif kind in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
            found.append(norm(path))
        elif kind == "Flatten":
            found.append(flatten())
        elif kind not in SKIPPED and not kind.startswith(SKIPPED_BEGIN):
            raise ValueError(f"module {path} is a {kind}, whose units cannot be told; give the list of layers by hand")
    return found


def _is_sequential(module: Any) -> bool:
    """Tell whether a module is a `torch.nn.Sequential`, or a class of its kind that calls its parts in the same way."""
    bases = [each for each in type(module).__mro__ if each.__name__ == "Sequential"]
    return bool(bases) and type(module).forward is bases[-1].forward  # type: ignore[attr-defined]


class _Axis(NamedTuple):
    """The axis of an array that follows the units of a layer: each unit has `repeat` neighbouring places."""

    layer: str
    repeat: int


class Network:
    """A chain of layers and the shapes of their arrays: which axis of which array follows which layer's units.

    The last linear layer or convolution gives the logits. Raises ValueError where layers and shapes do not fit.
    """

    def __init__(self, layers: Iterable[Layer], weights: Mapping[str, Any]) -> None:
        """Take the layers in order, and the arrays or their shapes by name."""
        self.layers = tuple(layers)
        if others := [each for each in self.layers if not isinstance(each, Layer)]:
            raise TypeError(f"layers are made by linear, conv, norm and flatten, got {others[0]!r}")
        self.shapes: dict[str, tuple[int, ...]] = {name: _shape(name, each) for name, each in weights.items()}
        self.widths: dict[str, int] = {}
        """Units of each hidden layer."""
        self._axes: dict[str, list[_Axis | None]] = {}
        before: str | None = None
        flat, widths = False, dict[str, int]()
        for layer in self.layers:
            if layer.kind == "flatten":
                flat = True
            elif layer.kind == "norm":
                self._norm(layer, before, widths)
            else:
                axis = self._inputs(layer, before, widths, flat)
                widths[layer.name] = self.shapes[f"{layer.name}.weight"][0]
                self._own(layer, widths[layer.name], axis)
                before, flat = layer.name, False
        if before is None:
            raise ValueError("a network needs a linear layer or a convolution")
        self.widths = {name: width for name, width in widths.items() if name != before}
        if unknown := self.shapes.keys() - self._axes.keys():
            raise ValueError(f"no layer has the arrays {', '.join(sorted(map(str, unknown)))}")
        for axes in self._axes.values():  # logits are never dropped
            axes[:] = [None if axis and axis.layer == before else axis for axis in axes]

    def _own(self, layer: Layer, width: int, inputs: _Axis | None) -> None:
        """Note the axes of a layer's arrays."""
        name, units = layer.name, _Axis(layer.name, 1)
        if f"{name}.weight" in self._axes:
            raise ValueError(f"layer {name!r} is given twice")
        rest = len(self.shapes[f"{name}.weight"]) - 2
        self._axes[f"{name}.weight"] = [units, inputs, *[None] * rest]
        if f"{name}.bias" in self.shapes:
            self._expect(f"{name}.bias", (width,))
            self._axes[f"{name}.bias"] = [units]

    def _inputs(self, layer: Layer, before: str | None, widths: dict[str, int], flat: bool) -> _Axis | None:
        """Return the input axis of a layer's weight."""
        shape = self.shapes.get(f"{layer.name}.weight")
        if shape is None:
            raise ValueError(f"there is no array {layer.name}.weight for the {layer.kind} layer {layer.name!r}")
        if len(shape) < 2 or (layer.kind == "linear") != (len(shape) == 2):
            raise ValueError(f"{layer.name}.weight of a {layer.kind} layer has shape {shape}")
        if before is None:
            return None
        repeat, left = divmod(shape[1], widths[before])
        if left or repeat < 1 or (repeat > 1 and not flat):
            hint = "" if flat else "; where channels are flattened there is a flatten() between"
            raise ValueError(
                f"{layer.name}.weight has {shape[1]} inputs, but layer {before!r} before has {widths[before]} "
                f"units{hint}"
            )
        return _Axis(before, repeat)

    def _norm(self, layer: Layer, before: str | None, widths: dict[str, int]) -> None:
        if before is None:
            raise ValueError(f"the norm {layer.name!r} comes before any layer with units")
        for name in self.shapes:
            if name.startswith(f"{layer.name}."):
                if not self.shapes[name]:
                    raise ValueError(f"{name} is a number, which is no weight: leave it out, as num_batches_tracked")
                self._expect(name, (widths[before],))
                self._axes[name] = [_Axis(before, 1)]

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shapes[name] != shape:
            raise ValueError(f"{name} has shape {self.shapes[name]}, expected {shape}")

    def counts(self, keep: Keep) -> dict[str, int]:
        """Return how many units of each hidden layer are kept: ceil(keep * units), all where a mapping has no number.

        ValueError for a number outside (0, 1], or a name that is no hidden layer's.
        """
        shares = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(self.widths, keep)
        if others := shares.keys() - self.widths.keys():
            raise ValueError(
                f"keep names {', '.join(map(repr, sorted(others)))}; units are dropped in hidden layers only: "
                f"{', '.join(self.widths) or 'there are none'}"
            )
        values = shares.values() if isinstance(keep, Mapping) else [keep]
        for share in values:
            if not is_number(share) or not 0 < share <= 1:
                raise ValueError(f"keep must be in (0, 1], got {share!r}")
        return {name: kept(shares.get(name, 1.0), width) for name, width in self.widths.items()}

    def choose(self, keep: Keep, key: Key) -> Choice:
        """Draw the units that a sub-model keeps, uniformly and the same anywhere; the key identifies them."""
        base = {name: key._replace(stream=stream_of(f"units of {name}")).base() for name in self.widths}
        draw = kernels_for(np.empty(0)).random_support
        units = {name: draw(self.widths[name], k, base[name], 0) for name, k in self.counts(keep).items()}
        return Choice(self, units)


class Choice:
    """The units that a sub-model keeps: `units` has the ascending numbers of each hidden layer's, (kept,) integers.

    ValueError for units that the network does not have.
    """

    def __init__(self, network: Network, units: Mapping[str, Array]) -> None:
        _check_units(units, network.widths)
        self.network, self.units = network, dict(units)
        self._places: dict[str, tuple[Any, ...]] = {}
        self.shapes: Shapes = {}
        """The shapes of the sub-model's arrays."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, full in network.shapes.items():
            places = [
                np.arange(length) if axis is None else _spread(self.units[axis.layer], axis.repeat)
                for axis, length in zip(network._axes[name], full, strict=True)
            ]
            whole = all(len(place) == length for place, length in zip(places, full, strict=True))
            self._places[name] = (...,) if whole else np.ix_(*places)
            shapes[name] = tuple(map(len, places))
        self.shapes = shapes

    def extract(self, weights: Mapping[str, Array]) -> Weights:
        """Return the sub-model's arrays, new and contiguous; ValueError for weights of another network."""
        check_shapes(weights, self.network.shapes, "the network")
        return {name: np.array(weights[name][place], order="C") for name, place in self._places.items()}

    def scatter(self, update: Mapping[str, Array]) -> Weights:
        """Return arrays of the whole network with zeros outside the sub-model; ValueError for what does not fit."""
        full = {
            name: np.zeros(shape, update[name].dtype) for name, shape in self.network.shapes.items() if name in update
        }
        self.add(update, 1, full)
        return full

    def add(self, update: Mapping[str, Array], factor: float, totals: Mapping[str, Array]) -> None:
        """Add factor * update to arrays of the whole network, in place; ValueError for what does not fit."""
        check_shapes(update, self.shapes, "the sub-model")
        for name, place in self._places.items():
            total = totals[name]
            total[place] += total.dtype.type(factor) * update[name].astype(total.dtype, copy=False)

    def cover(self, factor: float, totals: Mapping[str, Array]) -> None:
        """Add `factor` to the elements that the sub-model has, in place."""
        for name, place in self._places.items():
            totals[name][place] += factor


def _check_units(units: Mapping[str, Array], widths: Mapping[str, int]) -> None:
    """Raise ValueError unless these are ascending numbers of units of every hidden layer."""
    if units.keys() != widths.keys():
        raise ValueError(f"units must be those of {', '.join(widths) or 'no layer'}, got {', '.join(map(str, units))}")
    for name, width in widths.items():
        each = np.asarray(units[name])
        numbers = each.astype(np.int64) if each.dtype.kind in "iu" else None
        if numbers is None or each.ndim != 1 or not each.size or (np.diff(numbers, prepend=-1, append=width) < 1).any():
            raise ValueError(f"units of {name!r} must be ascending numbers in 0..{width - 1}, got {units[name]!r}")


@runtime_checkable
class Shaped(Protocol):
    """An array of NumPy, torch or any other library."""

    @property
    def shape(self) -> Sequence[int]:
        """Its length along each axis."""


def _shape(name: str, given: Any) -> tuple[int, ...]:
    """Return the shape of an array, or a shape as it is; ValueError for one without elements."""
    if not isinstance(given, (tuple, Shaped)):
        raise TypeError(f"weights must be arrays, or tuples for their shapes, got {type(given).__name__} for {name}")
    shape = given if isinstance(given, tuple) else tuple(given.shape)
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}: no array of a network is empty")
    return shape


def _spread(units: Array, repeat: int) -> Array:
    """Return the places of units that have `repeat` neighbouring places each."""
    wide = units.astype(np.int64)
    return wide if repeat == 1 else (wide[:, None] * repeat + np.arange(repeat)).reshape(-1)


def check_shapes(arrays: Mapping[str, Any], shapes: Shapes, what: str) -> None:
    """Raise ValueError unless arrays have exactly these names and shapes."""
    if missing := shapes.keys() - arrays.keys():
        raise ValueError(f"{', '.join(sorted(map(str, missing)))} of {what} is missing")
    if more := arrays.keys() - shapes.keys():
        raise ValueError(f"{what} has no {', '.join(sorted(map(str, more)))}")
    for name, shape in shapes.items():
        if tuple(arrays[name].shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(arrays[name].shape)}, and that of {what} is {tuple(shape)}")
