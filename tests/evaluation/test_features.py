"""Features: one per readable clip, in order, whatever the batches; bad clips named."""

import dataclasses

import pytest
import torch

from kdcmae_fast.data import FrontEnd, TooManyBadClips
from kdcmae_fast.data.loader import collate
from kdcmae_fast.evaluation import extract_features


@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_clip_once_in_order(model, clips, data, num_workers):
    data = dataclasses.replace(data, num_workers=num_workers)
    dataset = clips()
    found = extract_features(model, dataset, data, num_clips=7, batch_size=3)
    assert found.sample_ids.tolist() == list(range(7))
    assert found.video_ids == tuple(dataset.video_id(index) for index in range(7))
    batch = FrontEnd(data, model.config)(collate([dataset.read(index, 0) for index in range(7)]))
    with torch.no_grad():
        expected = model.encode(fbank=batch.fbank, frames=batch.frames)
    torch.testing.assert_close(found.audio, expected.audio, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.video, expected.video, rtol=1e-5, atol=1e-5)
    assert found.bad == ()
    assert found.labels.min() >= 0


def test_bad_clips_are_left_out_and_named(model, clips, data):
    data = dataclasses.replace(data, max_bad_share=0.5)
    found = extract_features(model, clips(bad=(0, 4, 5, 6)), data, num_clips=8, batch_size=3)
    assert found.sample_ids.tolist() == [1, 2, 3, 7]
    assert len(found.audio) == len(found.video) == len(found.video_ids) == 4
    assert [clip.reason for clip in found.bad] == ["the file ends early"] * 4
    assert found.bad[0].video_id == clips().video_id(0)


def test_too_many_bad_clips_stop(model, clips, data):
    dataset = clips(bad=tuple(range(40)))
    with pytest.raises(TooManyBadClips, match="the file ends early"):
        extract_features(model, dataset, data, num_clips=60, batch_size=8)


def test_no_readable_clip_is_an_error(model, clips, data):
    data = dataclasses.replace(data, max_bad_share=1.0)
    with pytest.raises(ValueError, match="none of the 2 clips could be used"):
        extract_features(model, clips(bad=(0, 1)), data, num_clips=2)


def test_training_mode_is_put_back(make_model, clips, data):
    model = make_model().train()
    extract_features(model, clips(), data, num_clips=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clips": 5000}, "num_clips=5000: the dataset has 1000"),
        ({"batch_size": 0}, "at least"),
    ],
)
def test_bad_arguments_are_named(model, clips, data, change, message):
    with pytest.raises(ValueError, match=message):
        extract_features(model, clips(), data, **change)
