"""Names and shapes of the published models at toy sizes, and weights for them by a formula."""

import torch

from kdcmae_fast.models.positions import sincos_positions

DIM, DECODER_DIM, CLASSES, REGISTERS = 48, 32, 5, 8
AUDIO_GRID, VIDEO_GRID = (8, 6), (14, 14)
HEADS = {"num_heads": 4, "decoder_num_heads": 4}


def block(name, dim):
    shapes = {
        f"{name}.attn.qkv.weight": (3 * dim, dim),
        f"{name}.attn.qkv.bias": (3 * dim,),
        f"{name}.attn.proj.weight": (dim, dim),
        f"{name}.attn.proj.bias": (dim,),
        f"{name}.mlp.fc1.weight": (4 * dim, dim),
        f"{name}.mlp.fc1.bias": (4 * dim,),
        f"{name}.mlp.fc2.weight": (dim, 4 * dim),
        f"{name}.mlp.fc2.bias": (dim,),
    }
    for norm in ("norm1", "norm1_a", "norm1_v", "norm2", "norm2_a", "norm2_v"):
        shapes |= norm_shapes(f"{name}.{norm}", dim)
    return shapes


def norm_shapes(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def encoder_shapes():
    shapes = {}
    for m, channels, tokens in (("a", 1, 48), ("v", 3, 196)):
        shapes[f"modality_{m}"] = (1, 1, DIM)
        shapes[f"pos_embed_{m}"] = (1, tokens, DIM)
        shapes[f"patch_embed_{m}.proj.weight"] = (DIM, channels, 16, 16)
        shapes[f"patch_embed_{m}.proj.bias"] = (DIM,)
        for index in range(11):
            shapes |= block(f"blocks_{m}.{index}", DIM)
    for name in ("norm", "norm_a", "norm_v"):
        shapes |= norm_shapes(name, DIM)
    return shapes | block("blocks_u.0", DIM)


def pretrained_shapes():
    shapes = encoder_shapes() | {"mask_token": (1, 1, DECODER_DIM)}
    for m, pixels, tokens in (("a", 256, 48), ("v", 768, 196)):
        shapes[f"decoder_modality_{m}"] = (1, 1, DECODER_DIM)
        shapes[f"decoder_pos_embed_{m}"] = (1, tokens, DECODER_DIM)
        shapes[f"decoder_pred_{m}.weight"] = (pixels, DECODER_DIM)
        shapes[f"decoder_pred_{m}.bias"] = (pixels,)
    shapes |= {"decoder_embed.weight": (DECODER_DIM, DIM), "decoder_embed.bias": (DECODER_DIM,)}
    shapes |= norm_shapes("decoder_norm", DECODER_DIM)
    return shapes | block("decoder_blocks.0", DECODER_DIM) | block("decoder_blocks.1", DECODER_DIM)


def classifier_shapes():
    shapes = encoder_shapes() | norm_shapes("mlp_head.0", DIM)
    return shapes | {"mlp_head.1.weight": (CLASSES, DIM), "mlp_head.1.bias": (CLASSES,)}


def sync_tokens(registers=REGISTERS):
    shapes = {"cls_token_a": (1, 1, DIM), "cls_token_v": (1, 1, DIM)}
    return shapes | ({"register_tokens": (2 * registers, DIM)} if registers else {})


def contrast_heads():
    shapes = {}
    for name in ("audio", "visual"):
        for index in (0, 1):
            shapes |= block(f"constrative_head_{name}.{index}", DIM)
    return shapes


def sync_classifier_shapes(width=2 * DIM):
    shapes = encoder_shapes() | sync_tokens() | {"cls_cls_token": (1, 1, width)}
    shapes |= block("classifier_layers.0", width) | block("classifier_layers.1", width)
    shapes |= norm_shapes("classifier_norm", width)
    return shapes | {"classifier_head.weight": (CLASSES, width), "classifier_head.bias": (CLASSES,)}


def formula_weights(shapes):
    """Sorted by name, tensor j, element k: 0.2 sin(12.9898 k + 78.233 j), + 1 for norm weights."""
    state = {}
    for j, name in enumerate(sorted(shapes, key=str.encode)):
        if "pos_embed" in name:
            grid = AUDIO_GRID if name.endswith("_a") else VIDEO_GRID
            table = sincos_positions(shapes[name][-1], grid)
            state[name] = table.float().double()[None]  # published tables are stored in fp32
            continue
        k = torch.arange(torch.Size(shapes[name]).numel(), dtype=torch.float64)
        values = 0.2 * torch.sin(12.9898 * k + 78.233 * j)
        if len(shapes[name]) == 1 and name.endswith("weight"):
            values += 1.0
        state[name] = values.view(shapes[name])
    return state
