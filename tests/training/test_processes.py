"""Two processes: equal to one, from one to the other and back, and always a clean end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

CONSTANT = ("optim.schedule=constant", "optim.warmup=0")  # does not know the run's length


def test_two_processes_equal_one(launch, two_process_reference, assert_close, tmp_path):
    """1 x 8 clips and 2 x 4, fp32: same clips, same masks, InfoNCE over the global batch."""
    launch.run(tmp_path / "one", *CONSTANT, fp32=True)
    assert_close(tmp_path / "one", two_process_reference, 1e-5)


@pytest.mark.parametrize(
    "zero", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_two_to_one_and_back(launch, two_process_reference, assert_close, tmp_path, zero):
    """Stopped after 2 and 4 of 6 steps; every leg is converted for its number of processes."""
    output = tmp_path / "run"
    for steps, processes in ((2, 2), (4, 1), (6, 2)):
        settings = ("--resume", *CONSTANT, f"train.steps={steps}")
        launch.run(output, *settings, processes=processes, zero=zero, fp32=True)
    assert_close(output, two_process_reference, 1e-5)


def test_deepspeed_launcher(launch, reference, assert_close, tmp_path):
    launch.run(tmp_path / "run", processes=2, launcher="deepspeed")
    assert_close(tmp_path / "run", reference, 2e-2)


def test_sigterm_saves_and_exits_0(launch, losses_of, tmp_path):
    """As Slurm sends it: to the run and to its loader's workers."""
    output, log = tmp_path / "run", tmp_path / "log"
    run = launch.start(output, "train.steps=2000", "data.num_workers=1", log=log)
    wait_for(lambda: "step 3/" in log.read_text(), run)
    workers = [
        process
        for process in psutil.Process(run.pid).children(recursive=True)
        if any("forkserver" in part for part in process.cmdline())
    ]
    assert workers and all(blocks_sigterm(process.pid) for process in workers)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(timeout=60) == 0, log.read_text()
    check_stopped(launch, losses_of, output, log, processes=1)


def blocks_sigterm(pid: int) -> bool:
    """Whether the process never sees SIGTERM, as Linux tells it."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = re.findall(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_sigterm_to_one_process_stops_all(launch, losses_of, tmp_path, launcher):
    """The processes agree at a step's end, all of them save, and the launcher sees success."""
    output, log = tmp_path / "run", tmp_path / "log"
    settings = ("train.steps=2000", "data.num_workers=1")
    run = launch.start(output, *settings, log=log, processes=2, launcher=launcher)
    wait_for(lambda: "step 3/" in log.read_text(), run)
    ranks = [
        process
        for process in psutil.Process(run.pid).children(recursive=True)
        if str(output) in process.cmdline() and process.environ().get("RANK") == "1"
    ]
    ranks[0].terminate()
    assert run.wait(timeout=60) == 0, log.read_text()
    check_stopped(launch, losses_of, output, log, processes=2)


def check_stopped(launch, losses_of, output, log, *, processes):
    """Saved at the step it stopped at, said so, and can go on."""
    assert "stopped as asked; pass --resume" in log.read_text()
    stopped = max(losses_of(output))
    assert (output / "checkpoints" / f"step_{stopped}" / "state.json").exists()
    assert not (output / "model").exists()
    launch.run(output, f"train.steps={stopped + 1}", "--resume", processes=processes)
    assert max(losses_of(output)) == stopped + 1


@pytest.mark.slow
def test_twenty_runs_under_load_all_exit_0(launch, tmp_path):
    """Two processes on busy cores: finishing must not depend on who shuts down first."""
    burn = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    try:
        for number in range(20):
            zero = 1 + number % 3
            launch.run(tmp_path / str(number), "train.steps=2", processes=2, zero=zero)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def wait_for(condition, run, seconds=90):
    """Until `condition()`; fails when the run ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
