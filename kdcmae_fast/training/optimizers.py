"""Optimizers by name, over parameter groups, for DeepSpeed to shard."""

from typing import Any

import torch
from torch import nn

from kdcmae_fast.config import OptimConfig

ParamGroup = dict[str, Any]


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, zero_stage: int, bf16: bool
) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` asks for.

    adam: L2 decay on every parameter, as CAV-MAE trains (arXiv 2210.07839).
    adamw: decoupled decay on matrices only, not on biases, LayerNorms and tokens.
    lamb: DeepSpeed's fused LAMB. apex_fused_lamb: apex's. Their trust ratio is per parameter, so
        they need the parameters whole: fp32 and ZeRO stage 0.

    Raises ValueError when an optimizer is not installed or cannot work as configured.
    """
    if optim.name == "adam":
        groups: list[ParamGroup] = [{"params": list(model.parameters())}]
    else:
        groups = _decay_matrices_only(model, optim.weight_decay)
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
    """One rate for every parameter group of a torch or DeepSpeed optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _decay_matrices_only(model: nn.Module, weight_decay: float) -> list[ParamGroup]:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_vector = parameter.numel() == max(parameter.shape, default=1)
        (vectors if is_vector else matrices).append(parameter)
    groups: list[ParamGroup] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
