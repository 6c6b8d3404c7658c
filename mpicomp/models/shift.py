"""Normalisation and optimizer whose multiplications are shifts (Hubara et al. 2016): one factor is a power of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpicomp.models.binary import straight_through
from mpicomp.models.modules import replace

HALF = 2**-0.5  # a mantissa in [1/2, 1) from here on is nearer to 1 than to 1/2, by their logarithms


def ap2(x: Tensor) -> Tensor:
    """Return the power of two next to every element by its logarithm, sign(x) 2^round(log2 |x|); 0, NaN and inf stay.

    The result differs from x by a factor of at most sqrt(2), of 2 where it would be beyond the largest power of two
    that the dtype has. The gradient passes as it is.
    """
    given = x.detach()
    mantissa, exponent = torch.frexp(given)
    exponent = exponent - (mantissa.abs() < HALF).to(exponent.dtype)
    exponent = exponent.clamp_max(math.frexp(torch.finfo(x.dtype).max)[1] - 1)
    power = torch.ldexp(given.sign(), exponent)
    kept = (given == 0) | ~given.isfinite()
    return straight_through(x, torch.where(kept, given, power))


class ShiftBatchNorm(_BatchNorm):
    """BatchNorm over all dimensions but the second, with `ap2` of one factor in every product.

    With c = x - mean: var = mean(c AP2(c)), y = c AP2(1 / sqrt(var + eps)) AP2(weight) + bias. Running mean and
    variance follow as in `nn.BatchNorm1d` and serve in evaluation. x: (batch, features, ...).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (batch, features, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, in its shape; ValueError for a batch of one value per feature in training."""
        self._check_input_dim(input)
        x = input.float() if input.element_size() < 4 else input  # statistics of half types, as nn.BatchNorm has them
        over = [0, *range(2, input.dim())]
        count = input.numel() // max(1, input.shape[1])
        shape = (1, -1) + (1,) * (input.dim() - 2)
        current = self.training or self.running_mean is None or self.running_var is None
        if current:
            if count < 2:
                raise ValueError(f"statistics need more than one value per feature, got {tuple(input.shape)}")
            mean = x.mean(over)
            centred = x - mean.view(shape)
            var = (centred * ap2(centred)).mean(over)
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, var = self.running_mean, self.running_var
            centred = x - mean.view(shape)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), share)
                self.running_var.lerp_((var.detach() * (count / (count - 1))).to(self.running_var.dtype), share)
        result = centred * ap2((var + self.eps).rsqrt()).view(shape)
        if self.weight is not None:
            result = result * ap2(self.weight).view(shape)
        if self.bias is not None:
            result = result + self.bias.view(shape)
        return result.to(input.dtype)


class ShiftAdaMax(torch.optim.Optimizer):
    """AdaMax whose two products per step are shifts: by AP2 of the rate and by AP2 of 1 / v.

    m = beta1 m + (1 - beta1) g, v = max(beta2 v, |g|), x -= AP2(lr / (1 - beta1^t)) m AP2(1 / v). The defaults are
    powers of two: lr = 2^-10, 1 - beta1 = 2^-3, 1 - beta2 = 2^-10. Has no weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2**-10,
        betas: tuple[float, float] = (1 - 2**-3, 1 - 2**-10),
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["m"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                m, v = state["m"], state["v"]
                m.lerp_(parameter.grad, 1 - beta1)
                torch.maximum(v * beta2, parameter.grad.abs(), out=v)
                rate = ap2(torch.tensor(group["lr"] / (1 - beta1 ** float(state["step"])), dtype=torch.float64))
                inverse = (1 / v).clamp_max(torch.finfo(v.dtype).max)  # of a v that has died away: no 0 x inf
                shift = ap2(torch.where(v > 0, inverse, torch.zeros_like(v)))
                parameter.sub_(m * shift * float(rate))
        return loss


def shift_based(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm of a model by a fresh `ShiftBatchNorm` of its size and settings; return the model.

    They have its mode, device and dtype, too; one that stands at several places stays one.
    """
    found = [each for each in model.modules() if isinstance(each, _BatchNorm) and not isinstance(each, ShiftBatchNorm)]
    made: dict[nn.Module, nn.Module] = {module: _fresh(module) for module in found}
    replace(model, made)
    return made.get(model, model)


def _fresh(module: _BatchNorm) -> ShiftBatchNorm:
    made = ShiftBatchNorm(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    for like in (module.weight, module.running_mean):
        if like is not None:
            made.to(like.device, like.dtype)
    return made.train(module.training)
