"""Runs of the real command line with a model so small that starting up is most of the time."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8  # clips a step, over all processes

MODEL = """
preset: tiny
model:
  audio_length: 64
  num_mel_bins: 64
  img_size: 32
  embed_dim: 48
  modality_depth: 1
  num_heads: 4
  decoder_embed_dim: 32
  decoder_depth: 1
  decoder_num_heads: 4
"""

RECIPE = f"""
name: kdc_mae
{MODEL}
data: {{num_clips: 64, num_workers: 0}}
optim: {{lr: 1e-3}}
train: {{steps: 6, log_every: 1, checkpoint_every: 0}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launcher:
    """Starts pretraining in other processes, as a user would."""

    def __init__(self, folder: Path) -> None:
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        }
        self.environment.update(OMP_NUM_THREADS="1", DS_BUILD_OPS="0")

    def command(
        self,
        output: Path,
        *settings: str,
        processes: int = 1,
        launcher: str = "",
        zero: int = 2,
        fp32: bool = False,
        batch: int = BATCH,
        script: str = "pretrain",
        recipe: Path | None = None,
    ) -> list[str]:
        """The command line. launcher: "deepspeed", "torchrun" or "" (the plainest that does)."""
        launcher = launcher or ("torchrun" if processes > 1 else "python")
        port = str(free_port())
        start = {
            "python": [sys.executable],
            "torchrun": [
                sys.executable, "-m", "torch.distributed.run",
                "--nproc_per_node", str(processes), "--master_port", port,
            ],
            "deepspeed": [
                sys.executable, "-m", "deepspeed.launcher.runner",
                "--num_gpus", str(processes), "--master_port", port,
            ],
        }[launcher]  # fmt: skip
        return [
            *start, str(ROOT / "kdcmae_fast" / f"{script}.py"),
            "--ds_config", str(ROOT / "configs" / f"zero{zero}.json"),
            "--recipe", str(recipe or self.recipe), "--output", str(output),
            *(["ds.bf16.enabled=false"] if fp32 else []),
            f"ds.train_micro_batch_size_per_gpu={batch // processes}", *settings,
        ]  # fmt: skip

    def start(self, *arguments, log: Path, **options) -> subprocess.Popen:
        """The process group of a run, its output going to the file `log`."""
        with log.open("w") as file:
            return subprocess.Popen(
                self.command(*arguments, **options),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=log.parent,
                start_new_session=True,
            )

    def run(self, *arguments, code: int = 0, **options) -> str:
        """Run to the end; returns what it printed."""
        done = subprocess.run(
            self.command(*arguments, **options),
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=240,
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr


def read_losses(output: Path) -> dict[int, dict[str, float]]:
    """step -> the losses of a run's log.jsonl."""
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records})
    names = ("total", "mae_audio", "mae_video", "contrastive", "kd")
    return {r["step"]: {name: r[name] for name in names} for r in records}


@pytest.fixture(scope="session")
def tiny_model() -> str:
    """The part of a recipe that says which model."""
    return MODEL


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def losses_of() -> Callable[[Path], dict[int, dict[str, float]]]:
    return read_losses


@pytest.fixture(scope="session")
def reference(launch, tmp_path_factory) -> Path:
    """An uninterrupted bf16 run of six steps on one process."""
    output = tmp_path_factory.mktemp("reference") / "run"
    launch.run(output)
    return output


@pytest.fixture(scope="session")
def two_process_reference(launch, tmp_path_factory) -> Path:
    """An uninterrupted fp32 run of six steps at a constant rate on two processes."""
    output = tmp_path_factory.mktemp("two") / "run"
    launch.run(output, "optim.schedule=constant", "optim.warmup=0", processes=2, fp32=True)
    return output


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Every loss of every step agrees within `relative`."""

    def check(run: Path, other: Path, relative: float) -> None:
        left, right = read_losses(run), read_losses(other)
        assert left.keys() == right.keys()
        for step, losses in left.items():
            assert right[step] == pytest.approx(losses, rel=relative), f"step {step}"

    return check
