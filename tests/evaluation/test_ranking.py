"""Retrieval ranks against brute force, with ties, in sizes that divide nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcmae_fast.evaluation.ranking import PairCounts, retrieval_scores, summarise

TIES = ("average", "optimistic", "published")


def brute_force(similarity: np.ndarray, ties: str, ks=(1, 5, 10)) -> dict[str, float]:
    """One query at a time, by sorting or listing; NaN scores are below everything."""
    ranks: list[float] = []
    for query, row in enumerate(similarity):
        above = sum(1 for score in row if score > row[query])
        equal = sum(1 for score in row if score == row[query])
        if ties == "optimistic":
            ranks.append(above + 1)
        elif ties == "average":
            ranks.append(np.mean([above + 1 + i for i in range(equal)]))
        else:
            ranks.extend(above + 1 + i for i in range(equal))
    recalls = {f"R@{k}": np.mean([rank <= k for rank in ranks]) for k in ks}
    mrr = np.mean([1 / rank for rank in ranks])
    return {**recalls, "median_rank": np.median(ranks), "mrr": mrr}


def assert_scores(scores, similarity, ties):
    """Both directions of `scores` are those of an (N, N) audio x video matrix."""
    for direction, matrix in (("audio_to_video", similarity), ("video_to_audio", similarity.T)):
        figures = getattr(scores, direction).named()
        expected = brute_force(matrix, ties)
        assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize(("num_clips", "tile_size"), [(1, 8), (13, 5), (97, 32), (97, 97)])
def test_equals_brute_force(num_clips, tile_size, ties):
    video = torch.randn(num_clips, 7)
    audio = video + torch.randn(num_clips, 7)
    scores = retrieval_scores(audio, video, ties=ties, tile_size=tile_size)
    unit_a, unit_v = (x.numpy().astype(np.float64) for x in (audio, video))
    unit_a /= np.linalg.norm(unit_a, axis=1, keepdims=True)
    unit_v /= np.linalg.norm(unit_v, axis=1, keepdims=True)
    assert_scores(scores, unit_a @ unit_v.T, ties)


@settings(deadline=None, max_examples=60)
@given(
    num_clips=st.integers(1, 23),
    tile_size=st.integers(1, 30),
    ties=st.sampled_from(TIES),
    seed=st.integers(0, 999),
)
def test_ties_equal_brute_force(num_clips, tile_size, ties, seed):
    # Axis-aligned unit vectors: every cosine is exactly 0 or 1 and most queries are tied.
    rng = np.random.default_rng(seed)
    audio, video = (torch.eye(3)[rng.integers(0, 3, num_clips)] for _ in range(2))
    scores = retrieval_scores(audio, video, ties=ties, tile_size=tile_size)
    assert_scores(scores, (audio @ video.T).numpy(), ties)


def test_equal_features_tie_whatever_the_tile():
    video = torch.randn(301, 65)
    video[100:200] = video[:100] * 3  # same direction, another length
    scores = retrieval_scores(video.clone(), video, tile_size=37)
    assert scores.audio_to_video.tied_queries == 200
    assert scores.audio_to_video.recall[1] == pytest.approx(101 / 301)
    assert scores.video_to_audio == scores.audio_to_video


def test_constant_features_are_at_chance_or_below_unless_asked_for():
    audio = video = torch.ones(50, 4)
    average = retrieval_scores(audio, video).audio_to_video
    assert (average.recall[1], average.median_rank) == (0.0, 25.5)
    optimistic = retrieval_scores(audio, video, ties="optimistic").audio_to_video
    assert (optimistic.recall[1], optimistic.median_rank) == (1.0, 1.0)
    published = retrieval_scores(audio, video, ties="published").audio_to_video
    assert (published.recall[10], published.median_rank) == (10 / 50, 25.5)


def test_published_drops_a_query_that_is_nan():
    audio = torch.randn(9, 4)
    video = audio.clone()
    video[3] = float("nan")
    scores = retrieval_scores(audio, video, ties="published")
    assert scores.audio_to_video.recall[1] == 1.0
    assert scores.audio_to_video.tied_queries == 0
    with pytest.raises(ValueError, match=r"video features of 1 of 9 clips .* \(rows 3\)"):
        retrieval_scores(audio, video, ties="average")


def test_published_denominator_counts_tied_entries():
    # Two queries first, one tied with two others behind one, one NaN: entries 1, 1, 2, 3, 4.
    counts = PairCounts(torch.tensor([0, 0, 1, 0]), torch.tensor([1, 1, 3, 0]))
    scores = summarise(counts, "published", (1, 2))
    assert scores.recall == {1: 2 / 5, 2: 3 / 5}
    assert scores.median_rank == 2


def test_chance_is_stated_beside_the_scores():
    scores = retrieval_scores(torch.randn(40, 3), torch.randn(40, 3)).named()
    expected = {"R@1": 1 / 40, "R@5": 5 / 40, "R@10": 10 / 40, "median_rank": 20.5}
    expected["mrr"] = sum(1 / rank for rank in range(1, 41)) / 40
    assert scores["chance"] == pytest.approx(expected)
    assert scores["num_clips"] == 40
    assert set(scores["audio_to_video"]) >= {"R@1", "R@5", "R@10", "median_rank", "mrr"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": torch.zeros(5, 4)}, r"\(6, 4\) and \(5, 4\)"),
        ({"audio": torch.zeros(0, 4), "video": torch.zeros(0, 4)}, "N > 0"),
        ({"ties": "none"}, "ties='none' is not one of average, optimistic, published"),
        ({"tile_size": 0}, "tile_size=0"),
        ({"recall_at": ()}, r"recall_at=\(\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"audio": torch.randn(6, 4), "video": torch.randn(6, 4)} | change
    with pytest.raises(ValueError, match=message):
        retrieval_scores(**arguments)
