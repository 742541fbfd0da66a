"""Maps of a model against loops and known sums; how maps are scaled and fused."""

import pytest
import torch
from torch.nn import functional as F

from kdcmae_fast.batch import Batch
from kdcmae_fast.evaluation import attribution_maps, similarity_maps
from kdcmae_fast.evaluation.attribution import BLURS, References, path_attribution
from kdcmae_fast.evaluation.localization_maps import (
    blur,
    colour_maps,
    fuse,
    fusion_weights,
    min_max,
    normalized,
    upsample,
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 3, 32, 32), generator=g, dtype=torch.uint8)
    return Batch(torch.randn(3, 64, 32, generator=g), frames, torch.arange(3))


@pytest.fixture(scope="module")
def references(model) -> References:
    g = torch.Generator().manual_seed(1)
    return References(
        torch.randn(3, 3, 32, 32, generator=g), torch.randn(3, 16, generator=g), torch.arange(3)
    )


@pytest.mark.parametrize("name", ["kdc_mae", "cav_mae_sync"])
def test_cosine_of_each_token(make_model, batch, name):
    model = make_model(name)
    maps = similarity_maps(model, batch)
    assert maps.shape == (3, 2, 2)
    with torch.no_grad():
        features = model.encode(fbank=batch.fbank, frames=batch.frames)
    sound = features.audio if name == "cav_mae_sync" else features.audio_tokens.mean(1)
    for clip in range(3):
        for row in range(2):
            for column in range(2):
                token = features.video_tokens[clip, 2 * row + column]
                expected = F.cosine_similarity(sound[clip], token, dim=0)
                assert maps[clip, row, column] == pytest.approx(expected.item(), abs=1e-5)


def similarity(model, frames, sound):
    with torch.no_grad():
        return F.cosine_similarity(model.encode(frames=frames).video, sound, dim=-1)


def test_attribution_adds_up_to_the_similarity(model, batch, references):
    sound = references.sounds[:1].expand(3, -1)
    frames = normalized(model, batch.frames)
    starts = [(references.frames[0], torch.ones(3))] * 40
    maps = path_attribution(model, frames, sound[None], starts)
    gained = similarity(model, frames, sound) - similarity(model, references.frames[:1], sound)
    assert maps.shape == (1, 3, 32, 32)
    assert torch.allclose(maps[0].sum((1, 2)), gained, atol=0.02 * gained.abs().max().item())


def test_attribution_is_the_sum_of_both_kinds_of_paths(model, batch, references):
    """One clip, one sound, everything written out."""
    sound, patch = references.sounds[1], model.config.patch_size
    frame = normalized(model, batch.frames[:1])

    def mean_over_paths(starts):
        total = torch.zeros(32, 32)
        for k, start in enumerate(starts):
            share = ((k + 0.5) * (5**0.5 - 1) / 2) % 1
            point = (start + share * (frame - start)).requires_grad_()
            score = F.cosine_similarity(model.encode(frames=point).video, sound, dim=-1).sum()
            total += (torch.autograd.grad(score, point)[0] * (frame - start))[0].sum(0)
        return total / len(starts)

    blurred = [blur(frame, share * 32) for share in BLURS[:3]]
    kinds = [mean_over_paths(references.frames[:, None]), mean_over_paths(blurred)]
    evidence = sum(m / m.square().mean().sqrt() for m in kinds)
    evidence = torch.where(blur(evidence, patch / 4) > 0, blur(evidence, patch / 4), 0.0)
    maps = attribution_maps(model, batch.frames[:1], sound.expand(1, 1, -1), references)
    assert torch.allclose(maps[0, 0], blur(evidence, 0.75 * patch), rtol=1e-4, atol=1e-5)
    assert (maps >= 0).all() and maps.max() > 0


def test_attribution_of_an_even_picture_is_finite(model, references):
    frames = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)  # blurring changes nothing
    maps = attribution_maps(model, frames, references.sounds[None, :1], references)
    assert maps.isfinite().all() and maps.max() > 0


def test_attribution_of_each_clip_is_its_own(model, batch, references):
    sounds = references.sounds[None]
    indices = torch.tensor([7, 1, 8])
    maps = attribution_maps(model, batch.frames, sounds, references, indices=indices)[0]
    for clip in range(3):
        alone = attribution_maps(
            model,
            batch.frames[clip : clip + 1],
            sounds[:, clip : clip + 1],
            references,
            indices=indices[clip : clip + 1],
        )[0, 0]
        assert torch.allclose(maps[clip], alone, atol=1e-6)
    # Clip 1 is reference 1, whose picture and sound must not matter to it.
    other = references.frames.clone()
    other[1] = 5.0
    changed = attribution_maps(
        model, batch.frames, sounds, references._replace(frames=other), indices=indices
    )[0]
    assert torch.equal(changed[1], maps[1]) and not torch.allclose(changed[0], maps[0])


def test_several_sounds_are_explained_at_once(model, batch, references):
    sounds = torch.stack([references.sounds, references.sounds.roll(1, 0)])
    both = attribution_maps(model, batch.frames, sounds, references)
    for k in range(2):
        alone = attribution_maps(model, batch.frames, sounds[k : k + 1], references)
        assert torch.allclose(both[k], alone[0], atol=1e-6)
    assert not torch.allclose(both[0], both[1])


def test_scaling():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    large = upsample(maps, 5)
    assert large[0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [1, 2, 3, 5]
    assert large[0, 2, 2] == pytest.approx(2.75)  # corners aligned: the middle is the mean
    scaled = min_max(maps)
    assert scaled.min() == 0 and scaled.max() == 1 and scaled[0, 0, 1] == 0.25
    constant = torch.full((1, 2, 2), 3.0)
    assert torch.equal(min_max(constant), constant)
    assert torch.allclose(blur(torch.full((2, 9, 9), 0.7), 3.0), torch.tensor(0.7))
    point = torch.zeros(1, 21, 21)
    point[0, 10, 10] = 1
    spread = blur(point, 2.0)[0]
    assert spread.sum() == pytest.approx(1, abs=1e-5) and spread.argmax() == 10 * 21 + 10
    assert spread[10, 12] / spread[10, 10] == pytest.approx(0.6065, abs=1e-3)  # exp(-1/2)


def test_colour_contrast_finds_the_odd_one():
    frames = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    frames[0, 0, 4:10, 20:26] = 255
    assert divmod(colour_maps(frames)[0].argmax().item(), 32)[0] in range(4, 10)


def test_fusion_rules():
    a, b, c = (torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))
    for rule, priors, weights in (
        ("ezvsl", [b], (0.4, 0.6)),
        ("avl-flickr", [b, c], (1 / 3, 1 / 3, 1 / 3)),
        ("avl-vggss", [b], (1, 0.4)),
        ("alpha", [b], (0.7, 0.3)),
    ):
        assert fusion_weights(rule, 0.3) == pytest.approx(weights)
        expected = min_max(sum(w * min_max(m) for w, m in zip(weights, [a, *priors], strict=True)))
        assert torch.allclose(fuse([a, *priors], fusion_weights(rule, 0.3)), expected)
    with pytest.raises(ValueError, match="fusion='mean'"):
        fusion_weights("mean")
    with pytest.raises(ValueError, match=r"alpha=1.5"):
        fusion_weights("alpha", 1.5)
    with pytest.raises(ValueError, match="3 weights"):
        fuse([a, b], fusion_weights("avl-flickr"))


def test_a_prior_without_values_is_left_out():
    a, b, c = (torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))
    c[1] = float("nan")
    weights = fusion_weights("avl-flickr")
    fused = fuse([a, b, c], weights)
    assert torch.allclose(fused[0], fuse([a, b, c], weights, drop_nan=False)[0])
    assert torch.allclose(fused[1], min_max(min_max(a[1]) + min_max(b[1])), atol=1e-6)
    assert fuse([a, b, c], weights, drop_nan=False)[1].isnan().all()
