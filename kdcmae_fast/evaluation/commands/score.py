"""The command line of `kdcmae score`."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kdcmae_fast.evaluation.commands.options import add_frames, add_model, say_bad

PER_LINE = 10  # frames of a clip printed side by side
MOST_NAME = 24  # characters of a file's name in the table of pairs
MOST_COLUMNS = 12  # pictures up to which that table has every similarity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files with picture and sound")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="VIDEO",
        help="compare the sound of every VIDEO before with the picture of every one of these; of "
        "files in both lists, or else of lists equally long, also say how often a sound finds its "
        "own picture",
    )
    parser.add_argument(
        "--strategy",
        choices=("diagonal_mean", "diagonal_max", "mean", "max"),
        default="diagonal_mean",
        help="with --against: mean or largest cosine of frames at the same moment (diagonal_*), or "
        "of all T x T pairs of frames",
    )
    add_frames(parser)
    parser.add_argument(
        "--start", type=float, default=0.0, metavar="S", help="seconds of each file to pass over"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="of each file, as far as it goes (default: 10.24 for CAV-MAE Sync, else as many as "
        "the model hears at once)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="data.key=value",
        help="data.* setting on top, as in data.channel=mean; may come several times",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write a picture per file and DIR/metrics.json"
    )


def run(options: argparse.Namespace) -> None:
    """Score, print, write; an error at the end if a file could not be used."""
    from kdcmae_fast.evaluation.score import Stretch, score_videos
    from kdcmae_fast.evaluation.source import EvaluationSource

    source = EvaluationSource(
        checkpoint=options.checkpoint,
        recipe=options.recipe,
        overrides=tuple(options.settings),
        device=options.device,
        progress=sys.stderr.isatty() and len(options.videos) > 1,
    )
    stretch = Stretch(
        num_frames=options.num_frames,
        start=options.start,
        seconds=options.seconds,
    )
    metrics = score_videos(
        source,
        options.videos,
        against=options.against,
        stretch=stretch,
        strategy=options.strategy,
        output=options.output,
    )
    if "against" in metrics:
        print(pair_table(metrics["against"]))
        if "num_pairs" in metrics:
            print(own_text(metrics))
    else:
        print("\n".join(map(clip_text, metrics["clips"])))
    if options.output:
        count = len(metrics["pictures"])
        drawn = f"{count} pictures" if count > 1 else "a picture"
        print(f"wrote {drawn} and metrics.json to {options.output}")
    say_bad(metrics)
    if bad := metrics["bad_clips"]:
        sys.stdout.flush()
        files = len({*options.videos, *(options.against or ())})
        raise ValueError(f"{len(bad)} of {files} files could not be used (named above)")


def clip_text(clip: Mapping[str, Any]) -> str:
    """What is printed of one file."""
    frames = clip["frames"]
    lines = [f"{clip['file']}: {clip['seconds']:.1f} s, {len(frames)} frames"]
    mean = f"  similarity of sound and picture {clip['similarity']:.3f}"
    if "says" not in clip:
        lines.append(f"{mean} (mean over the frames; the sound is heard as a whole:")
        lines.append("  how far it is shifted only a CAV-MAE Sync model can tell)")
    else:
        if clip["other_moments"] is not None:
            mean += f", of moments that do not belong together {clip['other_moments']:.3f}"
        lines += [mean, f"  {clip['says']}"]
    for first in range(0, len(frames), PER_LINE):
        part = slice(first, first + PER_LINE)
        for name, values, digits in (("seconds", clip["times"], 2), ("cosine", frames, 3)):
            cells = "".join(f"{value:>8.{digits}f}" for value in values[part])
            lines.append(f"  {name:8}{cells}")
    return "\n".join(lines)


def pair_table(pairs: Mapping[str, Any]) -> str:
    """The matrix of `--against` and the best match of each row; of many columns only the match."""
    columns = pairs["picture_of"]
    sounds = _short_names(pairs["sound_of"])
    width = max(map(len, (*sounds, "sound of"))) + 2
    matches = zip(sounds, pairs["similarity"], pairs["best"], pairs["own"], strict=True)
    if len(columns) > MOST_COLUMNS:
        lines = [f"{'sound of':{width}}{'own':>8}{'best':>8}   picture of"]
        for name, row, best, own in matches:
            cell = "" if own is None else f"{row[own]:.3f}"
            shown = os.path.basename(columns[best])
            lines.append(f"{name:{width}}{cell:>8}{row[best]:>8.3f}   {shown}")
        return "\n".join(lines)
    lines = [f"picture {number}: {name}" for number, name in enumerate(columns, 1)]
    lines.append(f"{'sound of':{width}}" + "".join(f"{n:>8}" for n in range(1, len(columns) + 1)))
    for name, row, best, _ in matches:
        cells = "".join(f"{value:>8.3f}" for value in row)
        lines.append(f"{name:{width}}{cells}   best: {best + 1}, {os.path.basename(columns[best])}")
    return "\n".join(lines)


def own_text(metrics: Mapping[str, Any]) -> str:
    """How the pairs that belong together compare with the others."""
    pairs = metrics["against"]
    galleries = {
        "audio_to_video": ("sound finds its picture", len(pairs["picture_of"])),
        "video_to_audio": ("picture finds its sound", len(pairs["sound_of"])),
    }
    lines = [f"own pairs: {metrics['num_pairs']}, of {metrics['own_is']}"]
    for key, (what, count) in galleries.items():
        row = metrics[key]
        lines.append(
            f"  {what} first among {count}: {row['R@1']:.1%} (chance {row['R@1 of chance']:.1%}), "
            f"median rank {row['median_rank']:g}"
        )
    similarity = f"  similarity of own pairs {metrics['similarity_of_own_pairs']:.3f}"
    if (other := metrics["similarity_of_other_pairs"]) is not None:
        similarity += f", of other pairs {other:.3f} (means)"
    return "\n".join([*lines, similarity])


def _short_names(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= MOST_NAME else f"...{name[3 - MOST_NAME :]}" for name in names]
