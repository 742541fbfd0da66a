"""Model settings that follow from the shapes of published weights."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

HEAD_DIM, DECODER_HEAD_DIM = 64, 32  # of every published model
MEL_BINS = 128


def infer_settings(
    state: Mapping[str, Tensor], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings that the weights fix, settings they only suggest) of a published file.

    overrides: the caller's settings; `num_mel_bins` splits the audio tokens into two axes.
    `audio_length` is a suggestion: position tables can be made for another.
    """
    dim, _, patch, _ = state["patch_embed_v.proj.weight"].shape
    fixed: dict[str, Any] = {
        "embed_dim": dim,
        "patch_size": patch,
        "img_size": math.isqrt(state["pos_embed_v"].shape[1]) * patch,
        "modality_depth": count_blocks(state, "blocks_a"),
        "shared_depth": count_blocks(state, "blocks_u"),
        "mlp_ratio": state["blocks_u.0.mlp.fc1.weight"].shape[0] / dim,
        "cls_token": "cls_token_a" in state,
        "num_registers": len(state["register_tokens"]) // 2 if "register_tokens" in state else 0,
        "contrast_head_depth": count_blocks(state, "constrative_head_audio"),
    }
    mel_bins = overrides.get("num_mel_bins", MEL_BINS)
    guessed = {"num_mel_bins": mel_bins} | guess_heads("num_heads", dim, HEAD_DIM, overrides)
    if "pos_embed_a" in state:  # MAE weights under CAV-MAE's names may have none
        guessed["audio_length"] = state["pos_embed_a"].shape[1] // (mel_bins // patch) * patch
    if "decoder_embed.weight" in state:
        width = state["decoder_embed.weight"].shape[0]
        fixed["decoder_embed_dim"] = width
        fixed["decoder_depth"] = count_blocks(state, "decoder_blocks")
        guessed |= guess_heads("decoder_num_heads", width, DECODER_HEAD_DIM, overrides)
    if "classifier_head.weight" in state:
        fixed["classifier_depth"] = count_blocks(state, "classifier_layers")
        if state["classifier_head.weight"].shape[1] == 2 * dim:
            fixed["classifier_input"] = "multimodal"
        elif overrides.get("classifier_input") not in ("audio", "video"):
            raise ValueError(
                "classifier_input is not in the weights, and the head reads one modality: give "
                "classifier_input=audio or video"
            )
    return fixed, guessed


def guess_heads(
    name: str, width: int, head_dim: int, overrides: Mapping[str, Any]
) -> dict[str, int]:
    """The number of heads at the published head size, unless the caller gives it."""
    if name in overrides:
        return {}
    if width % head_dim:
        raise ValueError(
            f"{name} is not in the weights, and a width of {width} is no multiple of the "
            f"published head size {head_dim}: give {name}="
        )
    return {name: width // head_dim}


def count_blocks(state: Mapping[str, Tensor], stack: str) -> int:
    """How many blocks `stack`.0, `stack`.1, ... there are."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{stack}.")})


def check_overrides(fixed: Mapping[str, Any], overrides: Mapping[str, Any], path: str) -> None:
    """ValueError where the caller's settings contradict the file's shapes."""
    for name, value in fixed.items():
        if name in overrides and overrides[name] != value:
            raise ValueError(f"{name}={overrides[name]} contradicts {path}, which has {value}")
