"""What is written beside a run: config.json at the start, metrics.json at the end."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcmae_fast.data import BadClip
from kdcmae_fast.training.checkpoint import write_text
from kdcmae_fast.training.tracking import LOSSES

RUNS = ("pretrain", "finetune")  # commands whose metrics.json marks a finished run


def write_config(output: Path, settings: Mapping[str, Any]) -> None:
    """config.json: resolved settings, versions and commit."""
    write_text(output / "config.json", json.dumps(settings, indent=1))


def write_metrics(output: Path, figures: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """metrics.json: `figures`, start and final losses from log.jsonl, and how they came about."""
    records = read_log(output / "log.jsonl")
    losses = {
        f"{when}_losses": _losses(record)
        for when, record in zip(("start", "final"), records[:1] + records[-1:], strict=False)
    }
    rates = [record["clips_per_second"] for record in records[1:]]
    record = {
        **figures,
        **losses,
        "clips_per_second": statistics.median(rates) if rates else None,
        **settings,
    }
    write_text(output / "metrics.json", json.dumps(record, indent=1))


def write_bad_clips(output: Path, clips: Sequence[BadClip]) -> None:
    """bad_clips.jsonl: name and reason of every clip that was left out."""
    lines = [json.dumps(clip._asdict()) + "\n" for clip in clips]
    write_text(output / "bad_clips.jsonl", "".join(lines))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log.jsonl in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finished_steps(output: Path) -> int | None:
    """Steps of the finished run in `output`; None if there is none."""
    path = output / "metrics.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return record.get("steps") if record.get("command") in RUNS else None


def is_finished(output: Path, total_steps: int, *, resume: bool, has_checkpoints: bool) -> bool:
    """Whether the run in `output` is done with its `total_steps` and may be left as it is.

    ValueError where another run would replace a finished one whose checkpoints were removed.
    """
    steps = finished_steps(output)
    if steps is None:
        return False
    if resume and steps == total_steps:
        return True
    if not has_checkpoints:
        raise ValueError(
            f"{output} holds a finished run of {steps} steps without its checkpoints; give another "
            f"--output (train.init_from={output / 'model'} starts from its weights)"
        )
    return False


def _losses(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in LOSSES if name in record}
