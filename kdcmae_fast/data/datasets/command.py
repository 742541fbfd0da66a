"""The command line of `kdcmae datasets`.

Imports nothing that is slow: `add_arguments` runs for --help too.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="tell all of this dataset (default: list all)")
    add("--root", metavar="DIR", help="the dataset as published: make lists of it")
    add("--output", metavar="DIR", help="where the lists, labels.csv and missing.csv go")


def run(options: argparse.Namespace) -> None:
    """Print the table, one dataset, or make lists of one on disk."""
    from kdcmae_fast.data.datasets.write import (
        dataset_text,
        datasets_table,
        lists_text,
        write_lists,
    )

    if bool(options.root) != bool(options.output) or (options.root and not options.name):
        raise ValueError("NAME, --root and --output go together: a dataset, its folder, the lists'")
    if options.root:
        metrics = write_lists(options.name, options.root, options.output)
        print(lists_text(metrics, options.output))
    else:
        print(dataset_text(options.name) if options.name else datasets_table())
