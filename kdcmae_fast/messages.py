"""How the commands speak of mistakes: one line on stderr, the same form in all of them."""

import argparse
import importlib.util
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

# Seconds that a process with nothing to add leaves the first one: as soon as one has ended, a
# launcher ends the others, told or not.
GRACE = 3.0
EXTRAS = {  # package -> the extra of kdcmae-fast that brings it
    **dict.fromkeys(("deepspeed", "tensorboard", "tqdm"), "train"),
    **dict.fromkeys(("av", "soundfile", "PIL"), "data"),
    "matplotlib": "plots",
    **dict.fromkeys(("sklearn", "torchmetrics", "pyarrow"), "eval"),
}


class UsageError(Exception):
    """Arguments that do not parse."""


class ToldElsewhere(Exception):
    """The first of several processes failed, and says why; this one has nothing to add."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of printing its usage, so that every mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def one_line(error: BaseException) -> str:
    """What a person should read of `error`: its message, after its type if that is unexpected."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and text == f"No module named {error.name!r}":
        return text + _install(error.name)
    foreseen = isinstance(error, ValueError | OSError | FloatingPointError | ImportError)
    if text and (foreseen or type(error).__module__.startswith("kdcmae_fast.")):
        return text
    name = type(error).__name__
    return f"{name}: {text} (--debug shows where)" if text else f"{name} (--debug shows where)"


def require_packages(purpose: str, *packages: str) -> None:
    """ModuleNotFoundError, saying what to install, unless all are there; imports none of them."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"{purpose} needs the package {package}{_install(package)}", name=package
            )


def _install(module: str | None) -> str:
    """What to do about a module that is not there, where an extra brings it."""
    extra = EXTRAS.get((module or "").partition(".")[0])
    return f"; `pip install kdcmae-fast[{extra}]`" if extra else ""


def require_folder(path: str | Path, option: str = "--output") -> None:
    """ValueError unless `path` is a folder one may write to, or can become one; makes nothing."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: {folder} is a file; give a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: no permission to write in {folder}; give another")


def report_error(error: BaseException, *, debug: bool) -> int:
    """Print `error` as one line, after its traceback with `debug`; returns the exit code.

    A process of several says which it is ("error on rank 3: ..."), but for the first; nothing of
    what the first one tells.
    """
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, ToldElsewhere):
        time.sleep(GRACE)
        return 1
    if debug:
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" on rank {rank}"
    # In one piece: torchrun unbuffers its processes, whose printed lines and line ends would mix.
    sys.stderr.write(f"error{where}: {one_line(error)}\n")
    return 1
