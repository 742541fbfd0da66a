"""The `kdcmae` command. Each subcommand is thin: arguments in, one library call, text out.

Errors are one line on stderr and exit code 1; `--debug` shows the traceback. torch and the rest
are imported by the subcommand that needs them, so that `kdcmae --help` is quick.
"""

import argparse
import contextlib
import glob
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import kdcmae_fast
from kdcmae_fast.messages import Parser, report_error

DESCRIPTION = "Audio-visual masked autoencoders: pretrain, evaluate, convert."
EPILOG = "`kdcmae COMMAND --help` tells a command's options, units and defaults."


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, epilogs as written; no "(default: None)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default == [] or action.default is False
        return action.help if empty else super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 0 only on success.

    arguments: those of this process if None; where processes talk to each other (`pretrain`,
    `finetune`, and what a launcher started several of) it then ends at once, as the scripts do
    (`training.distributed.leave`), instead of returning.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if arguments is None:  # before torch starts OpenMP, as in pretrain.py
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = _run(given)
    except BrokenPipeError:
        # Whoever read our output has gone, as in `kdcmae settings | head`; keep the interpreter
        # from complaining when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, debug=debug)
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if arguments is None and (several or _command(sys.argv[1:]) in SCRIPTS):
        from kdcmae_fast.training.distributed import leave

        leave(code)
    return code


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command, or the one that lists them; imports nothing that they need."""
    if command is None:
        parser = Parser(prog="kdcmae", description=DESCRIPTION, epilog=EPILOG)
        version = f"kdcmae {kdcmae_fast.__version__}"
        parser.add_argument("--version", action="version", version=version)
        listed = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
        for name, entry in COMMANDS.items():
            listed.add_parser(name, help=entry.summary)
    else:
        entry = COMMANDS[command]
        parser = Parser(
            prog=f"kdcmae {command}",
            description=f"{entry.summary[0].upper()}{entry.summary[1:]}.",
            formatter_class=_Help,
        )
        entry.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _run(arguments: list[str]) -> int:
    command = _command(arguments)
    if command not in COMMANDS:
        build_parser().parse_args(arguments)
        raise AssertionError("unreachable: the parser knows no other command")
    arguments.remove(command)
    if command in SCRIPTS:
        # The script's own command line; nothing here reads those arguments.
        code: int = importlib.import_module(SCRIPTS[command]).main(arguments)
        return code
    options = build_parser(command).parse_intermixed_args(arguments)
    if not COMMANDS[command].shared:
        _require_one_process(command)
    COMMANDS[command].run(options)
    return 0


def _require_one_process(command: str) -> None:
    """ValueError in a process that a launcher started beside others: each would do all the work."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" in os.environ and size > 1:  # a batch script may well set the second one alone
        raise ValueError(
            f"kdcmae {command} works in one process, and a launcher started {size} (WORLD_SIZE); "
            "run it without the launcher"
        )


def _command(arguments: Sequence[str]) -> str | None:
    return next((word for word in arguments if word != "--debug"), None)


def _add_backends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="kind of tensors (default: CUDA where it is)"
    )


def _backends(options: argparse.Namespace) -> None:
    from kdcmae_fast.kernels import backends
    from kdcmae_fast.kernels.common.dispatch import NONE

    found = backends(options.device)
    width = max(map(len, found))
    for op, (impl, reason) in found.items():
        print(f"{op:{width}}  {impl:8}  {reason}")
    if unusable := sum(impl == NONE for impl, _ in found.values()):
        wanted = os.environ.get("KDCMAE_IMPL")
        raise ValueError(
            f"KDCMAE_IMPL={wanted}: {unusable} of {len(found)} ops cannot run so here; unset it, "
            "or take another machine or --device"
        )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prefix", nargs="?", default="", help="only this group, as in model.distill"
    )


def _settings(options: argparse.Namespace) -> None:
    from kdcmae_fast.config_help import presets_help, settings_help

    print(settings_help(options.prefix))
    if not options.prefix:
        print(f"\nSet by a system and by a preset:\n{presets_help()}")
        print("\nBatch size, accumulation, precision, clipping and ZeRO: the DeepSpeed JSON.")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="published .pth or .safetensors, or a folder")
    parser.add_argument("target", metavar="OUT", help="model folder, or published file, to write")
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="system to make of a published file, as kdc_mae (default: what the file is)",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="model settings that weights cannot tell, as num_heads=12 (`kdcmae settings model`)",
    )


def _convert(options: argparse.Namespace) -> None:
    from kdcmae_fast.config_file import merge, parse_argument
    from kdcmae_fast.convert import convert_checkpoint

    found: dict[str, Any] = {}
    for setting in options.settings:
        key, value = parse_argument("model." + setting.removeprefix("model."))
        if key in ("model.name", "model.source", "model.target"):  # `convert_checkpoint`'s own
            raise ValueError(f"argument {setting}: no setting of a model (the system is --name)")
        for part in reversed(key.split(".")):
            value = {part: value}
        merge(found, value)
    with _log_shown():
        convert_checkpoint(options.source, options.target, options.name, **found.get("model", {}))
    print(f"wrote {options.target}")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("report",), help="report: tables and plots of results")
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="results of `pytest benchmarks --results FILE` (default: benchmarks/results/*.jsonl)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write DIR/report.md, plots and DIR/metrics.json"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="make the tables between <!-- bench:NAME --> and <!-- /bench --> lines anew",
    )
    parser.add_argument(
        "--tables",
        default="benchmarks/tables.yaml",
        metavar="YAML",
        help="with --update: the tables and the documents that hold them",
    )


def _bench(options: argparse.Namespace) -> None:
    if options.update:
        from kdcmae_fast.bench.documents import update_documents

        if options.files or options.output:
            raise ValueError(f"--update takes no FILE and no --output; {options.tables} names both")
        changed = update_documents(options.tables)
        print("\n".join(f"updated {path}" for path in changed) or "all tables are up to date")
        return
    from kdcmae_fast.bench.report import report_text, write_report

    files = options.files or sorted(glob.glob("benchmarks/results/*.jsonl"))
    if not files:
        raise ValueError("benchmarks/results holds no *.jsonl here; name the results files")
    if options.output:
        metrics = write_report(files, options.output)
        pictures = len(metrics["pictures"])
        print(f"wrote report.md, metrics.json and {pictures} plots to {options.output}")
    else:
        print(report_text(files))


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """The library's messages on stderr, as they stand."""
    logger = logging.getLogger("kdcmae_fast")
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Command(NamedTuple):
    """One subcommand: its line in the list, its arguments, what it does with them.

    shared: the processes of a launcher share its work; other commands refuse more than one.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    shared: bool = False


def _of_module(summary: str, name: str, *, shared: bool = False) -> Command:
    """The command whose `add_arguments` and `run` are in module `name`, imported when called."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        importlib.import_module(name).add_arguments(parser)

    def run(options: argparse.Namespace) -> None:
        importlib.import_module(name).run(options)

    return Command(summary, add_arguments, run, shared)


def _parses_itself(_: Any) -> None:
    raise AssertionError("unreachable: `_run` hands the arguments on")


DATA = "kdcmae_fast.data"
EVALUATION = "kdcmae_fast.evaluation.commands"
SCRIPTS = {"pretrain": "kdcmae_fast.pretrain", "finetune": "kdcmae_fast.finetune"}

COMMANDS = {
    "pretrain": Command(
        "pretrain a model; takes what kdcmae_fast/pretrain.py takes",
        _parses_itself,
        _parses_itself,
    ),
    "finetune": Command(
        "fine-tune a pretrained model; takes what kdcmae_fast/finetune.py takes",
        _parses_itself,
        _parses_itself,
    ),
    "prepare": _of_module("make a dataset of videos", f"{DATA}.prepare.command"),
    "doctor": _of_module("check a dataset before a run", f"{DATA}.doctor.command"),
    "datasets": _of_module("published datasets, and lists of them", f"{DATA}.datasets.command"),
    "classify": _of_module(
        "what a fine-tuned model makes of clips", f"{EVALUATION}.classify", shared=True
    ),
    "average": _of_module("mean of the weights of several epochs", f"{EVALUATION}.average"),
    "retrieve": _of_module(
        "cross-modal retrieval, both ways", f"{EVALUATION}.retrieve", shared=True
    ),
    "inpaint": _of_module(
        "hide parts of clips, fill them in: pictures and sounds", f"{EVALUATION}.inpaint"
    ),
    "score": _of_module(
        "how well sound and picture of videos fit, moment by moment", f"{EVALUATION}.score"
    ),
    "features": _of_module(
        "features as NumPy or Parquet files", f"{EVALUATION}.features", shared=True
    ),
    "localize": _of_module(
        "where in a frame its sound comes from", f"{EVALUATION}.localize", shared=True
    ),
    "probe": _of_module(
        "simple classifiers on frozen features, with folds", f"{EVALUATION}.probe", shared=True
    ),
    "reconstruct": _of_module(
        "pictures of masked and reconstructed clips", f"{EVALUATION}.reconstruct"
    ),
    "report": _of_module("a page on runs and their evaluations", "kdcmae_fast.report.command"),
    "convert": Command("published checkpoint to model folder, or back", _add_convert, _convert),
    "backends": Command(
        "which implementation each op takes here, and why", _add_backends, _backends
    ),
    "bench": Command("tables and plots of benchmark results", _add_bench, _bench),
    "settings": Command("every setting with its default and unit", _add_settings, _settings),
}

if __name__ == "__main__":
    sys.exit(main())
