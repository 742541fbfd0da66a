"""`build_model`: names, presets, settings, errors, initial weights, sizes."""

import pytest
import torch
from torch import nn

from kdcmae_fast.convert.keys import is_dead
from kdcmae_fast.convert.published import published_state
from kdcmae_fast.models import Batch, build_model
from kdcmae_fast.models.blocks import hidden_width
from kdcmae_fast.models.positions import sincos_positions


@pytest.fixture
def shapes_only():
    """Models whose tensors have no storage, for counting."""
    with torch.device("meta"):
        yield


def test_published_size_of_the_base_model(shapes_only):
    model = build_model("cav_mae", "base")
    published = published_state(model)
    assert len(published) == 647
    assert sum(tensor.numel() for tensor in published.values()) == 191_036_160
    trainable = {key: t for key, t in published.items() if "pos_embed" not in key}
    assert sum(tensor.numel() for tensor in trainable.values()) == 190_129_920
    dead = sum(tensor.numel() for key, tensor in trainable.items() if is_dead(key))
    assert dead == 2 * 11 * 8 * 768 + 8 * 8 * 512
    assert sum(p.numel() for p in model.parameters()) == 190_129_920 - dead


def test_published_size_of_the_fine_tuned_model(shapes_only):
    published = published_state(build_model("cav_mae_classifier", num_classes=527))
    assert len(published) == 478
    assert sum(tensor.numel() for tensor in published.values()) == 164_907_023


@pytest.mark.parametrize("preset, dim, depth", [("small", 384, 11), ("large", 1024, 23)])
def test_presets(shapes_only, preset, dim, depth):
    model = build_model("kdc_mae", preset)
    assert model.config.embed_dim == dim and len(model.encoder.audio.blocks) == depth
    assert model.config.num_views == 2 and model.config.distill.on == "joint"
    assert model.name == "kdc_mae" and model.contrast_group is None


def test_distill_changes_only_the_given_fields(shapes_only):
    distill = build_model("kdc_mae", "tiny", distill={"divergence": "js"}).config.distill
    assert (distill.on, distill.divergence, distill.distribution) == ("joint", "js", "softmax")
    assert build_model("kdc_mae", "tiny", distill={"on": "off"}).config.distill.on == "off"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"name": "cavmae"},
            "name='cavmae' is not one of cav_mae, kdc_mae, cav_mae_sync, cav_",
        ),
        ({"preset": "huge"}, "preset='huge' is not one of tiny, small, base, large"),
        ({"embed_size": 3}, "embed_size: unknown setting"),
        ({"views": "both"}, "views='both'"),
        ({"num_views": "2"}, "num_views='2'"),
        ({"distill": {"on": "all"}}, "distill.on='all'"),
        ({"distill": {"where": "joint"}}, "distill.where: unknown setting"),
        ({"distill": {"on": "joint"}}, "num_views=1"),
        ({"embed_dim": 100}, "embed_dim=100"),
        ({"num_views": 5}, "num_views=5: 5 complementary views of 128 audio tokens"),
        ({"num_classes": 3}, "num_classes=3 does not apply to cav_mae"),
        ({"name": "cav_mae_classifier"}, "num_classes is missing"),
        ({"name": "cav_mae_classifier", "num_classes": 0}, "num_classes=0 must be at least 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError) as caught:
        build_model(**({"name": "cav_mae", "preset": "tiny"} | arguments))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_initial_weights(small):
    model = small(embed_dim=96, num_heads=4).float()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
            assert (module.weight == 1).all() and not module.bias.any(), name
    patch = model.encoder.video.patch_embed
    bound = (6 / (96 + 3 * 64)) ** 0.5
    assert 0.9 * bound < patch.weight.abs().max() <= bound
    assert 0 < patch.bias.abs().max() <= (3 * 64) ** -0.5
    vectors = [model.decoder.mask_token, patch.modality, model.decoder.audio_modality]
    assert 0.01 < torch.cat([v.flatten() for v in vectors]).std() < 0.03


def test_a_ratio_read_from_weights_gives_their_width_back():
    for dim in range(4, 1600, 60):
        for hidden in range(dim, 4 * dim, 7):
            assert hidden_width(dim, hidden / dim) == hidden


def test_positions_put_the_column_first():
    table = sincos_positions(8, (3, 5))
    assert table.shape == (15, 8) and table.dtype == torch.float64
    row, column, omega = 2, 4, torch.tensor([1.0, 0.01]).double()
    expected = [
        (column * omega).sin(),
        (column * omega).cos(),
        (row * omega).sin(),
        (row * omega).cos(),
    ]
    torch.testing.assert_close(table[row * 5 + column], torch.cat(expected))
    with pytest.raises(ValueError, match="dim=6 must be a multiple of 4"):
        sincos_positions(6, (2, 2))


def test_classifier_modes_read_only_what_they_need(small, batch):
    model = small("cav_mae_classifier", num_classes=7)
    fbank, frames = batch.fbank, batch.frames
    assert model(fbank, frames).shape == (5, 7)
    torch.testing.assert_close(model(fbank, frames, "audio"), model(fbank=fbank, mode="audio"))
    torch.testing.assert_close(
        model(fbank, frames, "missing_audio"), model(frames=frames, mode="missing_audio")
    )
    with pytest.raises(ValueError, match="mode='multimodal' needs frames, got None"):
        model(fbank)
    with pytest.raises(ValueError, match="mode='both' is not one of multimodal, audio"):
        model(fbank, frames, mode="both")


def test_classifier_takes_no_clips_and_refuses_no_frames(small, batch):
    model = small("cav_mae_classifier", num_classes=7)
    clips = len(batch.fbank)
    logits = model(batch.fbank[:0], batch.frames[:0])
    assert logits.shape == (0, 7)
    logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="frames has 0 frames of each clip"):
        model(batch.fbank, batch.frames[:, None][:, :0])
    with pytest.raises(ValueError, match=f"frames has {clips - 1} clips, fbank has {clips}"):
        model(batch.fbank, batch.frames[1:])


def test_classifier_trains_its_positions(small, batch):
    model = small("cav_mae_classifier", num_classes=3)
    for mode in ("multimodal", "audio", "video"):
        model(batch.fbank, batch.frames, mode).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert model.encoder.audio.patch_embed.pos_embed.grad.abs().sum() > 0


def test_default_sizes_take_published_inputs():
    model = build_model("kdc_mae", "tiny")
    frames = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    batch = Batch(torch.zeros(1, 1024, 128), frames, torch.tensor([0]))
    plans = model.reconstruct(batch).plans
    assert (plans["audio"].num_tokens, plans["audio"].len_keep) == (512, 128)
    assert (plans["video"].num_tokens, plans["video"].len_keep) == (196, 49)
