"""The command line of `kdcmae retrieve`."""

import argparse
import os

from kdcmae_fast.evaluation.commands.options import add_source, say_bad, source_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_source(parser, default_clips="all")
    parser.add_argument(
        "--ties",
        choices=("average", "optimistic", "published"),
        default="average",
        help="rank of a pair as similar as other clips are: the middle of them, the best, or all "
        "of them as the CAV-MAE Sync evaluation counts",
    )
    parser.add_argument("--output", metavar="DIR", help="write DIR/metrics.json")


def run(options: argparse.Namespace) -> None:
    """Retrieve, print the table, write."""
    from kdcmae_fast.evaluation.retrieval import retrieval_table, retrieve

    metrics = retrieve(source_of(options), ties=options.ties, output=options.output)
    print(retrieval_table(metrics))
    say_bad(metrics)
    if options.output:
        print(f"wrote {os.path.join(options.output, 'metrics.json')}")
