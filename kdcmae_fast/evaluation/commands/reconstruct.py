"""The command line of `kdcmae reconstruct`."""

import argparse

from kdcmae_fast.evaluation.commands.options import add_source, say_bad, source_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_source(parser, default_clips="8, or all if fewer")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="write DIR/<clip>.png and DIR/metrics.json"
    )


def run(options: argparse.Namespace) -> None:
    """Reconstruct, print the errors, write."""
    from kdcmae_fast.evaluation.reconstruction import reconstruct

    metrics = reconstruct(source_of(options), options.output)
    say_bad(metrics)
    errors = metrics["mean_error"]
    print(
        f"mean squared error on masked patches: video {errors['video']:.4f}, "
        f"audio {errors['audio']:.4f}"
        + (" (1 is a patch guessed as flat)" if metrics["norm_pix_loss"] else "")
    )
    print(f"wrote {len(metrics['clips'])} pictures and metrics.json to {options.output}")
