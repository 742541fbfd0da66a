"""A training run: prepare, train, write the results. Reads from top to bottom."""

import logging
from contextlib import closing
from pathlib import Path

from torch import Tensor
from torch import distributed as dist

from kdcmae_fast.config import RunConfig
from kdcmae_fast.config_file import Settings
from kdcmae_fast.data import BadClip, TooManyBadClips
from kdcmae_fast.training import checkpoint, report
from kdcmae_fast.training.distributed import World, gather_lists, join_world, naming_lost_peers
from kdcmae_fast.training.optimizers import set_learning_rate
from kdcmae_fast.training.profiling import profiler
from kdcmae_fast.training.run import Run, batches_of, prepare, tracker_of
from kdcmae_fast.training.schedule import lr_factor
from kdcmae_fast.training.step import Meter, train_step
from kdcmae_fast.training.stopping import StopRequest
from kdcmae_fast.training.task import Pretraining, Task
from kdcmae_fast.training.weights import full_weights

logger = logging.getLogger(__name__)


def pretrain(
    config: RunConfig,
    deepspeed: Settings,
    output: Path,
    *,
    resume: bool = False,
    profile: bool = False,
) -> World:
    """Pretrain `config` on every process of the launch; see `run_task`."""
    return run_task(Pretraining(config), deepspeed, output, resume=resume, profile=profile)


def run_task(
    task: Task, deepspeed: Settings, output: Path, *, resume: bool = False, profile: bool = False
) -> World:
    """Train on every process of the launch and fill the run folder `output`.

    deepspeed: DeepSpeed's JSON as `load_deepspeed_config` reads it.
    resume: go on from the newest complete checkpoint in `output`, if there is one.
    profile: write a torch profiler trace of a few steps.

    On SIGTERM or SIGINT the run saves a checkpoint at the next logging step and returns.
    Raises ValueError for settings that cannot work, TooManyBadClips, and FloatingPointError when a
    loss is not finite.
    """
    world = join_world()
    with StopRequest() as stop, naming_lost_peers(world):
        run = prepare(task, deepspeed, output, world, resume=resume)
        if run is None:
            logger.info("%s: the run is finished, nothing to do", output)
        elif train(run, stop, profile=profile):
            finish(run)
        else:
            logger.info("%s: stopped as asked; pass --resume to go on", output)
    return world


def train(run: Run, stop: StopRequest, *, profile: bool) -> bool:
    """All steps that remain; False if the run was asked to stop before the last one."""
    total = run.length.total_steps
    task = run.task
    front_end = task.front_end()
    meter = Meter(run.length, run.world, run.first_step, skipped=run.engine.skipped_steps)
    contrast_over = run.config.train.contrast_over
    new_bad: list[BadClip] = []
    with (
        closing(batches_of(run)) as batches,
        closing(tracker_of(run)) as tracker,
        profiler(run.output, run.world, enabled=profile) as trace,
    ):
        for step in range(run.first_step, total):
            lr = _learning_rate(run, step)
            set_learning_rate(run.engine.optimizer, lr)
            losses, bad = train_step(
                run.engine,
                batches,
                front_end,
                run.world,
                step,
                contrast_over=contrast_over,
                forward=task.forward,
            )
            new_bad += bad
            trace.step()
            done = step + 1
            saving = done == total or _due(done, run.config.train.checkpoint_every)
            epoch = run.length.epoch_ended(done) if task.watches_epochs else 0
            if not (saving or epoch or step == 0 or _due(done, run.config.train.log_every)):
                continue

            # From here on the host waits for the device and the ranks agree on what happened.
            flags = {"bad": len(new_bad), "stop": int(stop.requested)}
            gradients = meter.gradients(done, run.engine)
            record, counts = meter.record(done, losses, lr, flags)
            record.update(gradients)
            if epoch:  # before the checkpoint: a run killed in between does it again
                record.update(task.end_epoch(run, epoch))
                meter.restart()
            tracker.write(record)
            if counts["bad"]:
                _report_bad_clips(run, new_bad, done)
                new_bad = []
            stopping = counts["stop"] > 0 and done < total
            if saving or stopping:
                save(run, done)
                meter.restart()
            if stopping:
                return False
    return True


def save(run: Run, step: int) -> None:
    """Checkpoint after `step` optimizer steps."""
    progress = checkpoint.Progress(
        step=step,
        samples=step * run.length.samples_per_step,
        world_size=run.world.size,
        samples_per_step=run.length.samples_per_step,
        zero_stage=run.engine.zero_optimization_stage(),
        bad_clips=[list(row) for row in run.bad_clips.rows()],
        num_clips=len(run.dataset),
    )
    checkpoint.save_checkpoint(
        run.engine,
        run.output / "checkpoints",
        progress,
        run.world,
        untrained=run.untrained,
        settings=run.settings,
        keep=run.config.train.keep_checkpoints,
    )


def finish(run: Run) -> None:
    """The final fp32 weights as a model folder, then metrics.json, which marks the run finished."""
    weights = full_weights(run.engine, on_main=run.world.is_main)
    if run.world.is_main:
        write_model(run, run.output / "model", weights)
    more = run.task.finish(run)
    if run.world.is_main:
        figures = {
            "command": run.task.command,
            **more,
            "steps": run.length.total_steps,
            "samples": run.length.total_steps * run.length.samples_per_step,
            "world_size": run.world.size,
            "bad_clips": [row._asdict() for row in run.bad_clips.rows()],
        }
        report.write_metrics(run.output, figures, run.settings)
        logger.info("%s: finished; weights in model/, figures in metrics.json", run.output)
    dist.barrier()


def write_model(run: Run, folder: Path, weights: dict[str, Tensor]) -> None:
    """A model folder of `full_weights` and what is not trained; on one rank."""
    model = run.task.empty_model()
    model.save_pretrained(folder, state_dict={**run.untrained, **weights})


def _learning_rate(run: Run, step: int) -> float:
    return run.config.optim.lr * lr_factor(
        step,
        total_steps=run.length.total_steps,
        epoch=run.length.epoch(step),
        optim=run.config.optim,
    )


def _report_bad_clips(run: Run, mine: list[BadClip], step: int) -> None:
    """Merge the ranks' bad clips, name the new ones, stop everywhere when there are too many.

    What was learned until then is saved, to go on from with a higher limit or repaired clips.
    """
    new = run.bad_clips.add(BadClip(*row) for row in gather_lists(mine, run.world))
    if run.world.is_main:
        report.write_bad_clips(run.output, run.bad_clips.rows())
        for clip in new:
            logger.warning("bad clip %s: %s", clip.video_id, clip.reason)
    try:
        run.bad_clips.check(step * run.length.samples_per_step)
    except TooManyBadClips:
        save(run, step)
        raise


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
