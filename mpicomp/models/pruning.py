"""Pruning by magnitude: which weights of a model survive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpicomp.api.call import Call, blocking
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.models.modules import check_gradients, parameters_of
from mpicomp.reducers.parts.masks import digest_of_masks


class Masks(Mapping[str, Tensor]):
    """The weights of a model that survive, as bool tensors of the parameters' shapes by parameter name: values only.

    A parameter without a mask is not pruned. `Masks(masks.state_dict())` is a copy. TypeError for tensors that are not
    bool.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"the mask of {name} must be a bool tensor, got {found}")
        self._masks = {name: masks[name].detach().clone() for name in sorted(masks)}

    @classmethod
    def magnitude(cls, model: nn.Module, sparsity: float | Mapping[str, float], old: Masks | None = None) -> Masks:
        """Prune the round(sparsity * size) weights of least magnitude of each tensor, exactly; the model stays as is.

        A number counts for every parameter of at least two dimensions, tensor by tensor; a mapping by parameter name
        counts for those that it names. Of equal magnitudes the lowest indices survive, so ties, dead units and tensors
        of zeros lose no more than others. What is pruned in `old` never comes back; parameters that only `old` has
        keep their masks. Weights of equal bits give equal masks on all ranks. (Zhu and Gupta 2017; Han et al. 2015.)

        ValueError for a sparsity outside [0, 1] or below that of `old`, for a name that the model does not have, for
        masks of another shape and for weights that are NaN or infinite.
        """
        parameters = parameters_of(model)
        if isinstance(sparsity, Mapping):
            wanted = dict(sparsity)
        else:
            wanted = {name: sparsity for name, parameter in parameters.items() if parameter.ndim >= 2}
        kept = dict(old or {})
        check_masks(kept, parameters)
        for name, share in wanted.items():
            if name not in parameters:
                raise ValueError(f"the model has no parameter {name}")
            if not 0 <= share <= 1:
                raise ValueError(f"sparsity must be in 0..1, got {share!r} for {name}")
            kept[name] = _largest(name, parameters[name], float(share), kept.get(name))
        return cls(kept)

    def apply(self, model: nn.Module, gradients: bool = False) -> None:
        """Set the pruned weights of a model to zero in place, with `gradients` those of their gradients, too.

        ValueError, before anything is changed, where the model lacks a parameter or has it in another shape, and for
        sparse gradients.
        """
        parameters = parameters_of(model)
        check_masks(self._masks, parameters)
        if gradients:
            check_gradients({name: parameters[name] for name in self._masks})
        with torch.no_grad():
            for name, mask in self._masks.items():
                parameter = parameters[name]
                pruned = ~mask.to(parameter.device)
                whole = parameter if parameter.itemsize > 1 else parameter.view(torch.uint8)  # float8 has no fill
                whole.masked_fill_(pruned, 0)
                if gradients and parameter.grad is not None:
                    parameter.grad.masked_fill_(pruned, 0)

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
        """Apply these masks after every step of an optimizer, so that momentum moves no pruned weight.

        Returns the handle whose `remove` ends it. ValueError as `apply`.
        """
        check_masks(self._masks, parameters_of(model))
        return optimizer.register_step_post_hook(lambda *_: self.apply(model))

    def digest(self) -> str:
        """Return a hash, 32 hexadecimal digits: equal exactly where names, shapes and masks are."""
        return digest_of_masks({name: mask.cpu().numpy() for name, mask in self._masks.items()})

    def check(self, comm: Any) -> None:
        """Raise ConfigMismatchError on all ranks of an mpi4py communicator unless all have these masks. Collective."""
        _check(comm, self)

    @property
    def size(self) -> int:
        """Number of weights in the tensors that have a mask."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def kept(self) -> int:
        """Number of weights that survive in them."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    @property
    def sparsity(self) -> float:
        """Share of them that is pruned; 0 without masks."""
        return 1 - self.kept / self.size if self.size else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the masks by parameter name."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Masks) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]  # it holds tensors

    def __repr__(self) -> str:
        return f"Masks({self.kept} of {self.size} weights in {len(self)} tensors, hash {self.digest()})"


def _alike(comm: Comm, masks: Masks) -> Call[None]:
    return Call(lambda _: f"check of {masks!r}", lambda: None)


_check = blocking(_alike)


def check_masks(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless every mask has a parameter of its name and shape."""
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}, for which there is a mask")
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, and the parameter {tuple(parameters[name].shape)}"
            )


def _largest(name: str, parameter: Tensor, sparsity: float, old: Tensor | None) -> Tensor:
    """Return the mask of a parameter's largest magnitudes, in its shape and on its device."""
    weights = parameter.detach().cpu().reshape(-1)
    weights = weights.abs() if weights.is_complex() else weights.float() if weights.itemsize <= 2 else weights
    magnitudes: Array = (weights if weights.dtype == torch.float32 else weights.double()).abs().numpy()
    if not np.isfinite(magnitudes).all():
        raise ValueError(f"{name} holds NaN or infinity, and has no weights of least magnitude")
    size = magnitudes.size
    keep = size - round(sparsity * size)
    if old is not None:
        before = old.cpu().reshape(-1).numpy()
        if keep > np.count_nonzero(before):
            raise ValueError(f"sparsity {sparsity:.6g} of {name} is below that of its old mask: no weight comes back")
        magnitudes = np.where(before, magnitudes, -1)
    return torch.from_numpy(largest(magnitudes, keep)).reshape(parameter.shape).to(parameter.device)


def largest(magnitudes: Array, keep: int) -> Array:
    """Return where the `keep` largest of some magnitudes, (n,), are, (n,) bool; of equal ones the lowest indices."""
    if not keep:
        return np.zeros(magnitudes.size, bool)
    least = np.partition(magnitudes, magnitudes.size - keep)[magnitudes.size - keep]
    found: Array = magnitudes > least
    ties = np.flatnonzero(magnitudes == least)
    found[ties[: keep - np.count_nonzero(found)]] = True
    return found
