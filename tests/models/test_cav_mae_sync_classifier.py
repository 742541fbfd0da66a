"""The classifier of CAV-MAE Sync."""

import pytest
import torch

from kdcmae_fast.models import from_pretrained

NAME = "cav_mae_sync_classifier"


@pytest.fixture
def clips(batch):
    """Two clips of two frames."""
    return batch.fbank[:4].unflatten(0, (2, 2)), batch.frames[:4].unflatten(0, (2, 2))


@pytest.fixture
def classifier(small):
    return lambda **options: small(
        NAME, **({"num_classes": 7, "classifier_heads": 4, "num_registers": 2} | options)
    )


@pytest.mark.parametrize("used", ["multimodal", "audio", "video"])
@pytest.mark.parametrize("cls_token", [True, False])
def test_inputs(classifier, clips, used, cls_token):
    fbank, frames = clips
    model = classifier(classifier_input=used, cls_token=cls_token)
    logits = model(fbank, frames)
    assert logits.shape == (2, 7)
    only = {"audio": {"fbank": fbank}, "video": {"frames": frames}}
    if used != "multimodal":
        assert torch.equal(model(**only[used]), logits)
    one_clip = model(fbank[:1], frames[:1])
    torch.testing.assert_close(one_clip, logits[:1])
    turned = model(fbank.flip(1), frames.flip(1))  # frames carry no position
    torch.testing.assert_close(turned, logits)
    assert model(fbank[:, :1], frames[:, :1]).shape == (2, 7)


def test_what_is_trained(classifier, clips):
    model = classifier()
    model(*clips).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {n for n, _ in model.named_parameters() if n.startswith("encoder.shared.")}
    assert model.encoder.audio.patch_embed.pos_embed.grad.abs().sum() > 0


def test_errors(small, classifier, clips):
    fbank, frames = clips
    model = classifier()
    with pytest.raises(ValueError, match="classifier_input='multimodal' needs frames, got None"):
        model(fbank)
    with pytest.raises(ValueError, match=r"fbank must be \(B, T, audio_length, F\), got"):
        model(fbank[0], frames)
    with pytest.raises(ValueError, match="differ in clips and frames per clip"):
        model(fbank[:, :1], frames)
    with pytest.raises(ValueError, match="fbank has 0 frames of each clip"):
        model(fbank[:, :0], frames[:, :0])
    assert model(fbank[:0], frames[:0]).shape == (0, 7)
    with pytest.raises(ValueError, match="num_classes is missing"):
        small(NAME)
    with pytest.raises(ValueError, match="classifier_heads=5: expected a divisor of the width 48"):
        classifier(classifier_heads=5)
    with pytest.raises(ValueError, match="cav_mae_sync_classifier reads CLS tokens"):
        small("cav_mae_classifier", num_classes=3, cls_token=True)


def test_save_then_load(classifier, clips, tmp_path):
    model = classifier(classifier_input="video")
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.num_classes == 7 and loaded.config == model.config
    assert torch.equal(loaded(frames=clips[1]), model(frames=clips[1]))
