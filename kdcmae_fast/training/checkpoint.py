"""Checkpoints that a kill at any moment cannot spoil, and the way back from them.

    checkpoints/step_300/   DeepSpeed's files, rng_<rank>.pt, untrained.pt, state.json
    checkpoints/latest      "step_300", for DeepSpeed's own tools

A checkpoint is written under a temporary name, flushed to disk and then renamed, so a folder named
step_<n> is always complete; `state.json` lists its files and sizes as a second safeguard.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from kdcmae_fast.training.distributed import World, is_lost_peer

SAVING = ".saving"  # the checkpoint being written
TRASH = ".trash"  # the checkpoint being removed
UNIVERSAL = ".universal"  # the checkpoint converted for another number of processes
PREFIX = "step_"

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """Where a run stands.

    step: optimizer steps done. samples: clips consumed by all ranks.
    world_size, samples_per_step, zero_stage: how it ran. bad_clips: [video id, reason] pairs.
    num_clips: of the dataset; None in checkpoints that do not tell.
    """

    step: int
    samples: int
    world_size: int
    samples_per_step: int
    zero_stage: int
    bad_clips: list[list[str]]
    num_clips: int | None = None


def save_checkpoint(
    engine: Any,
    folder: Path,
    progress: Progress,
    world: World,
    *,
    untrained: dict[str, torch.Tensor],
    settings: Any,
    keep: int,
) -> Path:
    """Write `folder`/step_<n> from all ranks and drop all but the newest `keep`.

    untrained: tensors of the model that the engine keeps no fp32 copy of.
    settings: the run's resolved configuration, stored beside the state.
    Raises OSError naming the checkpoint when it cannot be written; those before it stay.
    """
    final = folder / f"{PREFIX}{progress.step}"
    try:
        _write(engine, folder, final, progress, world, untrained, settings)
    except (OSError, RuntimeError) as error:
        if is_lost_peer(error):
            raise
        shutil.rmtree(folder / SAVING, ignore_errors=True)  # on a full disk others need the room
        raise OSError(_unwritten(final, error)) from error
    if world.is_main:
        for old in complete_checkpoints(folder)[keep:]:
            _discard(old)
    dist.barrier()
    return final


def _write(
    engine: Any,
    folder: Path,
    final: Path,
    progress: Progress,
    world: World,
    untrained: dict[str, torch.Tensor],
    settings: Any,
) -> None:
    saving = folder / SAVING
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(saving, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=SAVING, save_latest=False)
    torch.save(_rng_state(world.device), saving / f"rng_{world.rank}.pt")
    dist.barrier()
    if world.is_main:
        torch.save(untrained, saving / "untrained.pt")
        files = {p.name: p.stat().st_size for p in sorted(saving.iterdir()) if p.is_file()}
        record = {**progress._asdict(), "files": files, "settings": settings}
        write_text(saving / "state.json", json.dumps(record, indent=1))
        for path in [*saving.iterdir(), saving]:
            _flush(path)
        _discard(final)
        saving.rename(final)
        _flush(folder)
        write_text(folder / "latest", final.name)


def _unwritten(checkpoint: Path, error: Exception) -> str:
    """One line about a checkpoint that could not be written, and the way on."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    folder = checkpoint.parent
    if folder.is_dir():
        reason += f"; {shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there"
    before = complete_checkpoints(folder)
    way = f"--resume goes on from {before[0].name}" if before else "there is none before it"
    return f"{checkpoint}: cannot be written ({reason}); make room or give another --output; {way}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, newest first; damaged ones are named in the log."""
    found = []
    for path in checkpoint_folders(folder):
        problem = _problem(path)
        if problem:
            logger.warning("checkpoint %s is passed over: %s", path, problem)
        else:
            found.append(path)
    return found


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, damaged ones too, newest first."""
    numbers = [path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")]
    steps = sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)
    return [folder / f"{PREFIX}{step}" for step in steps]


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood when `checkpoint` was written."""
    return _progress_of(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The `settings` that `checkpoint` was written with."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["settings"]


def read_untrained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The `untrained` tensors that `checkpoint` was written with."""
    return torch.load(checkpoint / "untrained.pt", weights_only=True)


def needs_conversion(progress: Progress, world: World, zero_stage: int) -> bool:
    """True when the saved shards do not fit this run's processes or ZeRO stage."""
    return progress.zero_stage > 0 and (
        progress.world_size != world.size or progress.zero_stage != zero_stage
    )


def load_checkpoint(engine: Any, checkpoint: Path, world: World, *, convert: bool) -> None:
    """Put weights, optimizer and random state back into `engine`.

    convert: go through DeepSpeed's universal format (the engine must have been built for it);
    random state is per process and is then left as the seed made it.
    """
    if convert:
        universal = checkpoint.parent / UNIVERSAL
        failure = [_convert(checkpoint, universal) if world.is_main else ""]
        dist.broadcast_object_list(failure)
        if failure[0]:
            raise ValueError(f"{checkpoint}: cannot be converted for {world.size} processes: "
                             f"{failure[0]}")  # fmt: skip
        settings = [_hyperparameters(group) for group in engine.basic_optimizer.param_groups]
        with _only_errors():
            loaded, _ = engine.load_checkpoint(str(universal), tag=checkpoint.name)
        _repair_optimizer(engine.basic_optimizer, settings)
        dist.barrier()
        if world.is_main:
            shutil.rmtree(universal)
    else:
        try:
            loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
            rng = torch.load(checkpoint / f"rng_{world.rank}.pt", weights_only=True)
        except Exception as error:  # damaged files break unpickling in any way there is
            raise ValueError(
                f"{checkpoint}: damaged ({type(error).__name__}); remove it to go on from the one "
                "before"
            ) from error
        _restore_rng_state(rng, world.device)
    if loaded is None:
        raise ValueError(f"{checkpoint}: DeepSpeed found nothing to load there")


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed run left half done."""
    for name in (SAVING, TRASH, UNIVERSAL):
        shutil.rmtree(folder / name, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        partial.replace(path)
    except OSError as error:  # of a full disk it names no file
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _progress_of(record: dict[str, Any]) -> Progress:
    return Progress(
        **{
            name: record[name]
            for name in Progress._fields
            if name in record or name not in Progress._field_defaults
        }
    )


def _problem(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used; empty if it can."""
    try:
        record = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        files = record["files"]
        _progress_of(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its state.json is missing or unreadable ({type(error).__name__})"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or not {size} bytes"
    return ""


def _convert(checkpoint: Path, universal: Path) -> str:
    """DeepSpeed's own conversion, in a process of its own; returns why it failed, or nothing."""
    shutil.rmtree(universal, ignore_errors=True)
    universal.mkdir()
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
        "--input_folder", str(checkpoint), "--output_folder", str(universal / checkpoint.name),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _repair_optimizer(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Undo two slips of DeepSpeed's universal loader for ZeRO 3.

    It gives every parameter group the first one's weight decay, and all states one shared `step`,
    which the optimizer then counts up once per state instead of once per step.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


@contextmanager
def _only_errors() -> Iterator[None]:
    """Keep DeepSpeed's notes on its universal format (tensor parallelism is not set, ...) quiet."""
    theirs = logging.getLogger("DeepSpeed")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint; its name goes first, so that no half-removed one looks complete."""
    if checkpoint.exists():
        trash = checkpoint.with_name(TRASH)
        shutil.rmtree(trash, ignore_errors=True)
        checkpoint.rename(trash)
        shutil.rmtree(trash)


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def _restore_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "device" in states:
        torch.cuda.set_rng_state(states["device"], device)
