"""The command line of `kdcmae retrieve`."""

import argparse
import os

from kdcmae_fast.evaluation.commands.options import (
    add_frames,
    add_source,
    is_first_process,
    not_negative,
    say_bad,
    source_of,
)

STRATEGIES = ("diagonal_mean", "diagonal_max", "mean", "max", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_source(parser, default_clips="all")
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        help="compare T frames of each clip: mean or largest cosine of frames at the same moment "
        "(diagonal_*) or of all T x T pairs of frames; all: a row for each (default: diagonal_mean "
        "for CAV-MAE Sync; other models: one frame of each clip)",
    )
    add_frames(parser)
    parser.add_argument(
        "--ties",
        choices=("average", "optimistic", "published"),
        default="average",
        help="rank of a pair as similar as other clips are: the middle of them, the best, or all "
        "of them as the CAV-MAE Sync evaluation counts",
    )
    parser.add_argument(
        "--features",
        metavar="DIR",
        help="keep features there, and read them from there if checkpoint, data settings, list and "
        "frames are the same",
    )
    parser.add_argument(
        "--examples",
        type=not_negative,
        default=3,
        metavar="N",
        help="with --output: queries of each direction to write as pictures and sounds; 0: none",
    )
    parser.add_argument("--output", metavar="DIR", help="write DIR/metrics.json and DIR/examples")


def run(options: argparse.Namespace) -> None:
    """Retrieve, print the table, write."""
    from kdcmae_fast.evaluation.published_retrieval import published_table
    from kdcmae_fast.evaluation.retrieval import retrieval_table, retrieve

    metrics = retrieve(
        source_of(options),
        strategy=options.strategy,
        ties=options.ties,
        num_frames=options.num_frames,
        features=options.features,
        examples=options.examples,
        output=options.output,
    )
    if not is_first_process():
        return
    if "features" in metrics:
        print(metrics["features"])
    print(retrieval_table(metrics))
    if "time_base" in metrics.get("frames", {}):
        print(f"\n{published_table(metrics)}")
    say_bad(metrics)
    if options.output:
        print(f"wrote {os.path.join(options.output, 'metrics.json')}")
