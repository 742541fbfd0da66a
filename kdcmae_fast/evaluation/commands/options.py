"""Options that the evaluations share: which model, which clips. Imports nothing that is slow."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcmae_fast.evaluation.source import EvaluationSource


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that say which model, and where its data settings are."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="model folder (or a run folder with one)"
    )
    parser.add_argument(
        "--recipe",
        metavar="YAML",
        help="take data.* and train.seed from this file (default: from config.json of the "
        "checkpoint's run, where there is one)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_source(parser: argparse.ArgumentParser, default_clips: str) -> None:
    """Options that say which model and which clips."""
    add_model(parser)
    parser.add_argument(
        "--split",
        choices=("heldout", "train"),
        help="of the synthetic clips (default: heldout); other sources have one list, data.path",
    )
    parser.add_argument(
        "--num-clips",
        type=positive,
        metavar="N",
        help=f"clips to take, from the first on (default: {default_clips})",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="clips per forward pass"
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="data.* settings and train.seed on top, as in data.source=folder data.path=clips",
    )


def add_frames(parser: argparse.ArgumentParser) -> None:
    """The option that says how many frames of a clip are taken."""
    parser.add_argument(
        "--num-frames",
        type=positive,
        metavar="T",
        help="frames of each clip, evenly spread (default: as many as the clips have, or "
        "data.num_frames)",
    )


def source_of(options: argparse.Namespace) -> "EvaluationSource":
    """The model and clips that the options of `add_source` name."""
    from kdcmae_fast.evaluation.source import EvaluationSource

    return EvaluationSource(
        checkpoint=options.checkpoint,
        recipe=options.recipe,
        overrides=tuple(options.settings),
        split=options.split,
        num_clips=options.num_clips,
        batch_size=options.batch_size,
        device=options.device,
        progress=sys.stderr.isatty(),
    )


def is_first_process() -> bool:
    """Whether this process speaks for all that a launcher started; without one it does."""
    return os.environ.get("RANK", "0") == "0"


def say_bad(metrics: dict[str, Any]) -> None:
    """The clips that were left out, on stderr."""
    bad = metrics["bad_clips"]
    for clip in bad[:10]:
        print(f"left out {clip['video_id']}: {clip['reason']}", file=sys.stderr)
    if len(bad) > 10:
        print(f"left out {len(bad) - 10} more (all are in metrics.json)", file=sys.stderr)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)
