"""The command line of `kdcmae probe`."""

import argparse
import os

from kdcmae_fast.evaluation.commands.options import (
    add_source,
    is_first_process,
    positive,
    say_bad,
    source_of,
)

EPILOG = """\
synthetic clips:  kdcmae probe --checkpoint runs/demo --num-clips 1000 --test-clips 500
two lists:        kdcmae probe --checkpoint DIR --test-path test.json data.source=manifest \\
                      data.path=train.json data.label_csv=labels.csv
lists of folds:   kdcmae probe --checkpoint DIR --test-path 'lists/fold{fold}_test.json' \\
                      data.source=sounds 'data.path=lists/fold{fold}_train.json' \\
                      data.label_csv=lists/labels.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.epilog = EPILOG
    add_source(parser, default_clips="all of the training part")
    add = parser.add_argument
    add(
        "--classifier",
        choices=("linear", "svm", "knn"),
        default="linear",
        help="logistic regression, linear SVM, or k nearest neighbours by cosine; C or k is "
        "selected on clips held out from the training part",
    )
    add(
        "--modality",
        choices=("audio", "video", "both"),
        help="features to take, both side by side (default: all that model and clips have)",
    )
    add(
        "--test-path",
        metavar="PATH",
        help="list to test on, of the kind of data.path, which is the one to train on; {fold} in "
        "both stands for 1, 2, ...",
    )
    add(
        "--test-clips",
        type=positive,
        metavar="N",
        help="clips to test on, from the first on (default: all of the test part)",
    )
    add(
        "--folds",
        type=positive,
        metavar="K",
        help="draw K folds from the clips: each is tested once on a probe of the others; with "
        "{fold}: how many lists there must be",
    )
    add("--seed", type=int, default=0, help="of drawn folds and validation clips")
    add("--output", metavar="DIR", help="write DIR/metrics.json")


def run(options: argparse.Namespace) -> None:
    """Probe, print the table, write."""
    from kdcmae_fast.evaluation.probing import probe, probe_table

    metrics = probe(
        source_of(options),
        modality=options.modality,
        classifier=options.classifier,
        folds=options.folds,
        test_path=options.test_path,
        test_clips=options.test_clips,
        seed=options.seed,
        output=options.output,
    )
    if not is_first_process():
        return
    print(probe_table(metrics))
    say_bad(metrics)
    if options.output:
        print(f"wrote {os.path.join(options.output, 'metrics.json')}")
