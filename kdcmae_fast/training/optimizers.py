"""Optimizers by name, over parameter groups, for DeepSpeed to shard."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kdcmae_fast.config import OptimConfig

ParamGroup = dict[str, Any]


def build_optimizer(
    model: nn.Module,
    optim: OptimConfig,
    *,
    zero_stage: int,
    bf16: bool,
    lr_scale: Callable[[str], float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` asks for.

    adam: L2 decay on every parameter, as CAV-MAE trains (arXiv 2210.07839).
    adamw: decoupled decay on matrices only, not on biases, LayerNorms and tokens.
    lamb: DeepSpeed's fused LAMB. apex_fused_lamb: apex's. Their trust ratio is per parameter, so
        they need the parameters whole: fp32 and ZeRO stage 0.

    lr_scale: the name of a parameter -> its rate as a multiple of everybody's; kept in its group
    as "lr_scale". None: 1 for all. Parameters that need no gradient are left out.

    Raises ValueError when an optimizer is not installed or cannot work as configured.
    """
    groups = _groups(model, optim, lr_scale)
    settings: dict[str, Any] = {
        "lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay
    }  # fmt: skip
    if optim.name == "adam":
        return torch.optim.Adam(groups, fused=True, **settings)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if zero_stage != 0 or bf16:
        raise ValueError(
            f"optim.name={optim.name}: DeepSpeed flattens the parameters, which LAMB must see one "
            "by one; pass ds.zero_optimization.stage=0 ds.bf16.enabled=false, or use adamw"
        )
    return _lamb_class(optim.name)(groups, **settings)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """The rate of every parameter group of a torch or DeepSpeed optimizer, each with its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _groups(
    model: nn.Module, optim: OptimConfig, lr_scale: Callable[[str], float] | None
) -> list[ParamGroup]:
    """One group per rate; for all but adam the vectors, which do not decay, in one of their own."""
    found: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = parameter.numel() == max(parameter.shape, default=1)
        lists = found.setdefault(1.0 if lr_scale is None else lr_scale(name), ([], []))
        lists[is_vector and optim.name != "adam"].append(parameter)
    groups: list[ParamGroup] = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for scale, lists in found.items()
        for parameters, decay in zip(lists, (optim.weight_decay, 0.0), strict=True)
        if parameters
    ]
    return groups


def _lamb_class(name: str) -> Any:
    if not torch.cuda.is_available():
        raise ValueError(
            f"optim.name={name}: runs on CUDA only, there is no CUDA device; use adamw"
        )
    try:
        if name == "lamb":
            from deepspeed.ops.lamb import FusedLamb

            return FusedLamb
        from apex.optimizers import FusedLAMB

        return FusedLAMB
    except ImportError as error:
        package = "deepspeed" if name == "lamb" else "NVIDIA apex"
        raise ValueError(
            f"optim.name={name}: {package} with its fused LAMB is not installed ({error}); "
            "install it, or use adamw"
        ) from None
