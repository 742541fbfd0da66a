"""A run's folder: may this run use it, what did it hold, and do the settings still agree?"""

import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import distributed as dist

from kdcmae_fast.config import RunConfig
from kdcmae_fast.config_file import AnyRunConfig, Settings, settings_of, with_defaults
from kdcmae_fast.training.checkpoint import Progress, checkpoint_folders, complete_checkpoints
from kdcmae_fast.training.deepspeed_config import accumulation_of, uses_bf16
from kdcmae_fast.training.distributed import World, gather_lists
from kdcmae_fast.training.provenance import git_commit, versions
from kdcmae_fast.training.schedule import RunLength

# Settings that a resumed run may change: they do not enter the computation, or only its length.
FREE = (
    "train.steps", "train.epochs", "train.log_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.wandb", "train.init_from",
    "data.num_workers", "data.path", "data.label_csv", "data.max_bad_share",
    "model.activation_checkpointing", "model.attention_impl",
    "train.keep_epochs", "data.eval_path", "data.eval_clips", "data.eval_frames",
    "data.eval_batch_size",
)  # fmt: skip

# DeepSpeed's settings that `check_layout` and `same_negatives` look at, or that change no number.
LAYOUT = (
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16.enabled",
    "zero_optimization.stage", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state",
)  # fmt: skip
SHARE = "--output must be one folder that all machines share"
PATIENCE = 60  # seconds: a network file system may show what others wrote only after a while

logger = logging.getLogger(__name__)


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

    Raises ValueError when the folder holds a run and `resume` was not asked for, or when all its
    checkpoints are damaged: starting anew would replace what may be repaired.
    """
    checkpoints = complete_checkpoints(output / "checkpoints")
    damaged = checkpoint_folders(output / "checkpoints")
    if damaged and not checkpoints:
        raise ValueError(
            f"{output}: none of its checkpoints is complete (the last is {damaged[0].name}); "
            f"repair one, or remove {output / 'checkpoints'} to start from the beginning"
        )
    if checkpoints and not resume:
        raise ValueError(
            f"{output} holds a run that reached {checkpoints[0].name}; pass --resume to go on "
            "with it, or another --output"
        )
    return checkpoints[0] if checkpoints else None


def check_same_start(output: Path, start: Path | None, world: World) -> None:
    """ValueError on every process unless all of them go on from the same checkpoint."""
    names = gather_lists([start and start.name], world)
    for rank, name in enumerate(names):
        if name != names[0]:
            raise ValueError(
                f"{output} holds {names[0] or 'no checkpoint'} for process 0, "
                f"{name or 'no checkpoint'} for process {rank}; {SHARE}"
            )


def check_shared(output: Path, world: World, patience: float = PATIENCE) -> None:
    """ValueError on every process unless all of them see the folder that process 0 writes to.

    Checkpoints written to folders of each machine's own could not be read again. patience: seconds
    to wait for what process 0 wrote.
    """
    names = [f".shared_{secrets.token_hex(8)}" if world.is_main else ""]
    if world.size > 1:
        dist.broadcast_object_list(names)
    token = output / names[0]
    if world.is_main:
        token.touch()
    dist.barrier()
    deadline = time.monotonic() + patience
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = gather_lists([] if token.exists() else [world.rank], world)
    if world.is_main:
        token.unlink()
    if blind:
        raise ValueError(
            f"{output}: process {blind[0]} does not see what process 0 writes; {SHARE}"
        )


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


def check_layout(
    progress: Progress, length: RunLength, zero_stage: int, *, num_clips: int | None = None
) -> None:
    """ValueError when the saved state cannot go on as this run is laid out.

    num_clips: of the dataset; None leaves it unchecked.
    """
    if None not in (progress.num_clips, num_clips) and progress.num_clips != num_clips:
        raise ValueError(
            f"the run was trained on {progress.num_clips} clips, data.path has {num_clips} now, "
            "which gives every step other ones; give the clips as they were, or start a new "
            "--output with train.init_from=<run>/model"
        )
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


def check_deepspeed(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError when DeepSpeed's settings changed to what cannot read the saved state.

    Other changes, of what enters the computation, are named in the log.
    """
    if uses_bf16(before) != uses_bf16(now):
        saved = str(uses_bf16(before)).lower()
        raise ValueError(
            f"the run was trained with bf16.enabled={saved}, and its state can be read so only; "
            f"pass ds.bf16.enabled={saved}"
        )
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in sorted({*old, *new} - set(LAYOUT)):
        if old.get(key) != new.get(key):
            logger.warning("ds.%s was %s, is now %s", key, old.get(key), new.get(key))


def same_negatives(
    config: AnyRunConfig,
    before: Mapping[str, Any],
    progress: Progress,
    length: RunLength,
    size: int,
) -> bool:
    """Whether InfoNCE compares as many clips as when `progress` was saved; a warning if not.

    before: DeepSpeed's settings then. size: processes now. Steps of as many clips can be split into
    micro-batches in more than one way.
    """
    if not isinstance(config, RunConfig) or config.train.contrast_over == "step":
        return True
    if config.model.contrast_loss_weight == 0 or config.model.modalities != "both":
        return True
    was, is_now = progress.samples_per_step // accumulation_of(before), length.global_batch
    if config.model.negatives == "local":
        was, is_now = was // progress.world_size, is_now // size
    if was != is_now:
        logger.warning(
            "InfoNCE compared %d clips until now and compares %d from here on: another objective; "
            "train.contrast_over=step does not depend on how a step is split", was, is_now,
        )  # fmt: skip
    return was == is_now


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
