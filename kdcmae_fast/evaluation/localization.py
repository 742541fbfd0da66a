"""Where the sound is in a picture: maps of a model, scored against boxes beside their controls."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcmae_fast.data import ClipDataset, SyntheticClips
from kdcmae_fast.data.clip import ClipFrames
from kdcmae_fast.data.media import MediaOptions
from kdcmae_fast.evaluation.attribution import References, attribution_maps
from kdcmae_fast.evaluation.localization_clips import (
    Located,
    located_batches,
    make_references,
)
from kdcmae_fast.evaluation.localization_controls import (
    DISC,
    OPPOSITE,
    WRONG_SOUND,
    shape_controls,
)
from kdcmae_fast.evaluation.localization_maps import (
    colour_maps,
    cosine_maps,
    fuse,
    fusion_weights,
    min_max,
    token_norm_maps,
    upsample,
)
from kdcmae_fast.evaluation.localization_output import LocalizationWriter, ScoredClip, read_prior
from kdcmae_fast.evaluation.localization_scores import (
    SIZE,
    MapScores,
    Truth,
    best_possible,
    score_map,
    summarize,
    truth_map,
)
from kdcmae_fast.evaluation.localization_settings import LocalizationSettings
from kdcmae_fast.evaluation.localization_truth import (
    AnnotatedTruth,
    BoxTruth,
    PictureClips,
    SyntheticTruth,
    read_annotations,
)
from kdcmae_fast.evaluation.processes import SharedBadClips, launched_processes
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    Opened,
    listed_bad,
    open_source,
    write_metrics,
)
from kdcmae_fast.figure import require_matplotlib
from kdcmae_fast.messages import require_folder
from kdcmae_fast.models.masking import video_grid

SYNTHETIC_CLIPS = 200  # scored unless told otherwise
PRIORS = ("colour", "tokens")  # made here; other names are files


def localize(
    source: EvaluationSource,
    settings: LocalizationSettings | None = None,
    *,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Score where a model finds each clip's sound, beside controls that know nothing of it.

    output: folder for metrics.json, pictures and videos (None: writes nothing). source.num_clips
    None: 200 of the synthetic clips, all annotated ones.

    Returns what metrics.json holds, on all processes of a launcher: they share the clips, and the
    first one writes.
    """
    settings = settings or LocalizationSettings()
    if output is not None:
        require_folder(output)
        require_matplotlib("localisation pictures")
    processes = launched_processes()
    opened = open_source(source)
    dataset, truth = _clips_and_truth(opened, settings)
    chosen = _chosen(truth, source.num_clips, isinstance(truth, SyntheticTruth))
    references = make_references(
        opened.model, dataset, opened.data, range(len(dataset)), settings.references
    )
    priors = [p if p in PRIORS else read_prior(p) for p in settings.priors]
    bad = SharedBadClips(len(dataset), len(chosen), opened.data.max_bad_share, processes)
    batches = located_batches(
        opened.model, dataset, opened.data, chosen, batch_size=source.batch_size, bad=bad
    )
    tally = Tally(truth, settings.truth or truth.rule)
    writer = LocalizationWriter(opened, dataset, truth, settings, references, output, processes)
    if source.progress and processes.is_main:
        batches = _with_bar(batches, len(chosen) // processes.size)
    for batch in batches:
        maps = batch_maps(opened.model, batch, references, settings, priors)
        scored = tally.add(batch, maps)
        writer.add(batch, maps, scored)
    left_out = bad.gathered()
    tally.scored = processes.gather_lists(tally.scored)
    if not tally.scored:
        raise ValueError(f"none of the {len(chosen)} clips could be used; first: {left_out[0]}")
    files = writer.finish(tally.scored)

    def written() -> dict[str, Any]:
        metrics = {
            "command": "localize",
            **opened.described,
            **_described(settings, truth, references),
            **tally.metrics(settings.main),
            **files,
            **listed_bad(left_out),
        }
        write_metrics(metrics, output)
        return metrics

    return processes.on_first(written)


@torch.no_grad()
def batch_maps(
    model: Any,
    batch: Located,
    references: References,
    settings: LocalizationSettings,
    priors: Sequence[Any] = (),
) -> dict[str, dict[str, Tensor]]:
    """Maps of a batch by name, (B, h, w) each at its own size: "maps" and "controls"."""
    indices = batch.indices
    tokens = model.encode(frames=batch.frames).video_tokens
    grid = video_grid(model.config)
    count = len(references.indices)
    wrong = indices % count
    wrong = torch.where(references.indices[wrong] == indices, (wrong + 1) % count, wrong)
    others = references.sounds[wrong]
    maps, wrong_maps = {}, cosine_maps(others, tokens, grid)
    if settings.map == "attribution":
        sounds = torch.stack([batch.sounds, others])
        maps["attribution"], wrong_maps = attribution_maps(
            model, batch.frames, sounds, references, indices=indices
        )
    maps["cosine"] = cosine_maps(batch.sounds, tokens, grid)
    plain = {"tokens": token_norm_maps(tokens, grid), "colour": colour_maps(batch.frames)}
    controls = {
        WRONG_SOUND: wrong_maps,
        OPPOSITE: -maps["cosine"],
        "token length": plain["tokens"],
        "colour contrast": plain["colour"],
    }
    if settings.fusion:
        found = [
            plain[prior] if isinstance(prior, str) else prior.of(batch.clips).to(tokens.device)
            for prior in priors
        ]
        weights = fusion_weights(settings.fusion, settings.alpha)
        maps[settings.main] = fuse(
            [upsample(m, SIZE) for m in (maps[settings.map], *found)], weights
        )
        names = zip(settings.priors, found, strict=True)
        controls |= {f"prior {Path(name).name}": prior for name, prior in names}
    return {"maps": maps, "controls": controls}


class Tally:
    """The scores of all maps, clip by clip."""

    def __init__(self, truth: BoxTruth, rule: Truth) -> None:
        self.truth = truth
        self.rule = rule
        self.scored: list[ScoredClip] = []

    def add(self, batch: Located, maps: dict[str, dict[str, Tensor]]) -> list[ScoredClip]:
        """Score the clips of a batch."""
        large = {
            kind: {name: as_pictures(m) for name, m in found.items()}
            for kind, found in maps.items()
        }
        scored = []
        for row, clip in enumerate(batch.clips):
            boxes = self.truth.boxes(clip.index, float(clip.times[0]))
            given = truth_map(boxes, self.rule)
            values = {
                kind: {name: score_map(m[row], given) for name, m in found.items()}
                for kind, found in large.items()
            }
            values["controls"] |= {
                name: score_map(m, given) for name, m in shape_controls(clip.index).items()
            }
            row_of_metrics = _clip_row(clip, given, values["maps"])
            seconds = float(clip.times[0])
            scored.append(ScoredClip(row_of_metrics, seconds, **values, best=best_possible(given)))
        self.scored += scored
        return scored

    def metrics(self, main: str) -> dict[str, Any]:
        """What metrics.json says of the scores."""
        found = {
            kind: {
                name: summarize([getattr(clip, kind)[name] for clip in self.scored])
                for name in getattr(self.scored[0], kind)
            }
            for kind in ("maps", "controls")
        }
        best = [MapScores(clip.best, 1.0, 1.0, 1.0) for clip in self.scored]
        possible = summarize(best)
        return {
            "truth": self.rule,
            "num_clips": len(self.scored),
            "map": main,
            **found,
            "above_centred_disc": self._above(main),
            "best_half_of_picture": {key: possible[key] for key in ("mean_ciou", "ap50", "auc")},
            "headline": {
                "cIoU": found["maps"][main]["mean_ciou"],
                "cIoU of the centred disc": found["controls"][DISC]["mean_ciou"],
                "cIoU with another sound": found["controls"][WRONG_SOUND]["mean_ciou"],
                "AP50": found["maps"][main]["ap50"],
                "AUC": found["maps"][main]["auc"],
                "size-aware IoU": found["maps"][main]["size_aware_iou"],
            },
            "clips": [clip.row for clip in self.scored],
        }

    def _above(self, main: str) -> dict[str, float | None]:
        """Mean over clips of the map's cIoU less the centred disc's, and its standard error."""
        gains = np.array([clip.maps[main].ciou - clip.controls[DISC].ciou for clip in self.scored])
        error = float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else None
        return {"mean_ciou": float(gains.mean()), "standard_error": error}


def as_pictures(maps: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(B, h, w) -> (B, 224, 224) in 0..1, on the CPU."""
    large = maps if maps.shape[-1] == SIZE else upsample(maps.float(), SIZE)
    return min_max(large).cpu().numpy()


def _clips_and_truth(
    opened: Opened, settings: LocalizationSettings
) -> tuple[ClipDataset, BoxTruth]:
    if settings.annotations is None:
        if isinstance(opened.dataset, SyntheticClips):
            return opened.dataset, SyntheticTruth(opened.dataset)
        raise ValueError(
            f"data.source={opened.data.source} has no boxes; give --annotations (vggss.json or a "
            "folder of Flickr-SoundNet XML files)"
        )
    boxes, rule = read_annotations(settings.annotations, settings.ids)
    dataset: ClipDataset = opened.dataset
    if settings.frames is not None and settings.sounds is not None:
        options = MediaOptions.of(opened.data, opened.model.config)
        names = [clip.id for clip in boxes]
        dataset = PictureClips(names, settings.frames, settings.sounds, options)
    truth = AnnotatedTruth(
        dataset, boxes, rule, where=settings.annotations, allow_missing=settings.allow_missing
    )
    return dataset, truth


def _chosen(truth: BoxTruth, wanted: int | None, synthetic: bool) -> Sequence[int]:
    there = len(truth.indices)
    if wanted is None:
        wanted = min(SYNTHETIC_CLIPS, there) if synthetic else there
    if wanted > there:
        raise ValueError(f"num_clips={wanted}: there are boxes for {there} clips")
    return truth.indices[:wanted]


def _described(
    settings: LocalizationSettings, truth: BoxTruth, references: References
) -> dict[str, Any]:
    missing: list[str] = truth.missing if isinstance(truth, AnnotatedTruth) else []
    return {
        "annotations": settings.annotations or "synthetic clips",
        "annotated_but_missing": missing,
        "references": len(references.indices),
        "fusion": settings.fusion,
        "priors": list(settings.priors),
    }


def _clip_row(
    clip: ClipFrames, given: np.ndarray[Any, Any], scores: dict[str, MapScores]
) -> dict[str, Any]:
    return {
        "clip": clip.video_id,
        "index": clip.index,
        "seconds": round(float(clip.times[0]), 3),
        "truth_share": round(float((given > 0).mean()), 4),
        "ciou": {name: score.ciou for name, score in scores.items()},
        "size_aware_iou": {name: score.size_aware for name, score in scores.items()},
    }


def _with_bar(batches: Iterator[Located], num_clips: int) -> Iterator[Located]:
    """The same batches, with a progress bar on stderr where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield from batches
        return
    with tqdm(total=num_clips, unit="clip", desc="maps", dynamic_ncols=True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.clips))
