"""The command line of `kdcmae classify`."""

import argparse
import os
import sys

from kdcmae_fast.evaluation.commands.options import (
    add_source,
    is_first_process,
    positive,
    say_bad,
)

MODES = ("multimodal", "audio", "video", "missing_video", "missing_audio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_source(parser, default_clips="data.eval_clips, or all")
    parser.set_defaults(batch_size=None)
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="what the model is given (default: what it was trained on); missing_video and "
        "missing_audio: a model of both, given one",
    )
    parser.add_argument(
        "--frames",
        type=positive,
        metavar="N",
        help="frames of each clip, whose probabilities are averaged (default: data.eval_frames, or "
        "data.num_frames)",
    )
    parser.add_argument(
        "--loss",
        choices=("bce", "cross_entropy"),
        help="which metrics (default: of the training): bce, mAP, AUC and d' of clips with any "
        "number of labels; cross_entropy, top-1 and top-5 of one",
    )
    parser.add_argument("--output", metavar="DIR", help="write DIR/metrics.json, DIR/confusion.png")


def run(options: argparse.Namespace) -> None:
    """Classify, print the figures, write."""
    from kdcmae_fast.evaluation.classification import ClassifySource, classification_table, classify

    source = ClassifySource(
        checkpoint=options.checkpoint,
        recipe=options.recipe,
        overrides=tuple(options.settings),
        split=options.split,
        mode=options.mode,
        loss=options.loss,
        num_clips=options.num_clips,
        num_frames=options.frames,
        batch_size=options.batch_size,
        device=options.device,
        progress=sys.stderr.isatty(),
    )
    metrics = classify(source, options.output)
    if not is_first_process():
        return
    print(classification_table(metrics))
    say_bad(metrics)
    if options.output:
        print(f"wrote {os.path.join(options.output, 'metrics.json')}")
