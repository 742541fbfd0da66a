"""A few queries with what was found for them, as pictures and sounds to look at and listen to."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcmae_fast.data import ClipDataset
from kdcmae_fast.evaluation.features import ClipFeatures
from kdcmae_fast.evaluation.ranking import RetrievalScores, Strategy, most_similar
from kdcmae_fast.evaluation.reading import EVALUATION_EPOCH
from kdcmae_fast.evaluation.source import file_name

FOLDER = "examples"  # inside the output folder
SHOWN = 3  # found clips of each query
MOST_NAME = 80  # characters of a clip's name in a file's name


def require_writers() -> None:
    """ModuleNotFoundError, saying what to do, where pictures and sounds cannot be written."""
    try:
        import PIL  # noqa: F401
        import soundfile  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"examples need {error.name}; `pip install kdcmae-fast[data]`, or leave them out with "
            "--examples 0",
            name=error.name,
        ) from error


def write_examples(
    dataset: ClipDataset,
    features: ClipFeatures,
    scores: RetrievalScores,
    *,
    strategy: Strategy,
    count: int,
    output: str | Path,
) -> list[dict[str, Any]]:
    """`examples` of metrics.json, and their files in OUTPUT/examples.

    count: queries per direction, evenly spread over the clips. Each comes with the best rank of its
    own pair and the three most similar clips.
    """
    queries = query_rows(len(features.audio), count)
    media = _Media(dataset, features, Path(output))
    examples = []
    for direction, asked, gallery in (
        ("audio_to_video", features.audio, features.video),
        ("video_to_audio", features.video, features.audio),
    ):
        found, similarity = most_similar(asked[queries], gallery, SHOWN, strategy=strategy)
        for query, rows, values in zip(
            queries.tolist(), found.tolist(), similarity.tolist(), strict=True
        ):
            examples.append(
                {
                    "direction": direction,
                    "rank_of_pair": int(scores.ranks[direction][query]),
                    "query": media.item(query),
                    "found": [
                        {
                            **media.item(row),
                            "rank": rank,
                            "similarity": value,
                            "is_pair": row == query,
                        }
                        for rank, (row, value) in enumerate(zip(rows, values, strict=True), 1)
                    ],
                }
            )
    return examples


def query_rows(num_clips: int, count: int) -> Tensor:
    """`count` rows, or all if they are fewer, evenly spread from the first on."""
    count = min(count, num_clips)
    return torch.arange(count) * num_clips // max(1, count)


class _Media:
    """Files of clips, each written once."""

    def __init__(self, dataset: ClipDataset, features: ClipFeatures, output: Path) -> None:
        self.dataset = dataset
        self.features = features
        self.output = output
        self._written: dict[int, dict[str, str]] = {}

    def item(self, row: int) -> dict[str, str]:
        """Name, frame and sound of row `row` of the features."""
        if row not in self._written:
            self._written[row] = self._write(row)
        return self._written[row]

    def _write(self, row: int) -> dict[str, str]:
        import soundfile
        from PIL import Image

        index = int(self.features.sample_ids[row])
        if self.features.times is None:
            clip = self.dataset.read(index, EVALUATION_EPOCH)
            waveform, frame = clip.waveform, clip.frame
        else:
            frames = self.dataset.read_frames(index, self.features.times.shape[1])
            waveform, frame = frames.waveform, frames.frames[len(frames.frames) // 2]
        name = self.features.video_ids[row]
        stem = f"{FOLDER}/{index:06d}_{file_name(name)[-MOST_NAME:]}"
        (self.output / FOLDER).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        picture.save(self.output / f"{stem}.jpg", quality=92)
        soundfile.write(self.output / f"{stem}.wav", waveform.numpy(), 16_000, subtype="PCM_16")
        return {"video_id": name, "frame": f"{stem}.jpg", "sound": f"{stem}.wav"}
