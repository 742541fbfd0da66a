"""CAV-MAE Sync on weights and inputs given by formulas: figures known to nine digits, in fp64."""

import math

import pytest
import torch

from kdcmae_fast.kernels import info_nce


@pytest.fixture
def shapes(published):
    return published.pretrained_shapes() | published.sync_tokens()


def test_keys(published, shapes):
    names = sorted(shapes, key=str.encode)
    assert len(names) == 530
    assert names.index("cls_token_a") == 460 and names.index("register_tokens") == 529


def test_pretraining_losses(load, shapes, formula_plans, clips, near):
    model = load(shapes)
    assert model.name == "cav_mae_sync" and model.config.audio_length == 96
    assert model.config.contrast_loss_weight == 0.1
    losses = model(clips, formula_plans)
    near(losses.total, 7.093862498)
    near(losses.mae_audio, 4.420012642)
    near(losses.mae_video, 2.563988758)
    near(0.1 * losses.contrastive, 0.109861098)


def test_without_pixel_norm(load, shapes, formula_plans, clips, near):
    losses = load(shapes, norm_pix_loss=False)(clips, formula_plans)
    near(losses.total, 6.094881978)
    near(losses.mae_audio, 3.923903191)
    near(losses.mae_video, 2.061117689)


def test_global_local(load, shapes, formula_plans, clips, near):
    model = load(shapes, global_local=True)
    losses = model(clips, formula_plans)
    near(losses.total, 7.093860287)
    near(0.1 * losses.contrastive, 0.109858888)
    audio, video = model(clips, formula_plans, features_only=True)
    assert audio.shape == video.shape == (3, 2 * 48)
    near(0.1 * info_nce(audio[:, :48], video[:, :48]), 0.109861098)  # CLS
    near(0.1 * info_nce(audio[:, 48:], video[:, 48:]), 0.109856677)  # patches


def test_contrast_heads(load, published, shapes, formula_plans, clips, near):
    model = load(shapes | published.contrast_heads())
    assert model.config.contrast_head_depth == 2
    losses = model(clips, formula_plans)
    near(losses.total, 8.608395691)
    near(0.1 * losses.contrastive, 0.109860785)


def test_features(load, shapes, clips, near):
    features = load(shapes).encode(clips.fbank, clips.frames)
    assert features.audio_tokens.shape == (3, 48, 48)
    assert features.video_tokens.shape == (3, 196, 48)
    near(features.audio[0, :4], [-0.23807699, -0.19986845, -0.12563863, 0.61115457])
    near(features.video[2, :4], [-0.06432139, -0.56864791, -0.27599387, 0.94677194])
    near(features.audio_tokens[1, 5, :3], [-0.22678516, -0.19257988, -0.16535979])
    near(features.video_tokens[1, 100, :3], [-0.00551454, -0.54673972, -0.26882727])
    cosines = torch.cosine_similarity(features.audio[:1], features.video)
    near(cosines, [0.93133636, 0.93183962, 0.93152900])
    near(info_nce(features.audio, features.video), 1.098613039)
    near(info_nce(features.audio, features.video, symmetric=True), 1.098616688)


def test_classifier(load, published, clips, near):
    model = load(published.sync_classifier_shapes(), classifier_heads=12)
    assert model.name == "cav_mae_sync_classifier" and model.num_classes == 5
    logits = model(clips.fbank[None], clips.frames[None])  # one clip of three frames
    assert logits.shape == (1, 5)
    near(logits[0], [-2.25882172, 2.29854545, -2.71835046, 2.36975424, -2.69032945])


def test_infonce_of_matched_orthonormal_features(near):
    size = 7
    features = torch.eye(size, dtype=torch.float64)
    near(info_nce(features, features), math.log(1 + (size - 1) * math.exp(-20)))
