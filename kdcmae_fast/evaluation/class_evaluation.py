"""Classification of a dataset's clips, every frame of each: probabilities, figures.

The probabilities of a clip are the mean over its frames of the sigmoid (bce) or the softmax
(cross_entropy) of the logits (CAV-MAE, arXiv 2210.07839). Clips go in batches that are the same for
any number of ranks, rank r taking batches r, r + ranks, ...: results do not depend on the ranks.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from kdcmae_fast.config import ModelConfig
from kdcmae_fast.data import BadClip, BadClips, ClipDataset, ClipError, FrontEnd
from kdcmae_fast.data.augment import pad
from kdcmae_fast.data.classes import LabelledClips
from kdcmae_fast.data.clip import ClipFrames
from kdcmae_fast.evaluation.class_metrics import class_metrics
from kdcmae_fast.evaluation.ranking import not_finite
from kdcmae_fast.finetune_config import FinetuneDataConfig

# (fbank (B, rows, F), frames (B, T, 3, H, W)) on the device -> logits (B, T, C), or (B, C) where
# there is one answer for a clip. With paired frames fbank is (B, T, rows, F).
Classifier = Callable[[Tensor, Tensor], Tensor]


class FrameBatch(NamedTuple):
    """B clips, T frames of each.

    waveforms: (B, N) float32. lengths: (B,). frames: (B, T, 3, H, W) uint8. times: (B, T) seconds.
    sample_ids: (B,). classes: (B, K) int64, filled up with -1.
    """

    waveforms: Tensor
    lengths: Tensor
    frames: Tensor
    times: Tensor
    sample_ids: Tensor
    classes: Tensor


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to classify, and how it is counted.

    data: how they are read; its
    eval_clips, eval_frames, eval_batch_size. model: sizes. loss: bce or cross_entropy.
    num_frames: of each clip; None: as many as `data` says. pairs_frames: every frame with the sound
    around it (CAV-MAE Sync). rank, world_size: of this process.
    """

    dataset: ClipDataset
    data: FinetuneDataConfig
    model: ModelConfig
    loss: str
    num_classes: int
    device: torch.device
    num_frames: int | None = None
    pairs_frames: bool = False
    rank: int = 0
    world_size: int = 1
    progress: bool = field(default=False, compare=False)

    @property
    def frames_per_clip(self) -> int:
        """T."""
        for count in (self.num_frames, self.data.eval_frames):
            if count is not None:
                return count
        return self.data.num_frames


def num_evaluated(dataset: ClipDataset, data: FinetuneDataConfig) -> int:
    """Clips that are tried: data.eval_clips or all; ValueError if there are not so many."""
    wanted = data.eval_clips
    if wanted is not None and wanted > len(dataset):
        raise ValueError(f"data.eval_clips={wanted}: there are {len(dataset)} clips")
    return len(dataset) if wanted is None else wanted


def evaluate_classifier(classify: Classifier, evaluation: Evaluation) -> dict[str, Any]:
    """The figures of `class_metrics` over the clips, with `num_clips` and `bad_clips`.

    classify: called equally often on every rank, as engines that shard weights need. Unreadable and
    unlabelled clips are left out and named in `bad_clips`. Raises TooManyBadClips past
    data.max_bad_share, ValueError when no clip is left, or for probabilities that are not finite.
    """
    total = num_evaluated(evaluation.dataset, evaluation.data)
    metrics = class_metrics(evaluation.loss, evaluation.num_classes, evaluation.device)
    front_end = FrontEnd(evaluation.data, evaluation.model)
    bad: list[tuple[int, BadClip]] = []  # with their places
    counted, broken = 0, []
    with torch.no_grad():
        for batch in _batches(evaluation, bad):
            idle = batch is None  # nothing left for this rank, but the others need it
            batch = _blank(evaluation) if batch is None else batch
            waveforms, lengths, frames, times = (x.to(evaluation.device) for x in batch[:4])
            if evaluation.pairs_frames:
                numbers = torch.arange(frames.shape[1], device=frames.device).expand(times.shape)
                fbank = front_end.segments(waveforms, lengths, numbers, times)
            else:
                fbank = front_end.fbank(waveforms, lengths)
            logits = classify(fbank, frames)
            if idle:
                continue
            probabilities = average_probabilities(logits, evaluation.loss)
            metrics.update(batch.sample_ids, probabilities, batch.classes.to(evaluation.device))
            counted += len(batch.sample_ids)
            broken += batch.sample_ids[not_finite(probabilities)].tolist()
    counted, bad, broken = _over_ranks(counted, bad, broken, evaluation)
    tally = BadClips(len(evaluation.dataset), evaluation.data.max_bad_share)
    tally.add(clip for _, clip in bad)
    tally.check(counted)
    if counted == 0:
        first = bad[0][1]
        raise ValueError(
            f"none of the {total} clips can be evaluated; {first.video_id}: {first.reason}"
        )
    if broken:  # an argmax over NaN is a class like any other
        raise ValueError(
            f"the probabilities of {len(broken)} of {counted} clips are not finite, the first is "
            f"{evaluation.dataset.video_id(broken[0])}; check that clip and the checkpoint"
        )
    return {
        "num_clips": counted,
        "num_frames": evaluation.frames_per_clip,
        **metrics.compute(),
        "bad_clips": [clip._asdict() for clip in tally.rows()],
    }


def average_probabilities(logits: Tensor, loss: str) -> Tensor:
    """Logits (B, T, C), or (B, C) for one frame -> probabilities (B, C), mean over the frames."""
    logits = logits.float()
    frames = logits.unsqueeze(1) if logits.ndim == 2 else logits
    each = frames.sigmoid() if loss == "bce" else frames.softmax(dim=-1)
    return each.mean(dim=1)


def _batches(evaluation: Evaluation, bad: list[tuple[int, BadClip]]) -> Iterator[FrameBatch | None]:
    """This rank's batches; None where it has none, or none of the clips can be used."""
    size, ranks = evaluation.data.eval_batch_size, evaluation.world_size
    total = num_evaluated(evaluation.dataset, evaluation.data)
    starts = range(evaluation.rank * size, total, ranks * size)
    mine = [range(start, min(start + size, total)) for start in starts]
    rounds = -(-total // (ranks * size))
    indices = [index for batch in mine for index in batch]
    clips = _in_order(evaluation, indices)
    for number in range(rounds):
        batch = mine[number] if number < len(mine) else range(0)
        good = []
        for index in batch:
            clip = next(clips)
            if isinstance(clip, BadClip):
                bad.append((index, clip))
            else:
                good.append(clip)
        yield _collate(good) if good else None


def _in_order(evaluation: Evaluation, indices: Sequence[int]) -> Iterator[ClipFrames | BadClip]:
    """ClipFrames or BadClip of each index, read by threads that are a few batches ahead."""
    dataset, count = LabelledClips(evaluation.dataset), evaluation.frames_per_clip

    def read(index: int) -> ClipFrames | BadClip:
        try:
            return dataset.read_frames(index, count)
        except ClipError as error:
            return BadClip(error.video_id, error.reason)

    threads, ahead = evaluation.data.num_workers, 2 * evaluation.data.eval_batch_size
    if threads == 0:
        yield from map(read, _with_bar(indices, evaluation))
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[ClipFrames | BadClip]] = deque()
        try:
            for index in _with_bar(indices, evaluation):
                waiting.append(pool.submit(read, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _collate(clips: Sequence[ClipFrames]) -> FrameBatch:
    classes = [torch.tensor(clip.classes or (clip.label,)) for clip in clips]
    return FrameBatch(
        waveforms=pad([clip.waveform for clip in clips]),
        lengths=torch.tensor([len(clip.waveform) for clip in clips]),
        frames=torch.stack([clip.frames for clip in clips]),
        times=torch.stack([torch.as_tensor(clip.times) for clip in clips]),
        sample_ids=torch.tensor([clip.index for clip in clips]),
        classes=torch.nn.utils.rnn.pad_sequence(classes, batch_first=True, padding_value=-1),
    )


def _blank(evaluation: Evaluation) -> FrameBatch:
    """One clip of nothing, for a forward pass whose result nobody looks at."""
    size, count = evaluation.model.img_size, evaluation.frames_per_clip
    none = torch.zeros(1, dtype=torch.long)
    frames = torch.zeros(1, count, 3, size, size, dtype=torch.uint8)
    times = torch.zeros(1, count, dtype=torch.float64)
    return FrameBatch(torch.zeros(1, 1600), none + 1600, frames, times, none, none[:, None])


def _over_ranks(
    counted: int, bad: list[tuple[int, BadClip]], broken: list[int], evaluation: Evaluation
) -> tuple[int, list[tuple[int, BadClip]], list[int]]:
    """Clips counted by all ranks; the bad ones of all, and the broken, in the dataset's order."""
    if evaluation.world_size == 1:
        return counted, bad, broken
    parts: list[Any] = [None] * evaluation.world_size
    dist.all_gather_object(parts, (counted, bad, broken))
    return (
        sum(part[0] for part in parts),
        sorted(clip for part in parts for clip in part[1]),
        sorted(number for part in parts for number in part[2]),
    )


def _with_bar(indices: Sequence[int], evaluation: Evaluation) -> Iterator[int]:
    if not evaluation.progress:
        yield from indices
        return
    from tqdm import tqdm

    yield from tqdm(indices, unit="clip", desc="classify", dynamic_ncols=True)
