"""CAV-MAE Sync against CAV-MAE on clips of sub-second events: frames to sound, and shifted sound.

    python benchmarks/sync_events.py                      # trains both, about ten minutes
    python benchmarks/sync_events.py --evaluate           # only what was trained before

Both are trained from configs/sync_events.yaml and configs/cav_mae_events.yaml for as many frames
and compared on held-out clips; docs/sync.md says how. One row of figures goes to
benchmarks/results/sync-events-<date>.json.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SHIFT_SECONDS = 1.0
SEGMENT_ROWS = 32  # of sound around each frame, for both models
FRAMES_IN_A_STEP = 48  # 12 clips of 4 frames, 48 clips of one
RUNS = {"cav_mae_sync": ("sync_events.yaml", 12), "cav_mae": ("cav_mae_events.yaml", 48)}


class Clips(NamedTuple):
    """N held-out clips of T frames. waveforms (N, S), frames (N, T, 3, H, W), times (N, T)."""

    waveforms: Tensor
    frames: Tensor
    times: Tensor


def train(folder: Path) -> None:
    """Trains what is not there yet."""
    for name, (recipe, clips) in RUNS.items():
        if (folder / name / "model").is_dir():
            continue
        command = [
            sys.executable, str(ROOT / "kdcmae_fast" / "pretrain.py"),
            "--ds_config", str(ROOT / "configs" / "zero2.json"),
            "--recipe", str(ROOT / "configs" / recipe), "--output", str(folder / name),
            "ds.bf16.enabled=false", f"ds.train_micro_batch_size_per_gpu={clips}",
        ]  # fmt: skip
        subprocess.run(command, check=True)


def last_record(run: Path) -> dict[str, float]:
    """Step, samples and losses of the last line of a run's log."""
    record = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    names = ("step", "samples", "total", "mae_audio", "mae_video", "contrastive")
    return {name: round(record[name], 4) for name in names}


def read_heldout(folder: Path, num_clips: int) -> Clips:
    """Clips that neither model was trained on, the same for both."""
    from kdcmae_fast.evaluation.source import EvaluationSource, open_source

    opened = open_source(EvaluationSource(checkpoint=str(folder / "cav_mae_sync")))
    clips = [opened.dataset.read_frames(index) for index in range(num_clips)]
    return Clips(
        torch.stack([clip.waveform for clip in clips]),
        torch.stack([clip.frames for clip in clips]),
        torch.stack([torch.from_numpy(clip.times) for clip in clips]),
    )


class Encoded:
    """A model that gives a feature to every frame and to the sound around it.

    sound: "segments" (CAV-MAE Sync), or of CAV-MAE "whole" (the clip's one feature for all its
    frames), "span" (mean over those tokens of the clip that lie in the segment) or "alone" (the
    segment at its place in an otherwise empty clip).
    """

    def __init__(self, folder: Path, sound: str) -> None:
        from kdcmae_fast.data import FrontEnd
        from kdcmae_fast.evaluation.source import EvaluationSource, open_source

        opened = open_source(EvaluationSource(checkpoint=str(folder), device="cpu"))
        self.model, self.data, self.sound = opened.model, opened.data, sound
        self.front_end = FrontEnd(opened.data, opened.model.config)

    @torch.inference_mode()
    def video(self, frames: Tensor) -> Tensor:
        """(N, T, 3, H, W) -> (N, T, D)."""
        return torch.stack([self.model.encode(frames=some).video for some in frames])

    @torch.inference_mode()
    def audio(self, waveforms: Tensor, times: Tensor) -> Tensor:
        """(N, S) and (N, T) seconds -> (N, T, D)."""
        parts = zip(waveforms.split(8), times.split(8), strict=True)
        return torch.cat([self._audio(*part) for part in parts])

    def _audio(self, waveforms: Tensor, times: Tensor) -> Tensor:
        from kdcmae_fast.data.segments import timed_segment_starts

        numbers = torch.arange(times.shape[1]).expand(times.shape)
        if self.sound == "segments":
            rows = self.front_end.segments(waveforms, None, numbers, times)
            return self.model.encode(fbank=rows.flatten(0, 1)).audio.unflatten(0, times.shape)
        fbank = self.front_end.fbank(waveforms)
        if self.sound == "whole":
            return self.model.encode(fbank=fbank).audio[:, None].expand(-1, times.shape[1], -1)
        starts = timed_segment_starts(times, SEGMENT_ROWS, fbank.shape[1])[..., None]
        if self.sound == "span":
            tokens = self.model.encode(fbank=fbank).audio_tokens.unflatten(1, (8, -1)).mean(1)
            first = torch.arange(tokens.shape[1]) * 16
            inside = (first + 16 > starts) & (first < starts + SEGMENT_ROWS)
            return inside.float() @ tokens / inside.sum(2, keepdim=True)
        row = torch.arange(fbank.shape[1])
        inside = (row >= starts) & (row < starts + SEGMENT_ROWS)
        empty = -self.data.dataset_mean / self.data.dataset_std
        alone = torch.where(inside[..., None], fbank[:, None], empty)
        return torch.stack([self.model.encode(fbank=some).audio for some in alone])


def frame_retrieval(audio: Tensor, video: Tensor) -> dict[str, float]:
    """Each frame against the segments of all clips, and against those of its own clip."""
    a, v = (torch.nn.functional.normalize(x.double(), dim=2) for x in (audio, video))
    clips, frames = v.shape[:2]
    everywhere = _ranks(v.flatten(0, 1) @ a.flatten(0, 1).mT)
    at_home = torch.stack([_ranks(frames @ sounds.mT) for frames, sounds in zip(v, a, strict=True)])
    return {
        **{f"R@{k}": _recall(everywhere, k) for k in (1, 5, 10)},
        "median_rank": float((everywhere[:, 0] + (everywhere[:, 1] + 1) / 2).median()),
        "candidates": clips * frames,
        "own_clip_R@1": _recall(at_home.flatten(0, 1), 1),
        "own_clip_candidates": frames,
    }


def _ranks(similarity: Tensor) -> Tensor:
    """(Q, Q), pairs on the diagonal -> (Q, 2): candidates above each query's own, and equal."""
    similarity = similarity.round(decimals=9)  # equal features are equally similar
    own = similarity.diagonal()[:, None]
    return torch.stack([(similarity > own).sum(1), (similarity == own).sum(1)], dim=1)


def _recall(ranks: Tensor, k: int) -> float:
    """Share of queries whose own is among the first k, equals in random order."""
    above, equal = ranks.unbind(1)
    return round(float(((k - above).clamp(min=0).minimum(equal) / equal).mean()), 4)


def found_shifts(encoded: Encoded, clips: Clips, video: Tensor) -> dict[str, float]:
    """Share of clips whose shift of the sound is found to the frame."""
    from kdcmae_fast.evaluation.offset import best_offsets

    step = float(clips.times[0, 1] - clips.times[0, 0])
    shift, samples = round(SHIFT_SECONDS / step), round(SHIFT_SECONDS * 16_000)
    frames = clips.times.shape[1] - shift
    shares = {}
    for name, true, first, cut in (
        ("sound 1 s early", shift, 0, slice(samples, None)),
        ("sound 1 s late", -shift, shift, slice(0, -samples)),
        ("not shifted", 0, 0, slice(0, -samples)),
    ):
        shown = slice(first, first + frames)
        times = clips.times[:, :frames]  # of the part's own clock
        audio = encoded.audio(clips.waveforms[:, cut], times)
        a, v = (torch.nn.functional.normalize(x, dim=2) for x in (audio, video[:, shown]))
        found = best_offsets(a @ v.mT).offset
        shares[name] = round(float((found == true).float().mean()), 4)
    return shares


def evaluate(folder: Path, num_clips: int) -> dict[str, dict[str, object]]:
    """All figures, by model and by what stands for a segment."""
    clips = read_heldout(folder, num_clips)
    figures: dict[str, dict[str, object]] = {}
    for label, name, sound in (
        ("CAV-MAE Sync", "cav_mae_sync", "segments"),
        ("CAV-MAE, whole clip", "cav_mae", "whole"),
        ("CAV-MAE, the segment's tokens", "cav_mae", "span"),
        ("CAV-MAE, the segment alone", "cav_mae", "alone"),
    ):
        encoded = Encoded(folder / name, sound)
        video = encoded.video(clips.frames)
        figures[label] = {
            "retrieval": frame_retrieval(encoded.audio(clips.waveforms, clips.times), video),
            "shift_found": found_shifts(encoded, clips, video),
        }
    return figures


def table(figures: dict[str, dict[str, object]]) -> str:
    """The figures as docs/sync.md shows them."""
    lines = [
        "| sound of a frame | all: R@1 | R@10 | median rank | own clip: R@1 | shift: early | late |"
    ]
    lines.append("|" + " --- |" * 7)
    for label, row in figures.items():
        found, shifts = row["retrieval"], row["shift_found"]
        shares = [found["R@1"], found["R@10"], found["own_clip_R@1"]]
        shares += [shifts["sound 1 s early"], shifts["sound 1 s late"]]
        cells = [f"{share:.1%}" for share in shares]
        cells.insert(2, f"{found['median_rank']:.0f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Trains what is missing, evaluates, writes the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs/sync_events"), help="folder of the two runs")
    add("--clips", type=int, default=100, help="held-out clips; default %(default)s")
    add("--evaluate", action="store_true", help="only what was trained before; writes no row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.evaluate:
        train(options.runs)
    figures = evaluate(options.runs, options.clips)
    print(table(figures))
    if options.evaluate:
        return
    from bench_environment import cpu_name

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    row = {
        "what": "benchmarks/sync_events.py",
        "device": cpu_name(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "frames_in_a_step": FRAMES_IN_A_STEP,
        "trained": {name: last_record(options.runs / name) for name in RUNS},
        "heldout_clips": options.clips,
        "figures": figures,
    }
    file = ROOT / "benchmarks" / "results" / f"sync-events-{datetime.date.today()}.json"
    file.write_text(json.dumps(row, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    main()
