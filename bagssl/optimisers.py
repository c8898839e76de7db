"""The optimisers: torch's AdamW and SGD, and a LARS that does not wait for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from bagssl.config import PretrainConfig


def build_optimiser(config: PretrainConfig, model: nn.Module, capturable: bool = False) -> Optimizer:
    """The optimiser of `config` for all parameters of `model`. capturable: by a CUDA graph, with a tensor as rate.

    Biases and batch-norm's scales are neither decayed nor, by LARS, rescaled.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimiser == "adamw":
        return AdamW(groups, lr=config.learning_rate, fused=True, capturable=capturable)
    momentum = {"lr": config.learning_rate, "momentum": config.momentum, "nesterov": config.momentum > 0}
    if config.optimiser == "sgd":
        return SGD(groups, **momentum, fused=capturable or None)
    return LARS(groups, **momentum, trust=config.lars_trust, clip=config.lars_clip)


class LARS(Optimizer):
    """SGD whose step for each tensor p is rescaled by trust * |p| / (|g| + weight_decay * |p|).

    You et al. 2017, eq. 6. As in lightly's LARS, a group without weight decay is not rescaled, nor a tensor whose
    norm or whose gradient's is zero. Here no norm is looked at on the way: a choice by `torch.where` needs no answer
    from the device, and all tensors of a group are updated together.

    clip: a tensor's rate is the smaller of lr and the above, in place of their product (LARC; the published CIFAR
    recipes of solo-learn and EMP-SSL have it so).
    """

    def __init__(self, params, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False,
                 trust: float = 0.001, clip: bool = False, eps: float = 1e-8):
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "trust": trust}
        super().__init__(params, {**settings, "clip": clip, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            steps = [p.grad for p in params]
            if group["weight_decay"]:
                steps = _rescaled(params, steps, group)
            if group["momentum"]:
                steps = self._with_momentum(params, steps, group)
            if isinstance(group["lr"], Tensor):  # on the device, where a CUDA graph reads it anew
                torch._foreach_sub_(params, torch._foreach_mul(steps, group["lr"]))
            else:
                torch._foreach_add_(params, steps, alpha=-group["lr"])
        return loss

    def _with_momentum(self, params: list, steps: list, group: dict) -> list:
        for p, step in zip(params, steps, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(step)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        return torch._foreach_add(steps, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers


def _rescaled(params: list, grads: list, group: dict) -> list:
    p, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
    moved = (p != 0) & (g != 0)
    rate = group["trust"] * p / (g + group["weight_decay"] * p + group["eps"])
    if group["clip"]:
        lr = group["lr"].clamp(min=1e-30) if isinstance(group["lr"], Tensor) else max(group["lr"], 1e-30)
        rate = (rate / lr).clamp(max=1)
    rate = torch.where(moved, rate, 1.0)
    decay = torch.where(moved, group["weight_decay"] * rate, 0.0)
    steps = torch._foreach_mul(grads, list(rate.unbind()))
    torch._foreach_add_(steps, torch._foreach_mul(params, list(decay.unbind())))
    return steps
