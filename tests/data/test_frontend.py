"""Raw batches become model batches."""

import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import FrontEnd, RawBatch, kaldi_fbank, remove_mean

MODEL = ModelConfig(audio_length=64, num_mel_bins=32)


def raw_batch(lengths: list[int]) -> RawBatch:
    waveforms = torch.randn(len(lengths), max(lengths)) * 0.1 + 0.2
    waveforms *= torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    size = len(lengths)
    return RawBatch(
        waveforms=waveforms,
        lengths=torch.tensor(lengths),
        frames=torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8),
        sample_ids=torch.arange(size) + 7,
        labels=torch.full((size,), -1),
    )


@pytest.mark.parametrize("lengths", [[20_000, 6000, 400], [7000, 6400]])
def test_rows_padding_and_normalisation(lengths):
    raw = raw_batch(lengths)
    data = DataConfig(dataset_mean=-4.0, dataset_std=2.0)
    batch = FrontEnd(data, MODEL)(raw)
    assert batch.fbank.shape == (len(lengths), 64, 32)
    for row, length in enumerate(lengths):
        alone = remove_mean(raw.waveforms[row : row + 1, :length])
        fbank = kaldi_fbank(alone, num_mel_bins=32)[0, :64]
        torch.testing.assert_close(
            batch.fbank[row, : len(fbank)], (fbank + 4) / 2, atol=2e-4, rtol=1e-5
        )
        # Zeros after the log, not silence: (0 - mean) / std.
        assert (batch.fbank[row, len(fbank) :] == 2).all()


def test_padding_value_of_the_published_statistics():
    batch = FrontEnd(DataConfig(), MODEL)(raw_batch([4000]))
    assert batch.fbank[0, -1, 0].item() == pytest.approx(1.1329, abs=1e-4)


def test_frames_and_ids_pass_through():
    raw = raw_batch([8000, 8000])
    batch = FrontEnd(DataConfig(), MODEL)(raw, "cpu")
    assert torch.equal(batch.frames, raw.frames) and batch.frames.dtype == torch.uint8
    assert torch.equal(batch.sample_ids, raw.sample_ids)


def test_std_must_be_positive():
    with pytest.raises(ValueError, match="dataset_std=0"):
        FrontEnd(DataConfig(dataset_std=0.0), MODEL)
