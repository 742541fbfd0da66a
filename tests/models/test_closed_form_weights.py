"""The published models on weights and inputs given by formulas: figures known to nine digits."""

import pytest
import torch
from safetensors.torch import save_file

from kdcmae_fast.convert import load_published
from kdcmae_fast.kernels import complementary_masks
from kdcmae_fast.models import Batch
from kdcmae_fast.models.positions import sincos_positions

DIM, DECODER_DIM, CLASSES = 48, 32, 5
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


@pytest.fixture(scope="module")
def clips():
    b, t, f = torch.arange(3.0).double(), torch.arange(96).double(), torch.arange(128).double()
    b = b[:, None, None]
    fbank = torch.sin(0.05 * t[:, None] * (1 + 0.3 * b) + 0.1 * f + b)
    b, c = b[..., None], torch.arange(3).double()[:, None, None]
    y, x = torch.arange(224).double()[:, None], torch.arange(224).double()
    frames = torch.cos(0.02 * (c + 1) * y * (1 + 0.2 * b) + 0.03 * x + b)
    return Batch(fbank, frames, torch.arange(3))


def load(tmp_path, shapes, **overrides):
    path = tmp_path / "formula.safetensors"
    save_file(formula_weights(shapes), path)
    return load_published(path, **HEADS, **overrides)


def near(value, expected):
    torch.testing.assert_close(
        value.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7
    )


def test_pretraining_losses(tmp_path, clips):
    shapes = pretrained_shapes()
    assert len(shapes) == 527
    model = load(tmp_path, shapes)
    assert model.config.audio_length == 96
    plans = {}
    for name, grid in (("audio", AUDIO_GRID), ("video", VIDEO_GRID)):
        tokens = grid[0] * grid[1]
        noise = (5 * torch.arange(tokens) % tokens).double().expand(3, -1)
        plans[name] = complementary_masks(clips.sample_ids, grid, 0.75, num_views=1, noise=noise)
    losses = model(clips, plans)
    near(losses.total, 8.564477177)
    near(losses.mae_audio, 6.122032910)
    near(losses.mae_video, 2.431458745)
    near(0.01 * losses.contrastive, 0.010985522)


def test_features(tmp_path, clips):
    features = load(tmp_path, pretrained_shapes()).encode(clips.fbank[:1], clips.frames[:1])
    near(features.audio[0, :3], [-0.15171919, -0.14671526, -0.22349150])
    near(features.video[0, :3], [0.11039357, -0.43557941, -0.26667098])


def test_classifier(tmp_path, clips):
    shapes = classifier_shapes()
    assert len(shapes) == 478
    model = load(tmp_path, shapes)
    first = Batch(*(tensor[:1] for tensor in clips))
    logits = [2.18432368, -3.98634257, -2.96147118, 3.27247809, 3.33289962]
    near(model(first.fbank, first.frames)[0], logits)
    near(model(fbank=first.fbank, mode="audio")[0, 0], 3.23493463)
    near(model(frames=first.frames, mode="video")[0, 0], 2.8450735)
    near(model(fbank=first.fbank, mode="missing_video")[0, 0], 3.02442246)
    near(model(frames=first.frames, mode="missing_audio")[0, 0], 2.44980084)
