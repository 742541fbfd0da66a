"""From the options of the command line to a run: every mistake shows before any work starts."""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from kdcmae_fast.config import RunConfig
from kdcmae_fast.config_file import CONFIGS, Config, Settings, load_settings
from kdcmae_fast.finetune_config import FinetuneRunConfig
from kdcmae_fast.messages import require_folder
from kdcmae_fast.training.deepspeed_config import check_deepspeed_config, load_deepspeed_config
from kdcmae_fast.training.run_folder import saved_settings
from kdcmae_fast.training.start_model import with_start_model
from kdcmae_fast.training.tracking import require_wandb

logger = logging.getLogger(__name__)


def run_pretraining(options: argparse.Namespace) -> None:
    """Read the settings, train, draw the loss curves.

    options: settings, ds_config, recipe, output, resume, profile, as `pretrain.py` parses them.
    """
    config, deepspeed = _read_settings(RunConfig, options, "demo.yaml")
    from kdcmae_fast.training.engine import pretrain  # DeepSpeed: seconds, so after the checks

    world = pretrain(
        config, deepspeed, options.output, resume=options.resume, profile=options.profile
    )
    if world.is_main:
        _draw_losses(options.output)


def run_finetuning(options: argparse.Namespace) -> None:
    """The same for `finetune.py`."""
    config, deepspeed = _read_settings(
        FinetuneRunConfig, options, "finetune_demo.yaml", with_start_model
    )
    from kdcmae_fast.evaluation.class_metrics import require_metrics

    if config.data.evaluates:
        require_metrics()
    from kdcmae_fast.training.engine import run_task
    from kdcmae_fast.training.finetuning import Finetuning

    task = Finetuning(config)
    world = run_task(
        task, deepspeed, options.output, resume=options.resume, profile=options.profile
    )
    if world.is_main:
        _draw_losses(options.output)


def _read_settings(
    kind: type[Config],
    options: argparse.Namespace,
    demo: str,
    adjust: Callable[[Config, Path, Sequence[str]], Config] | None = None,
) -> tuple[Config, Settings]:
    """A run's settings and DeepSpeed's: from the run to go on with, or recipe and JSON.

    adjust: (settings, recipe, arguments) of a new run -> settings.
    """
    ours = [argument for argument in options.settings if not argument.startswith("ds.")]
    theirs = [argument for argument in options.settings if argument.startswith("ds.")]
    require_folder(options.output)
    saved = saved_settings(options.output) if options.resume else None
    origin = str(options.output / "config.json")
    if saved is not None and options.recipe is None:
        config = load_settings(kind, saved["config"], ours, origin=origin)
    else:
        recipe = options.recipe or _default(demo, "--recipe")
        config = load_settings(kind, recipe, ours)
        if adjust is not None:
            config = adjust(config, recipe, ours)
    if saved is not None and options.ds_config is None:
        deepspeed = check_deepspeed_config(saved["deepspeed"], theirs, origin)
    else:
        path = options.ds_config or _default("zero2.json", "--ds_config")
        deepspeed = load_deepspeed_config(path, theirs)
    if config.train.wandb:
        require_wandb()
    return config, deepspeed


def _default(name: str, option: str) -> Path:
    path = CONFIGS / name
    if not path.is_file():
        raise ValueError(f"{option} is missing, and there is no {path} to fall back on")
    return path


def _draw_losses(output: Path) -> None:
    try:
        from kdcmae_fast.evaluation.plots import plot_losses

        plot_losses(output / "log.jsonl", output / "loss.png")
    except ImportError as error:
        logger.warning("loss.png is not drawn: %s", error)
