"""Normalisation and optimizer whose multiplications are shifts (Hubara et al. 2016): one factor is a power of two."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpicomp.models.binary import straight_through

HALF = 2**-0.5  # a mantissa in [1/2, 1) from here on is nearer to 1 than to 1/2, by their logarithms


def ap2(x: Tensor) -> Tensor:
    """Return the power of two next to every element by its logarithm, sign(x) 2^round(log2 |x|); 0, NaN and inf stay.

    The result differs from x by a factor of at most sqrt(2). The gradient passes as it is.
    """
    given = x.detach()
    mantissa, exponent = torch.frexp(given)
    exponent = exponent - (mantissa.abs() < HALF).to(exponent.dtype)
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
        over = [0, *range(2, input.dim())]
        count = input.numel() // max(1, input.shape[1])
        shape = (1, -1) + (1,) * (input.dim() - 2)
        current = self.training or self.running_mean is None or self.running_var is None
        if current:
            if count < 2:
                raise ValueError(f"statistics need more than one value per feature, got {tuple(input.shape)}")
            mean = input.mean(over)
            centred = input - mean.view(shape)
            var = (centred * ap2(centred)).mean(over)
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, var = self.running_mean, self.running_var
            centred = input - mean.view(shape)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach(), share)
                self.running_var.lerp_(var.detach() * (count / (count - 1)), share)
        result = centred * ap2((var + self.eps).rsqrt()).view(shape)
        if self.weight is not None:
            result = result * ap2(self.weight).view(shape)
        return result if self.bias is None else result + self.bias.view(shape)


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
                shift = ap2(torch.where(v > 0, 1 / v, torch.zeros_like(v)))
                parameter.sub_(m * shift * float(rate))
        return loss


def shift_based(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm of a model by a fresh `ShiftBatchNorm` of its size and settings; return the model."""
    for name, module in model.named_children():
        if isinstance(module, _BatchNorm) and not isinstance(module, ShiftBatchNorm):
            made = ShiftBatchNorm(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
            )
            setattr(model, name, made)
        else:
            shift_based(module)
    return model
