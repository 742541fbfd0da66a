"""Models of sound alone or of pictures alone: the other branch is not there in any form."""

import pytest
import torch

from kdcmae_fast.convert import export_published
from kdcmae_fast.models import Batch, build_model, from_pretrained
from kdcmae_fast.models.masking import draw_plans

SIZES = {
    "audio_length": 64,
    "num_mel_bins": 32,
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "num_heads": 3,
    "modality_depth": 1,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
IDS = torch.arange(3)


def make(modalities: str, name: str = "kdc_mae", **overrides):
    torch.manual_seed(0)
    return build_model(name, "tiny", modalities=modalities, **{**SIZES, **overrides})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(3, 64, 32, generator=generator),
        torch.randn(3, 3, 32, 32, generator=generator),
        IDS,
    )


def only(batch: Batch, modality: str, nothing) -> Batch:
    other = {"audio": "frames", "video": "fbank"}[modality]
    return batch._replace(**{other: nothing})


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_losses_and_parameters_are_the_modalitys_own(batch, modality):
    model = make(modality)
    losses = model(batch)
    assert set(losses) == {"total", f"mae_{modality}", "kd"}
    assert set(losses.per_view[0]) == {f"mae_{modality}"}
    losses.total.backward()
    other = {"audio": "video", "video": "audio"}[modality]
    names = [name for name, _ in model.named_parameters()]
    assert not any(other in name or "joint" in name for name in model.state_dict())
    assert len(names) < len(list(make("both").parameters()))
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []  # nothing is carried along that is not trained


@pytest.mark.parametrize("modality", ["audio", "video"])
@pytest.mark.parametrize("views", ["complementary", "independent"])
def test_the_other_tensor_is_not_read(batch, modality, views):
    model = make(modality, views=views)
    whole = model(batch, step=3)
    for nothing in (None, torch.empty(3, 3, 0, 0), torch.full((3, 5), float("nan"))):
        alone = model(only(batch, modality, nothing), step=3)
        assert all(torch.equal(alone[name], whole[name]) for name in whole)


def test_masks_are_those_that_a_model_of_both_draws(batch):
    both, alone = make("both"), make("audio")
    plans = draw_plans(alone.config, IDS, 5)
    assert set(plans) == {"audio"}
    expected = draw_plans(both.config, IDS, 5)["audio"].token_of_rank
    assert torch.equal(plans["audio"].token_of_rank, expected)


def test_equals_the_sound_of_a_model_of_both_with_the_same_weights(batch):
    """Streams, shared blocks under the modality's norms, and pooling are the same ones."""
    both, alone = make("both"), make("audio")
    weights = both.state_dict()
    alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
    assert torch.equal(alone.encode(fbank=batch.fbank).audio, both.encode(fbank=batch.fbank).audio)


def test_distillation_is_between_the_views_of_the_sound(batch):
    model = make("audio", kd_loss_weight=1.0)
    latents = model.encoder(batch.fbank, None, draw_plans(model.config, IDS, 0), ("audio",)).audio
    p, q = latents.mean(dim=1).softmax(dim=-1).log().chunk(2)

    def divergence(a, b):
        return (a.exp() * (a - b)).sum(dim=-1).mean()

    expected = (divergence(p, q) + divergence(q, p)) / 2
    torch.testing.assert_close(model(batch).kd, expected, atol=1e-7, rtol=1e-4)
    apart = make("audio", distill={"on": "joint+modality"})
    assert torch.equal(apart(batch).kd, model(batch).kd)  # one modality: the same tokens


def test_reconstruction_has_no_patches_of_the_other(batch):
    found = make("audio").reconstruct(only(batch, "audio", None))
    assert found.audio.shape == (6, 32, 64) and found.video.shape == (6, 0, 192)
    assert set(found.plans) == {"audio"}


def test_saved_and_loaded(batch, tmp_path):
    model = make("audio")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config.modalities == "audio"
    assert torch.equal(again(batch).total, model(batch).total)


def test_what_is_not_there_is_refused_in_one_line(batch):
    model = make("audio")
    with pytest.raises(ValueError, match="this needs video, and the model has none") as caught:
        model.encode(frames=batch.frames)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="this needs audio"):
        make("video").encode(fbank=batch.fbank)
    with pytest.raises(ValueError, match="this needs video, and these clips have none"):
        make("both").encode(frames=torch.empty(3, 3, 0, 0))
    with pytest.raises(ValueError, match="plans must have the keys audio, got"):
        model(batch, draw_plans(make("both").config, IDS, 0))
    with pytest.raises(ValueError, match="modalities=audio: CLS and registers"):
        make("audio", name="cav_mae_sync")
    with pytest.raises(ValueError, match="modalities=audio: published files are of models of both"):
        export_published(model, "model.pth")
    with pytest.raises(ValueError, match="modalities=audio: cav_mae_classifier is built on both"):
        make("audio", name="cav_mae_classifier", num_classes=3)
    with pytest.raises(ValueError, match="mae_loss_weight=0"):
        make("audio", name="cav_mae", mae_loss_weight=0.0)


def test_shortcuts_of_execution_change_nothing(batch):
    whole = make("audio", packed_shared=False, decoder_masked_only=False).double()
    short = make("audio", mask_token_table=True).double()
    batch = batch._replace(fbank=batch.fbank.double())
    torch.testing.assert_close(short(batch).total, whole(batch).total, atol=1e-12, rtol=0)
