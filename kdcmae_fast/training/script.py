"""The command line that `pretrain.py` and `finetune.py` share."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from kdcmae_fast.messages import Parser, report_error


def run_script(
    name: str,
    description: str,
    demo: str,
    run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Parse `arguments` (None: those of this process) and `run` them; returns the exit code.

    name: of the script, and of the command that hands it its arguments.
    demo: the recipe when none is given.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    on_main = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if on_main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    # DeepSpeed calls collectives by names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    prog = f"{name}.py" if arguments is None else f"kdcmae {name}"
    try:
        options = _parser(name, description, demo, prog).parse_intermixed_args(given)
        if options.local_rank >= 0:
            os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
        run(options)
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, debug="--debug" in given)
    return 0


def _parser(name: str, description: str, demo: str, prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="settings on top of the recipe's")
    add("--ds_config", type=Path, help="DeepSpeed's JSON; default configs/zero2.json, or the run's")
    add("--recipe", type=Path, help=f"YAML; default configs/{demo}, with --resume the run's own")
    add("--output", type=Path, default=Path("runs", name), help="run folder; default %(default)s")
    add("--resume", action="store_true", help="go on from the newest complete checkpoint, if any")
    add("--profile", action="store_true", help="write a torch profiler trace of steps 4 to 6")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser
