"""Weights into the engine and out of it again."""

from typing import Any

import torch
from torch import Tensor, nn

from kdcmae_fast.config import RunConfig
from kdcmae_fast.convert import init_model
from kdcmae_fast.models import build_model


def initial_model(config: RunConfig, *, resumed: bool) -> Any:
    """The model at step 0, equal on every rank and for every number of ranks.

    From `train.init_from` (a model folder or a published file) if set, by the rules of
    `convert.init_model`; a resumed run gets its weights from the checkpoint instead. Raises
    ValueError when the weights do not fit.
    """
    torch.manual_seed(config.train.seed)
    model = build_model(config.name, config.preset, **vars(config.model))
    if not resumed:
        start_weights(model, config.train.init_from)
    return model


def start_weights(model: Any, path: str) -> None:
    """Weights of the model folder or published file at `path` into `model`; "" leaves it as is."""
    if path:
        init_model(model, path)


def untrained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Buffers and frozen parameters of the state dict, in fp32, before the engine casts them."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name not in trained
    }


def full_weights(engine: Any, *, on_main: bool) -> dict[str, Tensor]:
    """The trained fp32 parameters, whole, on the CPU of the rank with `on_main`.

    Every rank must call it: under ZeRO each holds a part of the fp32 master weights.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        full = safe_get_full_fp32_param(parameter)
        if on_main:
            weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
    return weights
