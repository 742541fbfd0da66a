"""Masked clips completed by a model: errors beside baselines, pictures, sounds, metrics.json."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdcmae_fast.batch import Batch
from kdcmae_fast.data import BadClips, FrontEnd, RawBatch
from kdcmae_fast.data.fbank import num_fbank_frames
from kdcmae_fast.evaluation.features import read_clips
from kdcmae_fast.evaluation.hiding import Hiding, hide_patches
from kdcmae_fast.evaluation.inpainted_sounds import write_sounds
from kdcmae_fast.evaluation.mean_clip import MeanClip
from kdcmae_fast.evaluation.pictures import draw_clip
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    Opened,
    file_name,
    listed_bad,
    open_source,
    write_metrics,
)
from kdcmae_fast.evaluation.views import Errors, Views, reconstruct_batch
from kdcmae_fast.figure import require_matplotlib
from kdcmae_fast.messages import require_folder

OTHER_CLIP = "other_clip"  # a modality that is hidden whole, told from another clip's other one
MEAN_CLIP = "mean_clip"  # each patch as it is on average, at its place, in the other clips
LABELS = {
    "model": "model",
    OTHER_CLIP: "told from another clip",
    MEAN_CLIP: "mean of the other clips",
    "visible_mean": "mean visible patch",
    "patch_mean": "true mean of each patch",
}
UNITS = {
    "loss": "as in the training loss",
    "shown": {"audio": "log-mel, natural logarithm", "video": "RGB from 0 to 1"},
}
GIVEN = "each masked patch's true mean and standard deviation"


def inpaint(
    source: EvaluationSource,
    output: str | Path,
    *,
    hiding: Hiding | None = None,
    num_pictures: int | None = 8,
    sounds: bool = True,
) -> dict[str, Any]:
    """Hide parts of clips and let a model fill them in: OUTPUT/metrics.json, pictures, sounds.

    hiding: what is hidden (None: `Hiding()`, one view at random at the ratio of training).
    num_pictures: the first so many clips (None: all) get OUTPUT/<clip>.png and, with `sounds`, WAVE
        files: the original, its inversion, what was visible, the reconstruction.
    Errors are means over the masked patches of all clips (source.num_clips; None: all there are).

    Returns what metrics.json holds. Errors: ValueError for a checkpoint without a decoder, spans
    outside the clip, masks that hide or leave nothing; ModuleNotFoundError without Matplotlib.
    """
    require_matplotlib("the pictures of kdcmae inpaint")
    require_folder(output)
    opened = open_source(source)
    hiding = hiding or Hiding()
    _, hidden = hide_patches(hiding, opened.model.config, torch.zeros(1, dtype=torch.int64))
    where = {name: {**told._asdict(), "text": str(told)} for name, told in hidden.items()}
    said = f"Masked: of the sound {hidden['audio']}, of the frame {hidden['video']}."
    clips = Inpainting(opened, output, hiding, num_pictures, sounds, said)
    bad = clips.run(source)
    metrics = {
        "command": "inpaint",
        **opened.described,
        "hidden": {**where, "views": hiding.views, "seed": hiding.seed},
        **clips.metrics(),
        **listed_bad(bad.rows()),
    }
    write_metrics(metrics, output)
    return metrics


class Inpainting:
    """The clips of one call: their errors, pictures and sounds as they come.

    hiding: what is hidden (None: all views of the model's own masks at step 0). said: of that, in
    the pictures.
    """

    def __init__(
        self,
        opened: Opened,
        output: str | Path,
        hiding: Hiding | None,
        num_pictures: int | None,
        sounds: bool,
        said: str = "",
    ) -> None:
        self.opened = opened
        self.output = Path(output)
        self.hiding = hiding
        self.num_pictures = num_pictures
        self.with_sounds = sounds
        self.said = said
        self.norm_pix = opened.model.config.norm_pix_loss
        self.clips: list[dict[str, Any]] = []
        self.pictures: list[dict[str, str]] = []
        self.sounds: list[dict[str, str]] = []
        self._errors: dict[str, dict[str, list[Errors]]] = {"audio": {}, "video": {}}
        self._mean_clips = {"audio": MeanClip(), "video": MeanClip()}
        self._previous: Batch | None = None

    def run(self, source: EvaluationSource, default_clips: int | None = None) -> BadClips:
        """Go through source.num_clips clips (None: default_clips, or all); returns the bad ones."""
        model, dataset, data = self.opened[:3]
        wanted = source.num_clips or min(default_clips or len(dataset), len(dataset))
        front_end = FrontEnd(data, model.config)
        bad = BadClips(len(dataset), data.max_bad_share)
        batches = read_clips(dataset, data, num_clips=wanted, batch_size=source.batch_size, bad=bad)
        with _bar(source.progress, wanted) as advance:
            for raw in batches:
                self._add(raw, front_end(raw, self.opened.device))
                bad.check(len(self.clips))
                advance(len(raw.sample_ids))
        bad.check(wanted - len(bad))
        if not self.clips:
            raise ValueError(f"none of the {wanted} clips could be used; first: {bad.rows()[0]}")
        return bad

    def metrics(self) -> dict[str, Any]:
        """Mean errors and files, for metrics.json."""
        errors = {
            modality: {name: _mean(found) for name, found in kinds.items()}
            for modality, kinds in self._errors.items()
        }
        for modality, mean_clip in self._mean_clips.items():
            if (found := mean_clip.errors()) is not None:
                errors[modality][MEAN_CLIP] = dict(found)
        return {
            "num_clips": len(self.clips),
            "norm_pix_loss": self.norm_pix,
            "given": GIVEN if self.norm_pix else None,
            "units": UNITS,
            "errors": errors,
            "mean_error": {name: kinds["model"]["loss"] for name, kinds in errors.items()},
            "headline": _headline(errors),
            "clips": self.clips,
            "pictures": self.pictures,
            "sounds": self.sounds,
        }

    def _add(self, raw: RawBatch, batch: Batch) -> None:
        model, dataset, data = self.opened[:3]
        plans = None
        if self.hiding is not None:
            plans, _ = hide_patches(self.hiding, model.config, batch.sample_ids)
        frames, fbanks = reconstruct_batch(model, batch, plans, data=data)
        for modality, views in (("video", frames), ("audio", fbanks)):
            for name, errors in views.errors.items():
                self._record(modality, name, errors)
            self._mean_clips[modality].add(views)
        if self.hiding is not None and self.hiding.hide is not None:
            assert plans is not None
            told = other_clips(batch, self.hiding.hide, self._previous)
            pair = reconstruct_batch(model, told, plans, data=data)
            errors = pair[self.hiding.hide == "audio"].errors["model"]
            if self._previous is None:
                for values in errors:
                    values[:, 0] = float("nan")
            self._record(self.hiding.hide, OTHER_CLIP, errors)
            self._previous = batch
        self._keep(raw, frames, fbanks)

    def _record(self, modality: str, name: str, errors: Errors) -> None:
        on_cpu = Errors(*(values.float().cpu() for values in errors))
        self._errors[modality].setdefault(name, []).append(on_cpu)

    def _keep(self, raw: RawBatch, frames: Views, fbanks: Views) -> None:
        """Each clip's errors, and its files while there are to be more."""
        per_view = {"video": frames.error.T.tolist(), "audio": fbanks.error.T.tolist()}
        for row, index in enumerate(raw.sample_ids.tolist()):
            clip: dict[str, Any] = {"clip": self.opened.dataset.video_id(index)}
            clip["error_per_view"] = {
                name: [_number(error) for error in found[row]] for name, found in per_view.items()
            }
            if self.num_pictures is None or len(self.clips) < self.num_pictures:
                self._draw(clip, raw, row, frames, fbanks)
            self.clips.append(clip)

    def _draw(
        self, clip: dict[str, Any], raw: RawBatch, row: int, frames: Views, fbanks: Views
    ) -> None:
        name = clip["clip"]
        stem = f"{len(self.clips):03d}_{file_name(name)}"
        length = int(raw.lengths[row])
        rows = max(1, min(num_fbank_frames(length), fbanks.original.shape[-1]))
        path = draw_clip(
            self.output / f"{stem}.png",
            name,
            frames,
            fbanks,
            row,
            rows=rows,
            hidden=self.said,
        )
        clip["picture"] = path.name
        self.pictures.append({"file": path.name, "title": name})
        if not self.with_sounds:
            return
        waveform = raw.waveforms[row, :length]
        files = write_sounds(
            self.output, stem, fbanks, row, waveform, rows=rows, norm_pix=self.norm_pix
        )
        clip["sounds"] = [sound.file for sound in files]
        self.sounds += [{"file": s.file, "title": f"{name}: {s.title}"} for s in files]


def other_clips(batch: Batch, hidden: str, previous: Batch | None) -> Batch:
    """The batch with the modality that is not `hidden` taken from the clip before each.

    previous: the batch before this one; without one the first clip keeps its own.
    """
    given = "frames" if hidden == "audio" else "fbank"
    own = getattr(batch, given)
    before = own[:1] if previous is None else getattr(previous, given)[-1:]
    return batch._replace(**{given: torch.cat([before, own[:-1]])})


def inpainting_table(metrics: Mapping[str, Any]) -> str:
    """The errors of `inpaint` beside their baselines, for a terminal."""
    errors, units = metrics["errors"], {"audio": "log-mel", "video": "RGB"}
    shown = [name for name in ("audio", "video") if metrics["mean_error"][name] is not None]
    width = max(map(len, LABELS.values())) + 2
    lines = [
        " " * width + "".join(f"{name:>24}" for name in shown),
        " " * width + "".join(f"{'loss':>13}{units[name]:>11}" for name in shown),
    ]
    for kind, label in LABELS.items():
        known = (errors[name].get(kind) for name in shown)
        found = [error if error and error["loss"] is not None else None for error in known]
        if any(found):
            cells = (f"{e['loss']:13.4f}{e['shown']:11.4f}" if e else " " * 24 for e in found)
            lines.append((f"{label:{width}}" + "".join(cells)).rstrip())
    lines.append(
        f"mean squared errors on the masked patches of {metrics['num_clips']} clips: in the units "
        "of the loss, and of the picture" + (f", given {GIVEN}" if metrics["norm_pix_loss"] else "")
    )
    return "\n".join(lines)


def _headline(errors: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, float]:
    """Each modality's error beside the hardest guess's, and the control of a hidden modality."""
    found = {}
    for modality, kinds in errors.items():
        losses = {kind: e["loss"] for kind, e in kinds.items() if e["loss"] is not None}
        if "model" not in losses:
            continue
        found[f"{modality} error"] = losses["model"]
        guesses = [kind for kind in losses if kind not in ("model", OTHER_CLIP)]
        hardest = min(guesses, key=losses.__getitem__)
        for kind in (OTHER_CLIP, hardest):
            if kind in losses:
                found[f"{modality} error, {LABELS[kind]}"] = losses[kind]
    return found


def _mean(parts: Sequence[Errors]) -> dict[str, float | None]:
    """Over views and clips, those without an error left out; None if there is none."""
    loss, shown = (torch.cat(column, dim=1).double() for column in zip(*parts, strict=True))
    return {"loss": _number(loss.nanmean().item()), "shown": _number(shown.nanmean().item())}


def _number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else value


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], Any]]:
    """A function that moves a progress bar on stderr, where one is wanted and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        shown = False
    if not shown:
        yield lambda _: None
        return
    with tqdm(total=total, unit="clip", desc="inpainting", dynamic_ncols=True) as bar:
        yield bar.update
