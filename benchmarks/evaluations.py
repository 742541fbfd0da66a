"""Every evaluation of pretrained runs on held-out synthetic clips, and one page to compare them.

    python benchmarks/evaluations.py runs/demo runs/longer --output report.html [--results FILE]

Each RUN is a folder that `kdcmae pretrain` wrote on synthetic clips (`make demo`). The evaluations
are written inside it, as a person would have the commands do it; FILE gets their headline figures.
`kdcmae score` takes video files: the first held-out clips are written as such to --videos.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kdcmae_fast.data import SyntheticClips
from kdcmae_fast.evaluation.source import EvaluationSource, open_source
from kdcmae_fast.evaluation.video_file import write_video
from kdcmae_fast.training.provenance import git_commit, versions

VIDEOS = "heldout-videos/*.mp4"  # stands for the files that are written of held-out clips

# folder inside RUN -> command and options
EVALUATIONS = {
    "retrieval": ("retrieve", "--num-clips", "1000"),
    "probe": ("probe", "--num-clips", "1000", "--test-clips", "500"),
    "inpainting": ("inpaint", "--num-clips", "200"),
    "inpainting_audio": ("inpaint", "--num-clips", "200", "--hide", "audio"),
    "inpainting_video": ("inpaint", "--num-clips", "200", "--hide", "video"),
    "localization": ("localize", "--num-clips", "1000", "--video", "1"),
    "score": ("score", VIDEOS, "--against", VIDEOS),
}
NUM_VIDEOS = 200
FRAMES_PER_SECOND = 25
MOST_WORDS = 20  # of a command that is shown


def main() -> None:
    """Commands, page, results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--results", type=Path, help="write the headline figures there")
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path("runs/heldout-videos"),
        help="write the held-out clips there that `kdcmae score` is tried on",
    )
    parser.add_argument(
        "--only", nargs="+", choices=EVALUATIONS, help="these, without fine-tuning (default: all)"
    )
    options = parser.parse_args()

    chosen = {name: EVALUATIONS[name] for name in options.only or EVALUATIONS}
    videos = write_videos(options.runs[0], options.videos) if "score" in chosen else []
    found = {run.name: evaluate(run, chosen, videos, not options.only) for run in options.runs}
    kdcmae("report", *options.runs, "--output", options.output)
    if options.results:
        record = {
            "what": "evaluations of pretrained runs on held-out synthetic clips",
            "date": datetime.date.today().isoformat(),
            "commit": git_commit(),
            "versions": versions(),
            "videos": f"the first {NUM_VIDEOS} held-out clips, {FRAMES_PER_SECOND} frames a second",
            "evaluations": {name: " ".join(words) for name, words in chosen.items()},
            "runs": found,
        }
        options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_videos(run: Path, folder: Path) -> list[Path]:
    """Held-out clips of a run's settings as files with picture and sound, the same every time."""
    opened = open_source(EvaluationSource(checkpoint=str(run), split="heldout", device="cpu"))
    clips = opened.dataset
    if not isinstance(clips, SyntheticClips):
        raise SystemExit(
            f"error: {run} was trained on {opened.data.source}, not on synthetic clips"
        )
    times = np.arange(round(clips.clip_seconds * FRAMES_PER_SECOND)) / FRAMES_PER_SECOND
    print(f"writing {NUM_VIDEOS} held-out clips to {folder}", flush=True)
    return [
        write_video(
            folder / f"{clips.video_id(index)}.mp4",
            clips.frames(index, times.tolist()).permute(0, 2, 3, 1).numpy(),
            times,
            clips.waveform(index).numpy(),
        )
        for index in range(NUM_VIDEOS)
    ]


def evaluate(
    run: Path, chosen: dict[str, tuple[str, ...]], videos: list[Path], finetune: bool
) -> dict[str, Any]:
    """Evaluations of one run; its length and their headline figures."""
    for folder, (command, *given) in chosen.items():
        words = [word for name in given for word in (videos if name == VIDEOS else [name])]
        kdcmae(command, "--checkpoint", run, *words, "--output", run / folder)
    folders = [*chosen]
    if finetune:
        finetuned = run / "finetuned"
        if not (finetuned / "metrics.json").exists():
            kdcmae("finetune", f"train.init_from={run / 'model'}", "--output", finetuned)
        kdcmae("classify", "--checkpoint", finetuned, "--output", finetuned / "test")
        folders.append("finetuned/test")
    training = read(run)
    figures: dict[str, Any] = {name: training[name] for name in ("steps", "samples")}
    for folder in folders:
        figures[folder] = read(run / folder)["headline"]
    return figures


def read(folder: Path) -> dict[str, Any]:
    """What a command wrote."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def kdcmae(*words: object) -> None:
    """One command, in a process of its own as a person would run it."""
    command = [sys.executable, "-m", "kdcmae_fast", *map(str, words)]
    shown = words if len(words) < MOST_WORDS else (*words[:MOST_WORDS], "...")
    print("$ kdcmae", *shown, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
