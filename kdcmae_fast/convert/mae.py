"""ImageNet MAE (arXiv 2111.06377) weights as CAV-MAE's starting point (arXiv 2210.07839)."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .infer import DECODER_HEAD_DIM, HEAD_DIM, count_blocks, guess_heads

CLS_TOKENS = ("cls_token", "cls_token_a", "cls_token_v")
_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)")


def is_mae(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of an image MAE, with or without its decoder."""
    return "blocks.0.attn.qkv.weight" in state and "patch_embed.proj.weight" in state


def is_renamed_mae(state: Mapping[str, Tensor]) -> bool:
    """Whether these are MAE weights already under CAV-MAE's names, as CAV-MAE distributes them.

    They still carry MAE's CLS token, which CAV-MAE does not have. CAV-MAE Sync has one too, but
    also modality vectors, which MAE lacks.
    """
    return "cls_token_a" in state and "modality_a" not in state


def has_decoder(state: Mapping[str, Tensor]) -> bool:
    """Whether the file holds the whole MAE, not just the encoder."""
    return "decoder_embed.weight" in state


def infer_mae_settings(
    state: Mapping[str, Tensor], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings the weights fix, settings they suggest) for a model that starts from them."""
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = count_blocks(state, "blocks")
    shared = int(overrides.get("shared_depth", 1))
    fixed: dict[str, Any] = {
        "embed_dim": dim,
        "patch_size": patch,
        "img_size": round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        "modality_depth": depth - shared,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
    }
    guessed = {"shared_depth": shared} | guess_heads("num_heads", dim, HEAD_DIM, overrides)
    if has_decoder(state):
        width = state["decoder_embed.weight"].shape[0]
        fixed["decoder_embed_dim"] = width
        fixed["decoder_depth"] = count_blocks(state, "decoder_blocks")
        guessed |= guess_heads("decoder_num_heads", width, DECODER_HEAD_DIM, overrides)
    return fixed, guessed


def map_mae(
    state: Mapping[str, Tensor], modality_depth: int, cls_token: bool = False
) -> dict[str, Tensor]:
    """MAE's tensors under CAV-MAE's published names; what has no place keeps its own name.

    Blocks 0 .. modality_depth - 1 go to both streams, the rest to the shared blocks, whose norms
    are copied to the modality norms; the audio projection is the sum of the image projection over
    the colours; position tables lose the CLS row; the audio head is the first rows of the image
    head; with `cls_token` both modalities get MAE's. MAE's LayerNorms have eps 1e-6, ours 1e-5.
    """
    mapped: dict[str, Tensor] = {}
    audio_pixels = state["patch_embed.proj.weight"][0, 0].numel()
    for key, tensor in state.items():
        block = _BLOCK.fullmatch(key)
        if block:
            mapped |= _map_block(block, tensor, modality_depth)
        elif key == "patch_embed.proj.weight":
            mapped["patch_embed_v.proj.weight"] = tensor
            mapped["patch_embed_a.proj.weight"] = tensor.sum(dim=1, keepdim=True)
        elif key == "patch_embed.proj.bias":
            mapped |= {f"patch_embed_{m}.proj.bias": tensor for m in "av"}
        elif key in ("pos_embed", "decoder_pos_embed"):
            mapped[f"{key}_v"] = tensor[:, 1:]
        elif key in ("norm.weight", "norm.bias"):
            mapped |= {key.replace("norm", name): tensor for name in ("norm", "norm_a", "norm_v")}
        elif key in ("decoder_pred.weight", "decoder_pred.bias"):
            mapped[key.replace("pred", "pred_v")] = tensor
            mapped[key.replace("pred", "pred_a")] = tensor[:audio_pixels]
        elif key == "cls_token" and cls_token:
            mapped |= {f"cls_token_{m}": tensor for m in "av"}
        else:  # decoder_embed, decoder_norm and mask_token have the same names in both
            mapped[key] = tensor
    return mapped


def _map_block(block: re.Match[str], tensor: Tensor, modality_depth: int) -> dict[str, Tensor]:
    decoder, index, rest = block[1], int(block[2]), block[3]
    if decoder:
        return {f"decoder_blocks.{index}.{rest}": tensor}
    if index < modality_depth:
        return {f"blocks_{m}.{index}.{rest}": tensor for m in "av"}
    name = f"blocks_u.{index - modality_depth}."
    if not rest.startswith("norm"):
        return {name + rest: tensor}
    norm, leaf = rest.split(".")
    return {f"{name}{norm}{suffix}.{leaf}": tensor for suffix in ("", "_a", "_v")}


def stays_fresh(key: str, decoder_in_file: bool) -> bool:
    """Whether an MAE file rightly has nothing for this published name."""
    if key.startswith(("modality_", "decoder_modality_")):
        return True
    if key in ("pos_embed_a", "decoder_pos_embed_a"):
        return True
    return not decoder_in_file and (key.startswith("decoder_") or key == "mask_token")
