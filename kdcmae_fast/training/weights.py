"""Weights into the engine and out of it again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcmae_fast.config import RunConfig
from kdcmae_fast.convert import load_published
from kdcmae_fast.models import build_model, from_pretrained


def initial_model(config: RunConfig, *, resumed: bool) -> Any:
    """The model at step 0, equal on every rank and for every number of ranks.

    From `train.init_from` (a model folder or a published file) if set; a resumed run gets its
    weights from the checkpoint instead. Raises ValueError when the weights do not fit.
    """
    settings = vars(config.model)
    torch.manual_seed(config.train.seed)
    source = config.train.init_from
    if not source or resumed:
        return build_model(config.name, config.preset, **settings)
    if not Path(source).is_dir():
        return load_published(source, name=config.name, **settings).float()
    model = build_model(config.name, config.preset, **settings)
    weights = from_pretrained(source).state_dict()
    ours = model.state_dict()
    differing = [
        key
        for key in sorted({*weights, *ours})
        if key not in ours or key not in weights or ours[key].shape != weights[key].shape
    ]
    if differing:
        raise ValueError(
            f"train.init_from={source}: {len(differing)} tensors do not fit this model, first "
            f"{differing[0]}; use the settings of its config.json"
        )
    model.load_state_dict(weights)
    return model


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
