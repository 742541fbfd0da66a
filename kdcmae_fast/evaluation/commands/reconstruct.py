"""The command line of `kdcmae reconstruct`."""

import argparse

from kdcmae_fast.evaluation.commands.options import add_source, say_bad, source_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Pictures of clips under the masks of training. `kdcmae inpaint` hides what you name, "
        "makes the sound audible and prints baselines."
    )
    add_source(parser, default_clips="8, or all if fewer")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="write DIR/<clip>.png and DIR/metrics.json"
    )


def run(options: argparse.Namespace) -> None:
    """Reconstruct, print the errors, write."""
    from kdcmae_fast.evaluation.inpainting import inpainting_table
    from kdcmae_fast.evaluation.reconstruction import reconstruct

    metrics = reconstruct(source_of(options), options.output)
    say_bad(metrics)
    print(inpainting_table(metrics))
    print(f"wrote {len(metrics['pictures'])} pictures and metrics.json to {options.output}")
