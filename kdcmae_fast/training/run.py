"""A run, built from its settings or taken up from a checkpoint."""

import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from kdcmae_fast.config_file import AnyRunConfig, Settings
from kdcmae_fast.data import (
    BadClip,
    BadClips,
    ClipDataset,
    RawBatch,
    make_loader,
)
from kdcmae_fast.kernels.attention.backends import problem
from kdcmae_fast.kernels.attention.op import HALF_ONLY
from kdcmae_fast.training import checkpoint, deepspeed_config, report, run_folder
from kdcmae_fast.training.distributed import World
from kdcmae_fast.training.optimizers import build_optimizer
from kdcmae_fast.training.schedule import RunLength, run_length
from kdcmae_fast.training.stopping import shielded_children
from kdcmae_fast.training.task import Task
from kdcmae_fast.training.tracking import Tracker, open_tracker
from kdcmae_fast.training.weights import untrained_tensors

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a run is made of, the same on every rank but for `world.rank`."""

    task: Task
    config: AnyRunConfig
    settings: Settings  # both sources of truth, as config.json holds them
    output: Path
    world: World
    dataset: ClipDataset
    length: RunLength
    engine: Any  # DeepSpeed's
    untrained: dict[str, Tensor]  # what the engine keeps no fp32 master of
    bad_clips: BadClips
    first_step: int  # 0, or where a resumed run goes on


def prepare(
    task: Task, deepspeed: Settings, output: Path, world: World, *, resume: bool
) -> Run | None:
    """Build the run or take it up again; None if it is finished already."""
    config = task.config
    deepspeed_config.check_zero_settings(deepspeed)
    _check_attention(config.model.attention_impl, world, bf16=deepspeed_config.uses_bf16(deepspeed))
    check_modalities(config)
    start = run_folder.find_checkpoint(output, resume=resume)
    run_folder.check_same_start(output, start, world)
    if start is not None:
        run_folder.check_same_run(output, config)
    dataset = task.open_clips()
    length = run_length(
        config.train,
        num_clips=len(dataset),
        global_batch=deepspeed["train_micro_batch_size_per_gpu"] * world.size,
        accumulation=deepspeed_config.accumulation_of(deepspeed),
    )
    task.check(length)
    if report.is_finished(
        output, length.total_steps, resume=resume, has_checkpoints=start is not None
    ):
        return None
    zero_stage = deepspeed_config.zero_stage_of(deepspeed)
    progress = None
    if start is not None:
        progress = checkpoint.read_progress(start)
        before = checkpoint.read_settings(start)["deepspeed"]
        run_folder.check_layout(progress, length, zero_stage, num_clips=len(dataset))
        run_folder.check_deepspeed(before, deepspeed)
        run_folder.same_negatives(config, before, progress, length, world.size)
    settings = run_folder.all_settings(config, deepspeed)
    dist.barrier()  # every rank has looked before rank 0 writes
    if world.is_main:
        output.mkdir(parents=True, exist_ok=True)
        checkpoint.clear_leftovers(output / "checkpoints")
        report.write_config(output, settings)
    run_folder.check_shared(output, world)

    model = task.initial_model(resumed=start is not None)
    task.connect(model, world)
    untrained = untrained_tensors(model)
    bad_clips = BadClips(len(dataset), config.data.max_bad_share)
    convert = progress is not None and checkpoint.needs_conversion(progress, world, zero_stage)
    engine = _build_engine(model, task, deepspeed, world, load_universal=convert)
    first_step = 0
    if start is not None and progress is not None:
        checkpoint.load_checkpoint(engine, start, world, convert=convert)
        untrained = checkpoint.read_untrained(start)
        bad_clips.add(BadClip(*row) for row in progress.bad_clips)
        first_step = progress.step
        logger.info("resumed from %s", start)
    return Run(
        task, config, settings, output, world, dataset, length, engine, untrained, bad_clips,
        first_step,
    )  # fmt: skip


def check_modalities(config: AnyRunConfig) -> None:
    """ValueError if the model needs what the clips do not have."""
    if config.data.source == "sounds" and config.model.modalities != "audio":
        raise ValueError(
            f"data.source=sounds has no pictures, and model.modalities={config.model.modalities} "
            "needs them: set model.modalities=audio, or give clips with pictures"
        )


def _check_attention(impl: str, world: World, *, bf16: bool) -> None:
    """ValueError if the back-end asked for would fail in the first forward pass."""
    refused = "" if impl == "auto" else problem(impl, world.device.type)
    if not refused and impl in HALF_ONLY and not bf16:
        refused = "it takes 16-bit tensors only; pass ds.bf16.enabled=true"
    if refused:
        raise ValueError(f"model.attention_impl={impl}: not available for this run: {refused}")


def _build_engine(
    model: Any, task: Task, deepspeed: Settings, world: World, *, load_universal: bool
) -> Any:
    import deepspeed as ds

    optimizer = build_optimizer(
        model,
        task.config.optim,
        zero_stage=deepspeed_config.zero_stage_of(deepspeed),
        bf16=deepspeed_config.uses_bf16(deepspeed),
        lr_scale=task.lr_scale,
    )
    engine, *_ = ds.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config.for_engine(deepspeed, load_universal=load_universal),
    )
    torch.manual_seed(task.config.train.seed + 1 + world.rank)
    return engine


def batches_of(run: Run) -> Generator[RawBatch, None, None]:
    """This rank's batches from the run's first step on, without end."""
    loader = make_loader(
        run.dataset,
        data=run.config.data,
        seed=run.config.train.seed,
        micro_batch_size=run.length.global_batch // run.world.size,
        rank=run.world.rank,
        world_size=run.world.size,
        start_sample=run.first_step * run.length.samples_per_step,
        frames_per_clip=run.config.model.frames_per_clip if run.config.pairs_frames else None,
    )
    batches = iter(loader)
    with shielded_children():  # the first batch starts the workers
        first = next(batches)
    yield first
    yield from batches


def tracker_of(run: Run) -> Tracker:
    """The run's logs; silent on all ranks but 0."""
    if not run.world.is_main:
        return Tracker()
    return open_tracker(
        run.output,
        start_step=run.first_step,
        total_steps=run.length.total_steps,
        wandb=run.config.train.wandb,
        settings=run.settings,
    )
