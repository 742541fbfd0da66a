"""The command line of `kdcmae average`."""

import argparse
from pathlib import Path

from kdcmae_fast.messages import require_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("target", metavar="OUT", help="model folder to write, a new one")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="MODEL",
        help="model folders; with --epochs the one run whose epochs they are",
    )
    parser.add_argument(
        "--epochs", metavar="FIRST-LAST", help="RUN/epochs/FIRST to RUN/epochs/LAST, as in 3-10"
    )


def run(options: argparse.Namespace) -> None:
    """Average, and say what was written."""
    from kdcmae_fast.evaluation.weight_average import average_weights, epoch_folders
    from kdcmae_fast.models.pretrained import WEIGHTS

    sources = options.sources
    require_folder(options.target, "OUT")
    if (Path(options.target) / WEIGHTS).exists():
        raise ValueError(
            f"OUT {options.target} is a model folder already, and stays as it is; name another one "
            "before the models to average, or remove it"
        )
    if options.epochs is not None:
        first, dash, last = options.epochs.partition("-")
        if not (dash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"--epochs {options.epochs}: expected two epochs, as in 3-10")
        if len(sources) > 1:
            raise ValueError(f"--epochs takes one run, not {len(sources)}: {' '.join(sources)}")
        sources = epoch_folders(sources[0], int(first), int(last))
    average_weights(sources, options.target)
    print(f"wrote the mean of {len(sources)} models to {options.target}")
