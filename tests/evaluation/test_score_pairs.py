"""`kdcmae score --against`: whose own picture is which, and how own pairs rank, by brute force."""

import numpy as np
import pytest
import torch

from kdcmae_fast.evaluation.commands.score import own_text, pair_table
from kdcmae_fast.evaluation.ranking import retrieval_scores
from kdcmae_fast.evaluation.score_pairs import OwnPairs, find_own, pair_scores, used_own
from kdcmae_fast.evaluation.score_pictures import MOST_INCHES, draw_pairs


def ranks_by_hand(matrix, pairs):
    """Of each pair among its row and among its column; ties share the middle of their ranks."""
    there, back = [], []
    for i, j in pairs:
        for found, others in ((there, matrix[i]), (back, matrix[:, j])):
            above = sum(float(x) > float(matrix[i, j]) for x in others)
            equal = sum(float(x) == float(matrix[i, j]) for x in others)
            found.append(above + (equal + 1) / 2)
    return np.array(there), np.array(back)


@pytest.mark.parametrize(
    ("shape", "own"),
    [
        ((7, 7), list(range(7))),
        ((6, 6), [3, 0, 5, 1, 4, 2]),
        ((5, 13), [12, None, 0, 7, None]),
        ((13, 4), [None] * 9 + [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("steps", [3, 1000])  # 3: most similarities are tied
def test_pairs_rank_as_by_brute_force(shape, own, steps):
    random = np.random.default_rng(sum(shape))
    matrix = torch.from_numpy(random.integers(0, steps, shape) / steps).float()
    scores = pair_scores(matrix, own)
    pairs = [(i, j) for i, j in enumerate(own) if j is not None]
    others = [float(matrix[i, j]) for i, j in np.ndindex(shape) if (i, j) not in pairs]
    assert scores.num_pairs == len(pairs)
    assert scores.own == pytest.approx(np.mean([float(matrix[p]) for p in pairs]))
    assert scores.other == pytest.approx(np.mean(others))
    ways = (scores.audio_to_video, scores.video_to_audio)
    for way, ranks in zip(ways, ranks_by_hand(matrix, pairs), strict=True):
        assert way.recall[1] == pytest.approx((ranks <= 1).mean())
        assert way.median_rank == np.median(ranks)
        assert way.mrr == pytest.approx((1 / ranks).mean())
    assert scores.chance == (1 / shape[1], 1 / shape[0])


def test_all_with_all_is_what_retrieval_counts():
    audio, video = torch.randn(17, 6), torch.randn(17, 6)
    cosine = torch.nn.functional.cosine_similarity(audio[:, None], video[None], dim=2)
    scores, ranked = pair_scores(cosine, list(range(17))), retrieval_scores(audio, video)
    assert scores.audio_to_video == ranked.audio_to_video
    assert scores.video_to_audio == ranked.video_to_audio
    assert scores.chance == (ranked.chance["R@1"], ranked.chance["R@1"])


def test_no_pair_has_no_scores_and_a_single_one_no_others():
    assert pair_scores(torch.zeros(2, 3), [None, None]) is None
    single = pair_scores(torch.ones(1, 1), [0])
    assert single.other is None and "similarity, own - other" not in single.headline()
    with pytest.raises(ValueError, match="similarities are not finite"):
        pair_scores(torch.tensor([[float("nan")]]), [0])


def test_whose_own_picture_is_which(tmp_path, monkeypatch):
    assert find_own(["a", "b", "c"], ["c", "a"]) == OwnPairs([1, None, 0], "the same file")
    assert find_own(["a", "b"], ["x", "y"]) == OwnPairs([0, 1], "the same place in the lists")
    assert find_own(["a", "b"], ["x"]) == OwnPairs([None, None], None)
    monkeypatch.chdir(tmp_path)  # one file under two names
    assert find_own(["a", "b"], ["./b", f"{tmp_path}/a"]).columns == [1, 0]


def test_files_left_out_do_not_shift_the_pairs():
    own = OwnPairs([2, 0, 1, None], "the same file")
    assert used_own(own, [True] * 4, [True] * 3) == own
    assert used_own(own, [False, True, True, True], [True] * 3).columns == [0, 1, None]
    assert used_own(own, [True] * 4, [False, True, True]).columns == [1, None, 0, None]
    by_place = OwnPairs([0, 1, 2], "the same place in the lists")
    assert used_own(by_place, [True, False, True], [False, True, True]).columns == [None, 1]


def test_the_headline_says_chance_of_each_way():
    square = pair_scores(torch.eye(4), [0, 1, 2, 3]).headline()
    assert square["R@1 audio->video"] == square["R@1 video->audio"] == 1
    assert square["R@1 of chance"] == 0.25
    assert square["similarity, own - other"] == 1
    flat = pair_scores(torch.eye(2, 4), [0, 1]).headline()
    assert flat["R@1 of chance audio->video"] == 0.25
    assert flat["R@1 of chance video->audio"] == 0.5
    assert "R@1 of chance" not in flat


def described(matrix, own):
    rows, columns = matrix.shape
    return {
        "against": {
            "sound_of": [f"s/{i}.mp4" for i in range(rows)],
            "picture_of": [f"p/{j}.mp4" for j in range(columns)],
            "similarity": matrix.tolist(),
            "best": matrix.argmax(1).tolist(),
            "own": own,
        },
        "own_is": "the same place in the lists",
        **pair_scores(matrix, own).named(),
    }


def test_what_is_printed():
    matrix = torch.eye(2, 20) * 0.9 - 0.1
    matrix[1, 7] = 0.85
    metrics = described(matrix, [0, 1])
    lines = pair_table(metrics["against"]).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) < 60  # not a column for each picture
    assert lines[2].split() == ["s/1.mp4", "0.800", "0.850", "7.mp4"]
    said = own_text(metrics)
    assert "own pairs: 2, of the same place in the lists" in said
    assert "sound finds its picture first among 20: 50.0% (chance 5.0%), median rank 1.5" in said
    assert "picture finds its sound first among 2: 100.0% (chance 50.0%), median rank 1" in said
    assert "similarity of own pairs 0.800, of other pairs -0.075 (means)" in said
    few = pair_table(described(torch.eye(2), [0, 1])["against"])
    assert "picture 2: p/1.mp4" in few and "best: 2, 1.mp4" in few


def test_a_picture_of_many_pairs_is_no_larger_than_a_screen_or_two(tmp_path):
    image = pytest.importorskip("PIL.Image")
    names = [f"clip{i}.mp4" for i in range(150)]
    path = draw_pairs(tmp_path / "a.png", torch.randn(150, 150), names, names)
    with image.open(path) as picture:
        assert max(picture.size) <= (MOST_INCHES + 4) * 120
