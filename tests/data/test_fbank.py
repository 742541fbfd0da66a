"""The filterbank against stored numbers, an independent implementation and its own definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdcmae_fast.data.fbank import (
    LOG_FLOOR,
    kaldi_fbank,
    mel_filters,
    num_fbank_frames,
    remove_mean,
)
from kdcmae_fast.data.media import MediaOptions, finish_waveform
from kdcmae_fast.data.resample import resample

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "fbank" / "fbank.safetensors")
CASES = sorted(name.removesuffix(".fbank") for name in GOLDEN if name.endswith(".fbank"))

CHIRP = "chirp_16k"


def golden_input(case: str) -> tuple[torch.Tensor, int]:
    if case.endswith(".resampled_16k"):
        return GOLDEN[case], 16_000
    return GOLDEN[f"{case}.waveform"], int(GOLDEN[f"{case}.rate"])


def assert_close(fbank: torch.Tensor, expected: torch.Tensor) -> None:
    assert fbank.shape == expected.shape
    error = (fbank.double() - expected.double()).abs()
    assert error.max() < 1e-3 and error.mean() < 2e-5, f"{error.max()=} {error.mean()=}"


def kaldi_native(waveform: np.ndarray, rate: int) -> torch.Tensor:
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.window_type = "hanning"
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 128
    options.mel_opts.low_freq = 20
    options.mel_opts.high_freq = 0
    options.use_energy = False
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(rate, waveform.tolist())
    fbank.input_finished()
    return torch.from_numpy(np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)]))


@pytest.mark.parametrize("case", [c for c in CASES if c != CHIRP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden(case, dtype):
    waveform, rate = golden_input(case)
    fbank = kaldi_fbank(remove_mean(waveform.to(dtype)), sample_rate=rate)
    assert fbank.dtype == dtype
    assert_close(fbank[0], GOLDEN[f"{case}.fbank"])


def test_golden_of_a_pure_tone():
    """Between its partials float32 itself loses more than 1e-3, and each FFT loses its own."""
    waveform, rate = golden_input(CHIRP)
    exact = kaldi_fbank(remove_mean(waveform.double()), sample_rate=rate)[0]
    stored = (GOLDEN[f"{CHIRP}.fbank"].double() - exact).abs()
    ours = (kaldi_fbank(remove_mean(waveform), sample_rate=rate)[0].double() - exact).abs()
    assert ours.max() < 2 * stored.max() and ours.mean() < 2 * stored.mean()
    assert stored.mean() < 2e-4  # where the tone is, all three agree
    loud = exact > -8
    assert ours[loud].max() < 1e-3 and stored[loud].max() < 1e-3


def test_golden_through_our_resampling():
    resampled = resample(GOLDEN["noise_44k.waveform"], 44_100)
    torch.testing.assert_close(resampled, GOLDEN["noise_44k.resampled_16k"], atol=2e-6, rtol=0)
    assert_close(kaldi_fbank(remove_mean(resampled))[0], GOLDEN["noise_44k.resampled_16k.fbank"])


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("seconds", [0.4, 3.0, 30.0])
def test_equals_kaldi_native_fbank(rate, seconds, real_like_sound):
    waveform = resample(torch.from_numpy(real_like_sound(seconds, rate)), rate)[None]
    waveform = remove_mean(waveform)
    assert_close(kaldi_fbank(waveform)[0], kaldi_native(waveform[0].numpy(), 16_000))


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("channel", ["first", "mean"])
def test_stereo_equals_kaldi_native_fbank(rate, channel, real_like_sound):
    """From two channels of a file to rows: the channel is chosen before the resampling."""
    channels = np.stack([real_like_sound(2.0, rate, seed) for seed in (0, 1)])
    options = MediaOptions(1024, 64, 10, channel, True)
    waveform = finish_waveform(channels, rate, options)
    chosen = channels[0] if channel == "first" else channels.mean(0)
    torch.testing.assert_close(waveform, resample(torch.from_numpy(chosen), rate))
    waveform = remove_mean(waveform[None])
    assert_close(kaldi_fbank(waveform)[0], kaldi_native(waveform[0].numpy(), 16_000))


@pytest.mark.parametrize("num_rows", [1, 40, 98, 130])
def test_rows_are_cut_or_filled_up(num_rows):
    lengths = torch.tensor([16_000, 9000])
    waveforms = torch.randn(2, 16_000) * 0.1 + 0.3
    waveforms *= torch.arange(16_000) < lengths[:, None]
    whole = kaldi_fbank(remove_mean(waveforms, lengths), lengths)
    rows = kaldi_fbank(waveforms, lengths, num_rows=num_rows, center=True)
    assert rows.shape == (2, num_rows, 128)
    kept = min(num_rows, whole.shape[1])
    torch.testing.assert_close(rows[:, :kept], whole[:, :kept], atol=2e-4, rtol=1e-5)
    assert not rows[:, kept:].any()


@pytest.mark.parametrize("bins", [1, 5, 23, 128])
def test_any_number_of_mel_bins(bins):
    """The filters are multiplied in blocks; 23 does not divide into equal ones."""
    waveforms = torch.randn(1, 4000, dtype=torch.float64) * 0.1
    filters = mel_filters(16_000, bins, 20.0, 8000.0, torch.float64)
    window = torch.hann_window(400, periodic=False, dtype=torch.float64)
    frames = waveforms[0].unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    frames = torch.cat([frames[:, :1] * 0.03, frames[:, 1:] - 0.97 * frames[:, :-1]], 1)
    power = torch.fft.rfft(frames * window, n=512).abs() ** 2
    expected = (power @ filters).clamp(min=LOG_FLOOR).log()
    torch.testing.assert_close(kaldi_fbank(waveforms, num_mel_bins=bins)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silence_is_the_floor(dtype):
    fbank = kaldi_fbank(torch.zeros(1, 8000, dtype=dtype))
    torch.testing.assert_close(fbank, torch.full_like(fbank, LOG_FLOOR).log())


def test_is_the_textbook_definition():
    """Frame by frame, straight from the definition, in float64."""
    waveform = torch.randn(1600, dtype=torch.float64) * 0.1
    window = torch.hann_window(400, periodic=False, dtype=torch.float64)
    filters = mel_filters(16_000, 128, 20.0, 8000.0, torch.float64)
    expected = []
    for start in range(0, 1600 - 399, 160):
        frame = waveform[start : start + 400]
        frame = frame - frame.mean()
        frame = frame - 0.97 * torch.cat([frame[:1], frame[:-1]])
        spectrum = torch.fft.rfft(frame * window, n=512).abs() ** 2
        expected.append((spectrum @ filters).clamp(min=LOG_FLOOR).log())
    torch.testing.assert_close(kaldi_fbank(waveform[None])[0], torch.stack(expected))


def test_batch_and_lengths_equal_single_clips():
    lengths = torch.tensor([16_000, 7000, 400, 399])
    waveforms = torch.randn(4, 16_000) * 0.1 + 0.05
    waveforms *= torch.arange(16_000) < lengths[:, None]
    batch = kaldi_fbank(remove_mean(waveforms, lengths), lengths)
    for row, length in zip(range(3), lengths.tolist(), strict=False):
        rows = num_fbank_frames(length)
        alone = kaldi_fbank(remove_mean(waveforms[row : row + 1, :length]))[0]
        torch.testing.assert_close(batch[row, :rows], alone, atol=2e-4, rtol=1e-5)
        assert not batch[row, rows:].any()
    assert not batch[3].any()


def test_many_clips_in_one_call_equal_one_by_one():
    waveforms = torch.randn(5, 90_000) * 0.1  # more rows than are computed together
    together = kaldi_fbank(waveforms)
    torch.testing.assert_close(together, torch.cat([kaldi_fbank(w[None]) for w in waveforms]))


def test_row_counts():
    assert num_fbank_frames(160_000) == 998
    assert num_fbank_frames(399) == 0
    assert kaldi_fbank(torch.randn(1, 160_000)).shape == (1, 998, 128)


def test_input_is_not_written_to():
    waveforms = torch.randn(2, 4000)
    before = waveforms.clone()
    kaldi_fbank(remove_mean(waveforms, torch.tensor([4000, 3000])), torch.tensor([4000, 3000]))
    assert torch.equal(waveforms, before)


@pytest.mark.parametrize(
    ("waveforms", "options", "message"),
    [
        (torch.zeros(1, 399), {}, "399 samples"),
        (torch.zeros(4000), {}, r"\(4000,\)"),
        (torch.zeros(1, 4000, dtype=torch.int16), {}, "int16"),
        (torch.zeros(1, 4000), {"high_freq": 9000.0}, "high_freq=9000.0"),
        (torch.zeros(1, 4000), {"num_mel_bins": 0}, "num_mel_bins=0"),
        (torch.zeros(1, 4000), {"sample_rate": 16}, "sample_rate=16"),
    ],
)
def test_errors(waveforms, options, message):
    with pytest.raises(ValueError, match=message):
        kaldi_fbank(waveforms, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu():
    waveforms = torch.randn(4, 16_000) * 0.1
    lengths = torch.tensor([16_000, 9000, 16_000, 500])
    ours = kaldi_fbank(waveforms.cuda(), lengths.cuda()).cpu()
    torch.testing.assert_close(ours, kaldi_fbank(waveforms, lengths), atol=1e-3, rtol=1e-4)
