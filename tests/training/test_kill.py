"""SIGKILL at any moment: the next start goes on from a complete checkpoint, to the same end."""

import contextlib
import os
import random
import signal
import time

import psutil
import pytest

from kdcmae_fast.training.checkpoint import SAVING, complete_checkpoints, read_progress


def settings_for(steps: int) -> tuple[str, ...]:
    """A checkpoint at every step: most of the time goes into writing them."""
    return (f"train.steps={steps}", "train.checkpoint_every=1", "--resume")


def newest_step(output) -> int:
    checkpoints = complete_checkpoints(output / "checkpoints")
    return read_progress(checkpoints[0]).step if checkpoints else 0


def kill_once(launch, output, log, rng, *, while_saving, processes, steps) -> tuple[bool, bool]:
    """Start, let it get on, SIGKILL every process.

    Returns whether it was still running, and whether a checkpoint was being written.
    """
    before = newest_step(output)
    run = launch.start(output, *settings_for(steps), log=log, processes=processes)
    saving = output / "checkpoints" / SAVING
    deadline = time.monotonic() + 120
    while run.poll() is None and newest_step(output) <= before:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    if while_saving:
        while run.poll() is None and not saving.exists():
            pass
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 0.3))
    ended = run.poll() is not None
    kill_tree(run)
    return not ended, saving.exists()


def kill_tree(run) -> None:
    """SIGKILL the launcher and everything below it (torchrun gives workers their own session)."""
    try:
        tree = psutil.Process(run.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    os.killpg(run.pid, signal.SIGKILL)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()
    psutil.wait_procs(tree)


def killed_run(launch, output, folder, *, kills, processes, steps) -> int:
    """Kill a run `kills` times, then let it finish; how often a checkpoint was cut short."""
    rng = random.Random(0)
    cut_short = 0
    for number in range(kills):
        before = newest_step(output)
        log = folder / f"log_{number}"
        killed, was_saving = kill_once(
            launch,
            output,
            log,
            rng,
            while_saving=number % 2 == 0,
            processes=processes,
            steps=steps,
        )
        after = newest_step(output)
        text = log.read_text()
        assert after > before, text
        assert before == 0 or f"resumed from {output / 'checkpoints' / f'step_{before}'}" in text
        cut_short += was_saving
        if not killed:
            assert after == steps
            break
    launch.run(output, *settings_for(steps), processes=processes)
    return cut_short


@pytest.mark.parametrize(
    ("kills", "processes", "steps"), [(2, 1, 10), pytest.param(10, 2, 40, marks=pytest.mark.slow)]
)
def test_killed_runs_resume(launch, losses_of, tmp_path, kills, processes, steps):
    output = tmp_path / "run"
    cut_short = killed_run(launch, output, tmp_path, kills=kills, processes=processes, steps=steps)
    assert cut_short > 0 or kills < 10
    whole = tmp_path / "whole"
    launch.run(whole, f"train.steps={steps}", processes=processes)
    assert losses_of(output) == losses_of(whole)
    left = {path.name for path in (output / "checkpoints").glob("*step*")}
    assert left == {f"step_{steps}", f"step_{steps - 1}"}


def test_damaged_checkpoint_is_passed_over(launch, reference, losses_of, tmp_path, caplog):
    """What a kill cannot do, a full disk can: the older checkpoint is used, the log says why."""
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        (folder / f"step_{step}").mkdir(parents=True)
        state = (reference / "checkpoints" / "step_6" / "state.json").read_text()
        (folder / f"step_{step}" / "state.json").write_text(state)
        for path in (reference / "checkpoints" / "step_6").iterdir():
            if path.name != "state.json":
                (folder / f"step_{step}" / path.name).symlink_to(path)
    assert [path.name for path in complete_checkpoints(folder)] == ["step_6", "step_4", "step_2"]
    (folder / "step_6" / "state.json").write_text("{")
    (folder / "step_4" / "rng_0.pt").unlink()
    assert [path.name for path in complete_checkpoints(folder)] == ["step_2"]
    assert "step_4 is passed over: rng_0.pt is missing" in caplog.text
    assert "step_6 is passed over: its state.json is missing or unreadable" in caplog.text
