"""The command line of `kdcmae features`."""

import argparse
import sys

from kdcmae_fast.evaluation.commands.options import (
    add_frames,
    add_source,
    is_first_process,
    say_bad,
    source_of,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_source(parser, default_clips="all")
    parser.add_argument(
        "--frames",
        action="store_true",
        help="all frames of each clip instead of one (CAV-MAE Sync: always)",
    )
    add_frames(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="NAME.npz or NAME.parquet, or a folder for .npy files and metrics.json",
    )


def run(options: argparse.Namespace) -> None:
    """Extract, write, say how many."""
    from kdcmae_fast.evaluation.export import export_features

    metrics = export_features(
        source_of(options),
        options.output,
        frames=options.frames,
        num_frames=options.num_frames,
    )
    if not is_first_process():
        return
    say_bad(metrics)
    if broken := metrics["not_finite"]:
        print(
            f"features of {len(broken)} clips are not finite, the first is {broken[0]}",
            file=sys.stderr,
        )
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in metrics["shapes"].items())
    print(f"wrote features of {metrics['num_clips']} clips to {options.output}: {shapes}")
