"""Cross-modal retrieval: where each clip's own pair ranks among all the others, both ways.

`kernels.retrieval_ranks` counts, for every row and every column of the similarity matrix, the
entries above and equal to the true pair's: both directions' ranks in one pass and O(N) memory. Here
they become the figures that papers report.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from kdcmae_fast.kernels import frame_similarity, retrieval_ranks

Ties = Literal["average", "optimistic", "published"]
Strategy = Literal["diagonal_mean", "diagonal_max", "mean", "max"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

RECALL_AT = (1, 5, 10)


class PairCounts(NamedTuple):
    """How the true pair of every query compares with the whole gallery. N queries.

    above: (N,) int64, gallery items that are more similar to the query than its own pair.
    equal: (N,) int64, items exactly as similar, the pair itself included (0: its score is NaN).
    """

    above: Tensor
    equal: Tensor


class DirectionScores(NamedTuple):
    """Retrieval in one direction.

    recall: share of queries whose pair is among the first k, by k.
    median_rank: 1 is best. mrr: mean of 1 / rank.
    tied_queries: queries whose pair is exactly as similar as some other item.
    """

    recall: dict[int, float]
    median_rank: float
    mrr: float
    tied_queries: int

    def named(self) -> dict[str, float]:
        """The figures under the names the papers use."""
        recalls = {f"R@{k}": share for k, share in self.recall.items()}
        return {
            **recalls,
            "median_rank": self.median_rank,
            "mrr": self.mrr,
            "tied_queries": self.tied_queries,
        }


class RetrievalScores(NamedTuple):
    """Both directions over the same N clips; `chance` is a random ranking's expectation."""

    audio_to_video: DirectionScores
    video_to_audio: DirectionScores
    chance: dict[str, float]
    num_clips: int
    ties: Ties
    ranks: dict[str, Tensor]  # by direction: (N,) int64, the best rank of each query's pair

    def named(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "audio_to_video": self.audio_to_video.named(),
            "video_to_audio": self.video_to_audio.named(),
            "chance": self.chance,
            "num_clips": self.num_clips,
            "ties": self.ties,
        }


def retrieval_scores(
    audio: Tensor,
    video: Tensor,
    *,
    strategy: Strategy = "diagonal_mean",
    ties: Ties = "average",
    recall_at: tuple[int, ...] = RECALL_AT,
    tile_size: int | None = None,
) -> RetrievalScores:
    """Rank every clip's pair among all N, audio to video and video to audio, by cosine.

    audio, video: features, row i of both from clip i, not necessarily normalised: (N, D) pooled, or
        (N, T, D) frame by frame, both or one of them.
    strategy: how cosines of frames become one number; see `kernels.frame_similarity`. One vector
        meets all T frames of the other side.
    ties: what a query gets whose pair scores exactly as high as e - 1 other items, below g items:
      "average" rank g + (e + 1) / 2, which constant features cannot exploit; "optimistic" rank
      g + 1; "published" the CAV-MAE Sync evaluation (arXiv 2505.01237), where the query counts e
      times, at ranks g + 1 ... g + e, and one whose score is NaN not at all.
    tile_size: most rows and columns of similarities held at once; None: as suits the machine.

    Raises ValueError for shapes that do not pair up, and for non-finite features unless
    ties="published".
    """
    _check(audio, video, ties, recall_at, tile_size)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not one of {', '.join(STRATEGIES)}")
    if ties != "published":
        _check_finite("audio", audio)
        _check_finite("video", video)
    # Every mode of ties follows from the counts; "published" alone lets NaN through.
    a, b, pooling = paired_frames(audio, video, strategy)
    ranks = retrieval_ranks(a, b, strategy=pooling, ties="published", tile_size=tile_size)
    rows, columns = (PairCounts(side.above, side.equal) for side in ranks)
    return RetrievalScores(
        audio_to_video=summarise(rows, ties, recall_at),
        video_to_audio=summarise(columns, ties, recall_at),
        chance=chance_level(len(audio), recall_at),
        num_clips=len(audio),
        ties=ties,
        ranks={"audio_to_video": rows.above + 1, "video_to_audio": columns.above + 1},
    )


def paired_frames(
    audio: Tensor, video: Tensor, strategy: Strategy
) -> tuple[Tensor, Tensor, Strategy]:
    """Both sides as (N, T, D) and the strategy that gives the same scores with the least work.

    A side of one vector per clip, (N, D), is as if all its T frames had it: then the mean and the
    largest of all T x T cosines are those of the T on the diagonal. (N, T, D) stays as it is.
    """
    if audio.ndim == video.ndim == 3:
        return audio, video, strategy
    frames = audio.shape[1] if audio.ndim == 3 else video.shape[1] if video.ndim == 3 else 1
    sides = (x if x.ndim == 3 else x[:, None].expand(-1, frames, -1) for x in (audio, video))
    a, b = sides
    return a, b, "diagonal_max" if strategy.endswith("max") else "diagonal_mean"


def most_similar(
    queries: Tensor, gallery: Tensor, count: int, *, strategy: Strategy = "diagonal_mean"
) -> tuple[Tensor, Tensor]:
    """Rows of the gallery that are most similar to each query, (Q, count), and their similarity.

    queries: (Q, D) or (Q, T, D). gallery: (N, D) or (N, T, D). Equal ones in gallery order.
    """
    a, b, pooling = paired_frames(queries, gallery, strategy)
    scores = torch.cat([frame_similarity(a[i : i + 1], b, strategy=pooling) for i in range(len(a))])
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return order[:, :count], scores[:, :count]


def summarise(counts: PairCounts, ties: Ties, recall_at: tuple[int, ...]) -> DirectionScores:
    """Recall, median rank and MRR of one direction; see `retrieval_scores` for `ties`."""
    above, equal = counts.above.cpu().numpy(), counts.equal.cpu().numpy()
    if ties == "published":
        ranks, weights = _spread_ranks(above, equal)
    else:
        ranks = above + 1 if ties == "optimistic" else above + (equal + 1) / 2
        weights = np.ones(len(ranks))
    total = weights.sum()
    if total == 0:
        raise ValueError("no query has a finite similarity to its own pair; check the features")
    return DirectionScores(
        recall={k: float(weights[ranks <= k].sum() / total) for k in recall_at},
        median_rank=_weighted_median(ranks, weights),
        mrr=float((weights / ranks).sum() / total),
        tied_queries=int((equal > 1).sum()),
    )


def chance_level(num_clips: int, recall_at: tuple[int, ...] = RECALL_AT) -> dict[str, float]:
    """What a random ranking of `num_clips` items scores on average."""
    recalls = {f"R@{k}": min(k / num_clips, 1.0) for k in recall_at}
    mrr = float((1 / np.arange(1, num_clips + 1)).mean())
    return {**recalls, "median_rank": (num_clips + 1) / 2, "mrr": mrr}


def _spread_ranks(above: np.ndarray, equal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every rank and how many entries hold it, query i entering at above + 1 ... above + equal."""
    steps = np.zeros(len(above) + 1, dtype=np.int64)
    np.add.at(steps, above, (equal > 0).astype(np.int64))
    np.subtract.at(steps, above + equal, (equal > 0).astype(np.int64))
    return np.arange(1, len(above) + 1), steps[:-1].cumsum()


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """Median of `values`, each repeated `weights` times; the mean of the middle two if even."""
    order = np.argsort(values, kind="stable")
    reached = weights[order].cumsum()
    total = int(reached[-1])
    middle = np.searchsorted(reached, [(total - 1) // 2, total // 2], side="right")
    return float(values[order][middle].mean())


def _check(
    audio: Tensor, video: Tensor, ties: str, recall_at: tuple[int, ...], tile_size: int | None
) -> None:
    fits = {audio.ndim, video.ndim} <= {2, 3} and len(audio) == len(video) > 0
    if fits:
        fits = audio.shape[-1] == video.shape[-1]
    if fits and audio.ndim == video.ndim == 3:
        fits = audio.shape[1] == video.shape[1]
    if not fits:
        raise ValueError(
            "audio and video must be (N, D) or (N, T, D) features of the same clips, N > 0; got "
            f"{tuple(audio.shape)} and {tuple(video.shape)}"
        )
    if audio.device != video.device:
        raise ValueError(f"audio is on {audio.device} and video on {video.device}; move one")
    if ties not in get_args(Ties):
        raise ValueError(f"ties={ties!r} is not one of {', '.join(get_args(Ties))}")
    if (tile_size is not None and tile_size < 1) or not recall_at or min(recall_at) < 1:
        raise ValueError(
            f"tile_size={tile_size} and recall_at={recall_at} must be positive, at least one k"
        )


def not_finite(features: Tensor) -> list[int]:
    """Rows of features (N, ...) that have NaN or an infinity."""
    finite = [part.flatten(1).isfinite().all(dim=1) for part in features.split(4096)]
    return (~torch.cat(finite)).nonzero().flatten().tolist()


def _check_finite(name: str, features: Tensor) -> None:
    bad = not_finite(features)
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{name} features of {len(bad)} of {len(features)} clips are not finite "
            f"(rows {shown}); check those clips and the checkpoint"
        )
