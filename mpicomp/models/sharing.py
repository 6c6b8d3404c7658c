"""Weight sharing: each tensor's weights take the values of a small codebook of its own, which is fine-tuned.

Lloyd's iteration runs on sorted weights: a cluster is then a range, whose sum is a difference of prefix sums, so an
iteration costs K binary searches, whatever the number of weights; sorting them once is what takes time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.arrays import Array
from mpicomp.models.modules import check_gradients, parameters_of

MAX_BITS = 12
ITERATIONS = 1000  # at most; a few dozen are usual


class Shared(NamedTuple):
    """The shared weights of one tensor."""

    values: Tensor
    """(1 + K,): zero, for pruned weights, then the centroids; in the dtype and on the device of the weights."""
    codes: Tensor
    """Which value each weight has: int64, in the shape of the weights; 0 stays pruned."""

    @property
    def weights(self) -> Tensor:
        """The weights."""
        return self.values[self.codes]


class Codebooks(Mapping[str, Shared]):
    """The codebooks of a model by parameter name, and which centroid each weight shares: values only."""

    def __init__(self, shared: Mapping[str, Shared]) -> None:
        self._shared = {name: shared[name] for name in sorted(shared)}

    @classmethod
    def fit(cls, model: nn.Module, bits: int | Mapping[str, int] = 5, optimal: bool = False) -> Codebooks:
        """Cluster the surviving weights of each tensor into at most 2^bits centroids; the model stays as it is.

        Weights that are zero stay zero and need no centroid. A number counts for every floating-point parameter of at
        least two dimensions, tensor by tensor and never across them; a mapping by parameter name for those it names.
        Lloyd's iteration starts from 2^bits points spread evenly from the least weight to the largest, which keeps the
        rare large weights (Han et al., ICLR '16, section 3); centroids that end without a weight are dropped. With
        `optimal` the least sum of squares is found instead, by dynamic programming: slower, for up to some 10^6
        weights. Equal weights give equal codebooks on all ranks.

        TypeError for a parameter that is not real floating-point; ValueError for bits outside 1..12, for a name that
        the model does not have, and for weights that are NaN or infinite.
        """
        parameters = parameters_of(model)
        if isinstance(bits, Mapping):
            wanted = dict(bits)
        else:
            wanted = {name: bits for name, each in parameters.items() if each.ndim >= 2 and each.is_floating_point()}
        for name, width in wanted.items():
            if name not in parameters:
                raise ValueError(f"the model has no parameter {name}")
            if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= MAX_BITS:
                raise ValueError(f"bits must be an integer in 1..{MAX_BITS}, got {width!r} for {name}")
            if not parameters[name].is_floating_point():
                raise TypeError(f"{name} has dtype {parameters[name].dtype}; only floating-point weights are shared")
        return cls({name: _fit(name, parameters[name], 1 << width, optimal) for name, width in wanted.items()})

    def apply(self, model: nn.Module) -> None:
        """Set the weights of a model to their centroids, in place.

        ValueError, before anything is changed, where the model lacks a parameter or has it in another shape.
        """
        parameters = self._parameters(model)
        with torch.no_grad():
            for name, shared in self._shared.items():
                parameters[name].copy_(shared.weights)

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Attached:
        """Fine-tune the centroids by every step of an optimizer from now on, with the clusters as they are.

        Before a step each weight's gradient becomes the sum over its cluster, dL/dC_k = sum of dL/dW (Han et al., ICLR
        '16, section 3.1), which is why the learning rate must be smaller than for single weights; pruned weights get
        none; with a closure whenever that has been called. After it each centroid becomes the mean of its weights,
        which are then equal again, and pruned ones zero, whatever momentum or weight decay did. Returns the handle
        whose `remove` ends it. ValueError as `apply`.
        """
        self._parameters(model)
        return Attached(self, optimizer, model)

    def sum_gradients(self, model: nn.Module) -> None:
        """Replace the gradient of each weight by the sum over its cluster, of pruned ones by zero, in place.

        ValueError as `apply`, and for sparse gradients.
        """
        parameters = self._parameters(model)
        check_gradients(parameters)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                codes = self._shared[name].codes
                sums = _by_cluster(codes, parameter.grad, self._shared[name].values.numel())
                sums[0] = 0
                parameter.grad.copy_(sums[codes.to(sums.device)])

    def update(self, model: nn.Module) -> None:
        """Set each centroid to the mean of its weights in a model, and then the weights to the centroids."""
        for name, parameter in self._parameters(model).items():
            values, codes = self._shared[name]
            moved = parameter.detach().double() - self._shared[name].weights.double()  # none moves none
            sums = _by_cluster(codes, moved, values.numel())
            members = torch.bincount(codes.reshape(-1), minlength=values.numel()).clamp_min(1)
            sums[0] = 0
            values.copy_(values.double().cpu() + sums / members.to(sums.device))
        self.apply(model)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the shared parameters of a model; ValueError where it lacks one or has it in another shape."""
        parameters = parameters_of(model)
        for name, shared in self._shared.items():
            if name not in parameters:
                raise ValueError(f"the model has no parameter {name}, for which there is a codebook")
            if shared.codes.shape != parameters[name].shape:
                raise ValueError(
                    f"the codebook of {name} is for shape {tuple(shared.codes.shape)}, and the parameter has "
                    f"{tuple(parameters[name].shape)}"
                )
        return {name: parameters[name] for name in self._shared}

    def __getitem__(self, name: str) -> Shared:
        return self._shared[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shared)

    def __len__(self) -> int:
        return len(self._shared)


class Attached:
    """Codebooks that follow an optimizer; see `Codebooks.attach`."""

    def __init__(self, codebooks: Codebooks, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
            if closure is None:
                codebooks.sum_gradients(model)
                return None

            def summed() -> Any:
                loss = closure()
                codebooks.sum_gradients(model)
                return loss

            return (args[0], summed, *args[2:]), {name: each for name, each in kwargs.items() if name != "closure"}

        self._handles = (
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(lambda *_: codebooks.update(model)),
        )

    def remove(self) -> None:
        """End it: the optimizer's further steps move single weights."""
        for handle in self._handles:
            handle.remove()


def _by_cluster(codes: Tensor, x: Tensor, count: int) -> Tensor:
    """Return the sums of x over each cluster in the order of its elements, (count,) float64, on the CPU."""
    weights = x.detach().reshape(-1).double().cpu()
    return torch.bincount(codes.reshape(-1).cpu(), weights, minlength=count)


def _fit(name: str, parameter: Tensor, k: int, optimal: bool) -> Shared:
    weights: Any = parameter.detach().reshape(-1).cpu()
    exact: Array = (weights if weights.dtype == torch.float64 else weights.float()).numpy()
    alive = exact != 0
    ordered = np.sort(exact[alive])
    if ordered.size and not (np.isfinite(ordered[0]) and np.isfinite(ordered[-1])):
        raise ValueError(f"{name} holds NaN or infinity, and its weights have no clusters")
    if ordered.size and max(-ordered[0], ordered[-1]) > np.finfo(np.float64).max / (2 * ordered.size):
        raise ValueError(f"the weights of {name} are too large: float64 does not hold sums of them")
    centroids = optimum(ordered, k) if optimal else lloyd(ordered, linear(ordered, k))
    codes = np.zeros(exact.size, np.int64)
    codes[alive] = 1 + nearest(exact[alive], centroids)
    values = torch.from_numpy(np.concatenate([[0.0], centroids]))
    return Shared(
        values.to(parameter.device, parameter.dtype),
        torch.from_numpy(codes).reshape(parameter.shape).to(parameter.device),
    )


def linear(values: Array, k: int) -> Array:
    """Return k points spread evenly from the least to the largest of some values, (k,) float64; none of no values."""
    if not values.size:
        return np.empty(0)
    return np.linspace(float(values.min()), float(values.max()), k)


def lloyd(ordered: Array, start: Array) -> Array:
    """Return the centroids, ascending float64, at which Lloyd's iteration from ascending ones ends (Lloyd 1982).

    ordered: (n,) float32 or float64, ascending and finite. A centroid that has no values in an iteration stays where
    it is, between its neighbours, and may get some later; those that have none at the end are dropped.
    """
    if not ordered.size:
        return np.empty(0)
    sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])  # (n + 1,)
    centroids, before = start.astype(np.float64), None
    for _ in range(ITERATIONS):
        ends = _ends(ordered, centroids)
        if before is not None and (ends == before).all():
            break
        before, counts = ends, np.diff(ends)
        centroids = np.where(counts > 0, np.diff(sums[ends]) / np.maximum(counts, 1), centroids)
    return centroids[np.diff(_ends(ordered, centroids)) > 0]


def _ends(ordered: Array, centroids: Array) -> Array:
    """Return where the clusters of ascending values begin and end, (k + 1,): a value goes to its nearest centroid."""
    middles = (centroids[1:] + centroids[:-1]) / 2
    return np.concatenate([[0], np.searchsorted(ordered, middles.astype(ordered.dtype)), [ordered.size]])


def nearest(values: Array, centroids: Array) -> Array:
    """Return which of some ascending centroids is nearest to each value, int64; as `lloyd` decides ties."""
    middles = ((centroids[1:] + centroids[:-1]) / 2).astype(values.dtype)
    return np.searchsorted(middles, values, side="right")


def squares(ordered: Array, centroids: Array) -> float:
    """Return the sum of squared distances of ascending values to their nearest centroids."""
    exact = ordered.astype(np.float64)
    return float(((exact - centroids[nearest(ordered, centroids)]) ** 2).sum())


def optimum(ordered: Array, k: int) -> Array:
    """Return at most k centroids, ascending float64, with the least sum of squares (Wang and Song 2011).

    ordered: (n,) float32 or float64, ascending and finite. Dynamic programming over the ends of clusters, which ascend
    with the values, so that a step looks between those of its neighbours: about k n log n operations, 8 k n bytes.
    """
    n = ordered.size
    if not n:
        return np.empty(0)
    exact = ordered.astype(np.float64) - float(ordered[n // 2])  # nearer to zero: squares lose less
    sums = np.concatenate([[0.0], np.cumsum(exact)])
    powers = np.concatenate([[0.0], np.cumsum(exact**2)])

    def spread(first: Array, end: Array) -> Array:  # squared distances of values first .. end - 1 to their mean
        total = sums[end] - sums[first]
        found: Array = np.maximum(powers[end] - powers[first] - total**2 / np.maximum(end - first, 1), 0)
        return found

    everything = np.arange(n + 1)
    costs = spread(np.zeros_like(everything), everything)  # of the first e values in one cluster
    firsts = [np.zeros(n + 1, np.int64)]
    for _ in range(min(k, n) - 1):
        costs, begins = _step(costs, spread)
        firsts.append(begins)
    ends = [n]
    for begins in reversed(firsts):
        ends.append(int(begins[ends[-1]]))
    edges = np.unique(ends)
    return np.diff(sums[edges]) / np.diff(edges) + float(ordered[n // 2])


def _step(costs: Array, spread: Any) -> tuple[Array, Array]:
    """Return the least costs with one cluster more for every end, (n + 1,), and where its last cluster begins."""
    n = costs.size - 1
    best, begins = np.empty_like(costs), np.zeros(n + 1, np.int64)
    pending = [(np.array([0]), np.array([n]), np.array([0]), np.array([n]))]  # ends low .. high, begins from .. to
    while pending:
        low, high, least, most = pending.pop()
        middle = (low + high) // 2
        lengths = np.minimum(most, middle) - least + 1
        owner = np.repeat(np.arange(middle.size), lengths)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        begin = least[owner] + np.arange(owner.size) - starts[owner]
        tried = costs[begin] + spread(begin, middle[owner])
        found = np.minimum.reduceat(tried, starts)
        first = np.flatnonzero(tried == found[owner])
        where = np.full(middle.size, -1)
        where[owner[first][::-1]] = begin[first][::-1]  # of equal costs the first begin
        best[middle], begins[middle] = found, where
        lows, highs = np.concatenate([low, middle + 1]), np.concatenate([middle - 1, high])
        leasts, mosts = np.concatenate([least, where]), np.concatenate([where, most])
        open_ = lows <= highs
        if open_.any():
            pending.append((lows[open_], highs[open_], leasts[open_], mosts[open_]))
    return best, begins
