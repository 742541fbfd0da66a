"""Segments around frames: the published table, real times, cutting."""

import pytest
import torch

from kdcmae_fast.data.fbank import kaldi_fbank
from kdcmae_fast.data.segments import segment_starts, take_segments, timed_segment_starts

DISTINCT = {96: 16, 192: 15, 304: 13, 416: 11, 512: 9, 624: 9, 720: 7, 816: 5, 912: 3, 1024: 1}


def test_published_table():
    starts = [0] * 4 + [48, 112, 176, 240, 304, 368, 432, 496, 560] + [608] * 3
    assert segment_starts(16, 416) == tuple(starts)


@pytest.mark.parametrize("length", DISTINCT)
def test_every_published_length(length):
    starts = segment_starts(16, length)
    assert len(starts) == 16 and len(set(starts)) == DISTINCT[length]
    for frame, start in enumerate(starts):  # 64 rows apart, pushed inside at the ends
        free = 64 * frame - length // 2
        assert start == (0 if free < 0 else 1024 - length if free + length > 1024 else free)


def test_centres_round_half_to_even():
    # Frames 1 and 3 of 4 on 10 rows stand at 2.5 and 7.5; 16 rows never fit, so 26 and 32 do.
    assert segment_starts(4, 16, 106) == (0, round(26.5) - 8, 53 - 8, round(79.5) - 8)
    assert (round(26.5), round(79.5)) == (26, 80)


def test_real_times():
    seconds = torch.tensor([[0.0, 2.0, 4.0, 7.9], [0.0, 1.0, 1.5, 2.0]])
    starts = timed_segment_starts(seconds, 96, torch.tensor([798, 80]))
    assert starts.tolist() == [[0, 152, 352, 798 - 96], [0, 0, 0, 0]]
    assert starts.dtype == torch.int64
    # A clip of 8 s: the published map has its last frame in the padding, real times have not.
    assert max(segment_starts(4, 96)) > 798 - 96
    everywhere = timed_segment_starts(torch.tensor([[12.0]]), 96, 5000)
    assert everywhere.tolist() == [[1024 - 96]]  # never beyond the fbank


def test_take_segments():
    fbank = torch.randn(3, 200, 5)
    starts = torch.tensor([[0, 184], [7, 7], [100, 50]])
    segments = take_segments(fbank, starts, 16)
    assert segments.shape == (3, 2, 16, 5)
    for clip in range(3):
        for frame in range(2):
            start = starts[clip, frame]
            assert torch.equal(segments[clip, frame], fbank[clip, start : start + 16])
    assert torch.equal(take_segments(fbank, starts[:, 1], 16), segments[:, 1])
    clips = torch.tensor([2, 0])
    some = take_segments(fbank, torch.tensor([100, 184]), 16, clips=clips)
    assert torch.equal(some[0], segments[2, 0]) and torch.equal(some[1], segments[0, 1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((16, 100), "length=100 must be a multiple of 16"),
        ((16, 0), "length=0 must be a multiple of 16"),
        ((16, 1040), "length=1040: a segment is longer than the fbank of 1024 rows"),
        ((0, 96), "num_frames=0 must be at least 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        segment_starts(*arguments)


def test_times_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"timestamps must be \(B, T\), got \(4,\)"):
        timed_segment_starts(torch.zeros(4), 96, 1024)


def test_ten_seconds_are_998_rows():
    assert kaldi_fbank(torch.zeros(1, 160_000)).shape == (1, 998, 128)
