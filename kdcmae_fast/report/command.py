"""The command line of `kdcmae report`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder that `kdcmae pretrain` wrote; evaluations written inside it are shown, "
        "several runs are compared",
    )
    parser.add_argument(
        "--output",
        default="report.html",
        metavar="FILE",
        help="the page to write (a folder gets report.html)",
    )
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=40.0,
        metavar="MB",
        help="pictures, sounds and videos inside the page; those beyond are links to their files",
    )


def run(options: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    from kdcmae_fast.report import write_report

    path = write_report(options.runs, options.output, max_megabytes=options.max_megabytes)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")
