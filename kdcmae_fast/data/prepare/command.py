"""The command line of `kdcmae prepare`: options, progress bar, what it says at the end."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

EPILOG = """\
presets (each value is an option too):
  cav_mae       10 frames at 1 s, 224 pixels, first audio channel
  cav_mae_sync  16 frames, evenly from the first to the last
  xkd           8 frames a second (at most 80), short side 112, not cropped, mean of the channels
  videomae      every 4th frame (at most 80), short side 256, not cropped

A CSV list has a header: path,start,end,labels (seconds; only path is needed; duration instead of
end, id, and ytid instead of path with --media-root are known too).
A second run makes only what is missing. Machines that share DIR take --shard 0/2 and --shard 1/2,
or --shard slurm in a job array; the last one finishes the dataset.
"""
SETTINGS = (
    "layout", "num_frames", "grid", "img_size", "crop", "quality", "seconds", "min_seconds", "cut",
    "channel", "sound", "keep_silent", "clips_per_shard", "order",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="folder, video, CSV list or JSON manifest")
    add("--output", required=True, metavar="DIR", help="where the dataset and its report go")
    add("--layout", choices=("shards", "cav_mae"), default="shards", help="what is written")
    add(
        "--preset",
        choices=("cav_mae", "cav_mae_sync", "xkd", "videomae"),
        default="cav_mae",
        help="frames, grid, resolution and crop as published",
    )
    add("--num-frames", type=int, metavar="N", help="frames of a clip (of the preset)")
    add("--grid", metavar="G", help="seconds, ends, fps:RATE or stride:NUMBER (of the preset)")
    add("--img-size", type=int, metavar="PIXELS", help="short side of a frame (of the preset)")
    add("--crop", choices=("center", "none"), help="to a square, or not (of the preset)")
    add("--quality", type=int, metavar="Q", help="of the JPEG files, 1 to 95 (of the preset)")
    add("--channel", choices=("first", "mean"), help="of the sound (of the preset)")
    add("--seconds", type=float, metavar="S", help="longest clip (default: 10)")
    add("--min-seconds", type=float, metavar="S", help="less sound is skipped (default: 0.4)")
    add("--cut", choices=("first", "all"), help="window of a long video: first (default), or all")
    add("--sound", choices=("flac", "npy", "wav"), help="shards: flac or npy; cav_mae: wav or flac")
    add("--keep-silent", action="store_true", default=None, help="keep clips of digital silence")
    add("--clips-per-shard", type=int, metavar="N", help="inputs made as a whole (default: 16-512)")
    add("--order", choices=("shuffled", "given"), help="of the clips (default: shuffled by id)")
    add("--media-root", metavar="DIR", help="where paths and ids of lists are found")
    add("--label-csv", metavar="CSV", help="index,mid,display_name (default: as found)")
    add("--workers", type=_positive, metavar="N", help="processes (default: one a core)")
    add("--shard", default="0/1", metavar="I/N", help="share I, from 0, of N runs; or slurm")
    add("--timeout", type=float, default=300, metavar="S", help="for one input; 0 for any time")


def run(options: argparse.Namespace) -> None:
    """Prepare, and say what became of it."""
    from kdcmae_fast.data.prepare import make_settings, prepare

    if options.timeout < 0:
        raise ValueError(f"--timeout {options.timeout:g} must be at least 0")
    settings = make_settings(options.preset, **{name: getattr(options, name) for name in SETTINGS})
    outcome = prepare(
        options.sources,
        options.output,
        settings,
        media_root=options.media_root or "",
        label_csv=options.label_csv or "",
        workers=options.workers or 0,
        share=parse_share(options.shard, os.environ),
        timeout=options.timeout,
        progress=_progress_bar if sys.stderr.isatty() else None,
    )
    for note in outcome.notes:
        print(note, file=sys.stderr)
    if not outcome.missing:
        print("nothing to do: every unit of this share was complete")
    elif not outcome.made:
        print(f"nothing to do: another run is making the {outcome.missing} units of this share")
    else:
        rate = outcome.inputs_made / outcome.seconds
        print(
            f"made {outcome.made} of {outcome.num_units} units, {outcome.inputs_made} inputs in "
            f"{outcome.seconds:.1f} s ({rate:.1f} a second)"
        )
    if outcome.report is None:
        print(f"{outcome.left} units are left to other runs; the last one finishes the dataset")
    else:
        print(outcome.report.table())
        print(f"the dataset is in {options.output}; report.json and skipped.csv tell the rest")


def parse_share(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """(i, n) of "i/n", 0 <= i < n; "slurm": of this task of its job array."""
    if text == "slurm":
        try:
            task, count = (int(environment[f"SLURM_ARRAY_TASK_{n}"]) for n in ("ID", "COUNT"))
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        except (KeyError, ValueError) as error:
            raise ValueError(f"--shard slurm: not in a Slurm job array ({error})") from None
        index = (task - first) // step
    else:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"--shard {text} must be I/N, as in 0/4, or slurm")
        index, count = int(match[1]), int(match[2])
    if not 0 <= index < count:
        raise ValueError(f"--shard {text}: share {index} of {count}; shares count from 0")
    return index, count


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _progress_bar(total: int) -> Callable[[int, int], None] | None:
    """A bar on stderr, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    bar: Any = tqdm(total=total, unit=" clips", dynamic_ncols=True, disable=not total)
    left_out = 0

    def advance(done: int, skipped: int) -> None:
        nonlocal left_out
        left_out += skipped
        bar.set_postfix(skipped=left_out, refresh=False)
        bar.update(done)
        if bar.n >= total:
            bar.close()

    return advance
