"""A run's folder: may this run use it, what did it hold, and do the settings still agree?"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdcmae_fast.config_file import AnyRunConfig, Settings, settings_of, with_defaults
from kdcmae_fast.training.checkpoint import Progress, complete_checkpoints
from kdcmae_fast.training.provenance import git_commit, versions
from kdcmae_fast.training.schedule import RunLength

# Settings that a resumed run may change: they do not enter the computation, or only its length.
FREE = (
    "train.steps", "train.epochs", "train.log_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.wandb", "train.init_from",
    "data.num_workers", "data.path", "data.label_csv",
    "train.keep_epochs", "data.eval_path", "data.eval_clips", "data.eval_frames",
    "data.eval_batch_size",
)  # fmt: skip


def all_settings(config: AnyRunConfig, deepspeed: Mapping[str, Any]) -> Settings:
    """What config.json and every checkpoint hold: both sources of truth, versions and commit."""
    return {
        "config": settings_of(config),
        "deepspeed": dict(deepspeed),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def saved_settings(output: Path) -> Settings | None:
    """`all_settings` of the run in `output`; None if there is none, ValueError if lost."""
    path = output / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        checkpoints = complete_checkpoints(output / "checkpoints")
        if not checkpoints:
            return None
        raise ValueError(
            f"{path} is missing, but {output} holds a run that reached {checkpoints[0].name}; "
            f"restore it from settings in {checkpoints[0] / 'state.json'}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(saved, dict) or not {"config", "deepspeed"} <= saved.keys():
        raise ValueError(f"{path} is not a run's: expected the keys config and deepspeed")
    return saved


def find_checkpoint(output: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from.

    Raises ValueError when the folder holds a run and `resume` was not asked for.
    """
    checkpoints = complete_checkpoints(output / "checkpoints")
    if checkpoints and not resume:
        raise ValueError(
            f"{output} holds a run that reached {checkpoints[0].name}; pass --resume to go on "
            "with it, or another --output"
        )
    return checkpoints[0] if checkpoints else None


def check_same_run(output: Path, config: AnyRunConfig) -> None:
    """ValueError naming the settings that differ from the run in `output` and may not.

    A setting that did not exist when the run started had what is its default now.
    """
    saved = saved_settings(output)
    if saved is None:
        return
    before = with_defaults(type(config), saved["config"], str(output / "config.json"))
    old, new = dict(_flat(before)), dict(_flat(settings_of(config)))
    differing = [
        f"{key} was {old.get(key)}, now {new.get(key)}"
        for key in sorted({*old, *new} - set(FREE))
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise ValueError(
            f"{output}: a resumed run keeps its settings, but {'; '.join(differing)}; leave them "
            "out, or start a new --output with train.init_from=<run>/model"
        )


def check_layout(progress: Progress, length: RunLength, zero_stage: int) -> None:
    """ValueError when the saved state cannot go on as this run is laid out."""
    if progress.step > length.total_steps:
        raise ValueError(
            f"the run has done {progress.step} steps, more than the {length.total_steps} asked "
            "for; raise train.steps or train.epochs, or leave them out"
        )
    if progress.samples_per_step != length.samples_per_step:
        raise ValueError(
            f"the run took {progress.samples_per_step} clips a step on {progress.world_size} "
            f"processes, this one would take {length.samples_per_step}; set "
            "ds.train_micro_batch_size_per_gpu so that it x processes x "
            f"ds.gradient_accumulation_steps is {progress.samples_per_step}"
        )
    saved = progress.zero_stage
    if saved != zero_stage and not {saved, zero_stage} <= {1, 2}:
        raise ValueError(
            f"the run was trained with ZeRO stage {saved}, which stage {zero_stage} cannot read; "
            f"pass ds.zero_optimization.stage={saved}"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
