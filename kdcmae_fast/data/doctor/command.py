"""The command line of `kdcmae doctor`: options, progress bar, what it says at the end.

Imports nothing that is slow: `add_arguments` runs for --help too.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOUNDS = "data.source=sounds"  # the one source that a path may not tell
EPILOG = """\
Exit code 0: a run with these settings would start and stay under data.max_bad_share, and no shard
is damaged. Warnings do not change it. The share of bad clips is that of the clips read: --all is
exact. A clip is bad if the run's own reader refuses it, or one of its frames.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("path", metavar="PATH", help="manifest (JSON), or folder of shards, videos or sounds")
    add("--label-csv", metavar="CSV", help="index,mid,display_name (data.label_csv)")
    add("--against", metavar="PATH", help="another dataset: warn of clips that are in both")
    add("--samples", type=int, default=500, metavar="N", help="clips to read, drawn at random")
    add("--all", action="store_true", help="read every clip and every shard instead")
    add("--epochs", type=int, default=1, metavar="N", help="reads of a clip, as N epochs see it")
    add("--recipe", metavar="YAML", help="take data.* and model sizes from this file")
    add("--output", required=True, metavar="DIR", help="doctor.json, metrics.json and plots")
    add(
        "settings",
        nargs="*",
        metavar="key=value",
        help="data.* (and model.*) settings of the run, as in data.num_frames=16; "
        "data.num_workers reads in parallel; data.source=sounds: only the sounds of PATH",
    )


def run(options: argparse.Namespace) -> None:
    """Examine, print, write; ValueError (exit code 1) if a run would not go well."""
    from kdcmae_fast.data.doctor.checks import checks_table
    from kdcmae_fast.data.doctor.diagnosis import examine, write_diagnosis
    from kdcmae_fast.messages import require_folder

    require_folder(options.output)
    for name in ("samples", "epochs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
    config = _settings(options)
    with _progress_bar() as progress:
        diagnosis = examine(
            options.path,
            config.data,
            config.model,
            seed=config.train.seed,
            against=options.against,
            samples=None if options.all else options.samples,
            epochs=options.epochs,
            progress=progress,
        )
    print(checks_table(diagnosis.checks))
    plots = _can_plot()
    written = write_diagnosis(diagnosis, Path(options.output), plots=plots)
    print(f"wrote {', '.join(written)} to {options.output}")
    if not plots:
        print("no plots: Matplotlib is not installed (pip install kdcmae-fast[plots])")
    errors = [check for check in diagnosis.checks if check.result == "error"]
    if errors:
        first = errors[0]
        advice = f"; {first.advice}" if first.advice else ""
        raise ValueError(f"{options.path}: {first.name}: {first.detail}{advice}")


def _settings(options: argparse.Namespace) -> Any:
    """The run's settings, without the source and path, which are the command's argument."""
    from kdcmae_fast.config_file import load_config, read_yaml

    found = read_yaml(options.recipe) if options.recipe else {}
    settings = list(options.settings)
    for setting in settings:
        key = setting.partition("=")[0]
        known = key == "train.seed" or key.startswith(("data.", "model."))
        from_path = key in ("data.source", "data.path") and setting != SOUNDS
        if from_path or not known:
            raise ValueError(
                f"argument {setting}: data.* (but for source and path), model.* and train.seed "
                f"describe the run"
            )
    if options.label_csv:
        settings.append(f"data.label_csv={options.label_csv}")
    kept = ("name", "preset", "model", "data")
    groups: dict[str, Any] = {key: found[key] for key in kept if key in found}
    recipe_train = found.get("train")
    seed = recipe_train.get("seed", 0) if isinstance(recipe_train, dict) else 0
    train = {"train": {"steps": 1, "seed": seed}}  # `steps` only because a run must name a length
    recipe_data = found.get("data")
    source = recipe_data.get("source") if isinstance(recipe_data, dict) else None
    if source == "sounds" or SOUNDS in settings:
        settings += [SOUNDS, f"data.path={options.path}"]
    else:
        settings += ["data.source=synthetic"]  # until the path says what it is
    return load_config({**groups, **train}, settings, origin=options.recipe or "defaults")


def _can_plot() -> bool:
    from kdcmae_fast.figure import require_matplotlib

    try:
        require_matplotlib("plots")
    except ModuleNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda done, total: None
        return
    with tqdm(unit="clip", desc="doctor", disable=not sys.stderr.isatty(), leave=False) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell
