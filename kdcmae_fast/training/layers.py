"""The layers of a fine-tuning model: which learn how fast, and which are not read at all."""

import re

from torch import nn

from kdcmae_fast.config import ModelConfig
from kdcmae_fast.finetune_config import READS, FinetuneConfig

_BLOCK = re.compile(r"encoder\.(audio|video|shared)\.blocks\.(\d+)\.")
_STREAM = re.compile(r"encoder\.shared\..*\b(joint|audio|video)\.")


def is_trunk(name: str) -> bool:
    """Whether a parameter is of the pretrained encoder; the head is everything else."""
    return name.startswith("encoder.")


def layer_scale(name: str, model: ModelConfig, finetune: FinetuneConfig) -> float:
    """A parameter's rate as a multiple of the run's.

    The head: head_lr. The trunk: layer_decay to the power of its depth below the last norm, as
    ImageNet MAE (arXiv 2111.06377) fine-tunes; patch embeddings, positions and extra tokens lie
    below the first block, a shared block above all private ones.
    """
    if not is_trunk(name):
        return finetune.head_lr
    top = model.modality_depth + model.shared_depth + 1
    block = _BLOCK.match(name)
    if block:
        layer = int(block[2]) + 1 + (model.modality_depth if block[1] == "shared" else 0)
    else:
        layer = top if name.startswith("encoder.shared.") else 0
    return finetune.layer_decay ** (top - layer)


def unread_parameters(model: nn.Module, mode: str) -> set[str]:
    """Names of the trunk's parameters that no output of a fine-tuning model depends on in `mode`.

    They are frozen: an optimizer that shards its state would otherwise let them decay.
    """
    sync = hasattr(model, "aggregator")
    stream = mode if not sync and mode != "multimodal" else "joint"
    unread = set()
    for name, _ in model.named_parameters():
        part = name.split(".")[1] if is_trunk(name) else ""
        norm = _STREAM.match(name)
        if (
            part in {"audio", "video"} - set(READS[mode])
            or (part == "shared" and sync and mode == "multimodal")
            or (part == "shared" and norm is not None and norm[1] != stream)
        ):
            unread.add(name)
    return unread
