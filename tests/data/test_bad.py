"""Counting bad clips."""

import pytest

from kdcmae_fast.data import BadClip, BadClips, TooManyBadClips


def bad(n: int) -> list[BadClip]:
    return [BadClip(f"clip{i}", "no audio stream") for i in range(n)]


def test_each_clip_counts_once_and_merging_ranks_is_adding():
    clips = BadClips(1000, 0.05)
    assert clips.add(bad(2)) == bad(2)
    assert clips.add([BadClip("clip1", "other reason"), BadClip("x", "digital silence")]) == [
        BadClip("x", "digital silence")
    ]
    assert len(clips) == 3
    assert clips.rows()[1] == BadClip("clip1", "no audio stream")


@pytest.mark.parametrize(
    ("num_clips", "seen", "count", "stops"),
    [
        (10_000, 8, 25, False),  # of the first 500
        (10_000, 8, 26, True),
        (10_000, 2000, 104, False),  # 5 % of 2104 tried
        (10_000, 2000, 106, True),
        (10_000, 90_000, 500, False),  # nine epochs: of all clips
        (10_000, 90_000, 501, True),
        (20, 8, 1, False),  # a small dataset: of all its clips
        (20, 8, 2, True),
    ],
)
def test_limit(num_clips, seen, count, stops):
    clips = BadClips(num_clips, 0.05)
    clips.add(bad(count))
    if stops:
        with pytest.raises(TooManyBadClips, match=f"{count} bad clips"):
            clips.check(seen)
    else:
        clips.check(seen)


def test_message_names_numbers_setting_and_examples():
    clips = BadClips(4, 0.05)
    clips.add(bad(2))
    with pytest.raises(TooManyBadClips) as caught:
        clips.check(2)
    message = str(caught.value)
    for part in ("2 bad clips", "of 4", "max_bad_share=0.05", "clip0: no audio stream", "clip1"):
        assert part in message
    assert "\n" not in message


def test_limits_of_the_limit():
    everything = BadClips(10, 1.0)
    everything.add(bad(10))
    everything.check(10)
    nothing = BadClips(10_000, 0.0)
    nothing.check(100)
    nothing.add(bad(1))
    with pytest.raises(TooManyBadClips):
        nothing.check(100)
    with pytest.raises(ValueError, match="max_bad_share=1.5"):
        BadClips(10, 1.5)
