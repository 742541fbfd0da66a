"""What a run tells: log.jsonl and TensorBoard always, a bar or lines for the eye, W&B if asked."""

import json
import logging
import os
import secrets
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

LOSSES = ("total", "mae_audio", "mae_video", "contrastive", "kd")  # on the bar, where present

logger = logging.getLogger(__name__)

Record = Mapping[str, float]  # step, epoch, samples, lr, the losses, clips_per_second, ...


class Sink(Protocol):
    """Somewhere a record of one logged step goes."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Sends each record to every sink. On ranks other than 0 there are none."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def write(self, record: Record) -> None:
        """`record` holds numbers by name, `step` among them."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in self._sinks:
            sink.close()


def open_tracker(
    output: Path, *, start_step: int, total_steps: int, wandb: bool, settings: Mapping[str, Any]
) -> Tracker:
    """The sinks of a run on rank 0. A resumed run goes on in the same files.

    Records beyond `start_step`, left by a run that was killed after its last checkpoint, go.
    """
    sinks: list[Sink] = [
        JsonLines(output / "log.jsonl", start_step),
        TensorBoard(output / "tensorboard", start_step),
    ]
    if wandb:
        sinks.append(WeightsAndBiases(output, start_step, settings))
    show: Sink = Lines(total_steps)
    if sys.stderr.isatty():
        show = Bar(start_step, total_steps)
    return Tracker(*sinks, show)


def require_wandb() -> None:
    """ValueError unless Weights & Biases is installed."""
    if find_spec("wandb") is None:
        raise ValueError(
            "train.wandb=True: wandb is not installed; pip install wandb, or leave it out"
        )


def truncate_log(path: Path, last_step: int) -> None:
    """Drop the lines of a JSON-lines file whose `step` is past `last_step`, or cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except ValueError:
            continue  # half a line: the run was killed while writing it
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


class JsonLines:
    """log.jsonl: one record per line, whole or not at all."""

    def __init__(self, path: Path, start_step: int) -> None:
        truncate_log(path, start_step)
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        before = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:  # of a full disk it names no file
            self._file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars under train/, those of an evaluation under eval/ as they are named."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                tag = name if "/" in name else f"train/{name}"
                self._writer.add_scalar(tag, value, int(record["step"]))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named after the output folder; a resumed run goes on in it, by its wandb_id."""

    def __init__(self, output: Path, start_step: int, settings: Mapping[str, Any]) -> None:
        import wandb

        known = output / "wandb_id"
        if start_step == 0 or not known.exists():
            known.write_text(secrets.token_hex(8), encoding="utf-8")
        self._run = wandb.init(
            id=known.read_text(encoding="utf-8"),
            dir=str(output),
            name=output.name,
            config=dict(settings),
            resume="allow",
        )

    def write(self, record: Record) -> None:
        values = {name: value for name, value in record.items() if name != "step"}
        self._run.log(values, step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()


class Bar:
    """A progress bar with losses, clips per second and the time left."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, leave=True
        )

    def write(self, record: Record) -> None:
        self._bar.set_postfix_str(_summary(record), refresh=False)
        self._bar.update(int(record["step"]) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class Lines:
    """One line per record, for logs that are not a terminal."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def write(self, record: Record) -> None:
        minutes, seconds = divmod(int(record["seconds_left"]), 60)
        left = f"{minutes}:{seconds:02}"
        if minutes >= 60:
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        logger.info(
            "step %d/%d  %s  %s left", record["step"], self._total_steps, _summary(record), left
        )

    def close(self) -> None:
        pass


def _summary(record: Record) -> str:
    losses = [f"{name} {record[name]:.4g}" for name in LOSSES if name in record]
    figures = [f"{name} {value:.4g}" for name, value in record.items() if "/" in name]
    return "  ".join([*losses, *figures, f"{record['clips_per_second']:.1f} clips/s"])
