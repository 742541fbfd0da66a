"""What goes wrong around a run: one line that names it, and nothing lost or replaced."""

import errno
import json
import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from kdcmae_fast.config_file import load_config
from kdcmae_fast.training import checkpoint, report, run_folder, tracking
from kdcmae_fast.training.deepspeed_config import check_deepspeed_config
from kdcmae_fast.training.distributed import World, join_world, naming_lost_peers
from kdcmae_fast.training.schedule import RunLength
from kdcmae_fast.training.step import MAX_LOST, Meter

ALONE = World(0, 1, torch.device("cpu"))
PROGRESS = checkpoint.Progress(2, 16, 2, 8, 2, [], 64)
LENGTH = RunLength(6, 8, 1, 8)


@contextmanager
def largest_file(size: int):
    """No file of this process grows past `size` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def no_group(monkeypatch):
    """Stand-ins for the collectives of a group of one."""
    for module in (checkpoint, run_folder):
        monkeypatch.setattr(module.dist, "barrier", lambda: None)
    monkeypatch.setattr(run_folder, "gather_lists", lambda items, world: list(items))


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, r"^srun started 8 processes \(SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"^mpirun started 2 processes \(OMPI_COMM_WORLD_SIZE\)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT:"),
    ],
)
def test_processes_that_would_not_find_each_other(monkeypatch, environment, problem):
    """Each would train by itself, all of them into one folder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=problem):
        join_world()


def test_a_lost_process_is_what_the_others_say():
    closed = "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    pair = ALONE._replace(size=2)
    ended = "^another process of the run has ended .*--resume"
    with pytest.raises(ConnectionError, match=ended), naming_lost_peers(pair):
        raise RuntimeError(closed)
    with pytest.raises(RuntimeError, match="^shapes differ$"), naming_lost_peers(pair):
        raise RuntimeError("shapes differ")


def test_a_folder_of_each_machine_s_own_is_refused(monkeypatch, no_group, tmp_path):
    """Its checkpoints would hold the state of the first machine's processes alone."""
    run_folder.check_shared(tmp_path, ALONE)
    assert not list(tmp_path.iterdir())
    other = ALONE._replace(rank=1, size=2)

    def broadcast(names: list[str]) -> None:
        names[0] = ".shared_token"

    monkeypatch.setattr(run_folder.dist, "broadcast_object_list", broadcast)
    with pytest.raises(ValueError, match="process 1 does not see what process 0 writes; --output"):
        run_folder.check_shared(tmp_path, other, patience=0)
    (tmp_path / ".shared_token").touch()
    run_folder.check_shared(tmp_path, other, patience=0)


def test_all_processes_go_on_from_the_same_checkpoint(monkeypatch, tmp_path):
    step = tmp_path / "checkpoints" / "step_4"
    monkeypatch.setattr(run_folder, "gather_lists", lambda items, world: [*items, "step_2"])
    with pytest.raises(ValueError, match="step_4 for process 0, step_2 for process 1; --output"):
        run_folder.check_same_start(tmp_path, step, ALONE)
    monkeypatch.setattr(run_folder, "gather_lists", lambda items, world: [*items, *items])
    run_folder.check_same_start(tmp_path, step, ALONE)
    run_folder.check_same_start(tmp_path, None, ALONE)


@pytest.mark.parametrize("resume", [True, False])
def test_damaged_checkpoints_alone_do_not_start_a_run_anew(tmp_path, resume):
    for step in (2, 10):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"none of its checkpoints is complete .*step_10\)"):
        run_folder.find_checkpoint(tmp_path, resume=resume)
    assert run_folder.find_checkpoint(tmp_path / "new", resume=resume) is None


def test_a_finished_run_without_checkpoints_is_not_replaced(tmp_path):
    def finished(steps: int, *, resume: bool, has_checkpoints: bool = False) -> bool:
        return report.is_finished(tmp_path, steps, resume=resume, has_checkpoints=has_checkpoints)

    assert not finished(6, resume=False)
    (tmp_path / "metrics.json").write_text('{"command": "retrieve"}')
    assert not finished(6, resume=False)
    (tmp_path / "metrics.json").write_text('{"command": "pretrain", "steps": 6}')
    assert finished(6, resume=True)
    assert not finished(8, resume=True, has_checkpoints=True)
    for steps, resume in ((6, False), (8, True)):
        with pytest.raises(ValueError, match="finished run of 6 steps without its checkpoints"):
            finished(steps, resume=resume)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics.json is not JSON"):
        finished(6, resume=True)


def test_clips_that_changed_between_launches():
    run_folder.check_layout(PROGRESS, LENGTH, 2, num_clips=64)
    run_folder.check_layout(PROGRESS._replace(num_clips=None), LENGTH, 2, num_clips=65)
    with pytest.raises(ValueError, match="trained on 64 clips, data.path has 65 now"):
        run_folder.check_layout(PROGRESS, LENGTH, 2, num_clips=65)


def test_a_checkpoint_older_than_the_number_of_clips_is_complete(tmp_path):
    record = {**PROGRESS._asdict(), "files": {}, "settings": {}}
    del record["num_clips"]
    path = tmp_path / "step_2"
    path.mkdir()
    (path / "state.json").write_text(json.dumps(record))
    assert checkpoint.complete_checkpoints(tmp_path) == [path]
    assert checkpoint.read_progress(path) == PROGRESS._replace(num_clips=None)


def test_deepspeed_settings_of_a_resumed_run(caplog):
    before = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    run_folder.check_deepspeed(before, {**before, "train_micro_batch_size_per_gpu": 8})
    assert not caplog.messages
    run_folder.check_deepspeed(before, {**before, "gradient_clipping": 0.5})
    assert caplog.messages == ["ds.gradient_clipping was None, is now 0.5"]
    with pytest.raises(ValueError, match=r"bf16.enabled=true.*; pass ds.bf16.enabled=true"):
        run_folder.check_deepspeed(before, {**before, "bf16": {"enabled": False}})


@pytest.mark.parametrize("stage", [True, 2.0])
def test_a_zero_stage_is_a_whole_number(stage):
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    with pytest.raises(ValueError, match=rf"^a.json: zero_optimization.stage={stage}: expected 0"):
        check_deepspeed_config(settings, [], "a.json")


@pytest.mark.parametrize(
    ("settings", "length", "processes", "same"),
    [
        ([], LENGTH, 1, True),
        ([], RunLength(6, 16, 2, 4), 1, False),
        (["train.contrast_over=step"], RunLength(6, 16, 2, 4), 1, True),
        (["model.contrast_loss_weight=0"], RunLength(6, 16, 2, 4), 1, True),
        (["model.negatives=local"], RunLength(6, 16, 2, 4), 1, True),
        (["model.negatives=local"], LENGTH, 1, False),
    ],
)
def test_a_step_split_otherwise_compares_other_clips(caplog, settings, length, processes, same):
    config = load_config({"preset": "tiny", "train": {"steps": 6}}, settings)
    before = {"train_micro_batch_size_per_gpu": 4}
    assert run_folder.same_negatives(config, before, PROGRESS, length, processes) is same
    assert bool(caplog.messages) is not same


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] unexpected")],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_removed(no_group, tmp_path, error):
    def fill(folder: str, tag: str, save_latest: bool) -> None:
        (tmp_path / tag).mkdir()
        (tmp_path / tag / "half.pt").write_bytes(b"half")
        raise error

    record = {**PROGRESS._asdict(), "files": {}, "settings": {}}
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "state.json").write_text(json.dumps(record))
    reason = "No space left" if isinstance(error, OSError) else r"\[enforce fail\] unexpected"
    with pytest.raises(OSError, match=rf"step_2: cannot be written \({reason}.* from step_1$"):
        checkpoint.save_checkpoint(
            SimpleNamespace(save_checkpoint=fill), tmp_path, PROGRESS, ALONE,
            untrained={}, settings={}, keep=1,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_full_disk_spoils_no_file(tmp_path):
    path = tmp_path / "config.json"
    checkpoint.write_text(path, "before")
    log = tracking.JsonLines(tmp_path / "log.jsonl", 0)
    log.write({"step": 1})
    with largest_file(20):
        with pytest.raises(OSError, match=r"config.json"):
            checkpoint.write_text(path, "after" * 10)
        with pytest.raises(OSError, match=r"log.jsonl"):
            log.write({"step": 2, "total": 0.5})
    log.close()
    assert path.read_text() == "before"
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
    assert len(list(tmp_path.iterdir())) == 2


class Engine:
    """What DeepSpeed tells of a step: the norm of its gradient, and whether it was taken."""

    def __init__(self) -> None:
        self.norm, self.applied, self.skipped_steps = 1.5, True, 3

    def get_global_grad_norm(self) -> float:
        return self.norm

    def was_step_applied(self) -> bool:
        return self.applied


def test_gradients_that_are_not_finite(monkeypatch):
    monkeypatch.setattr("kdcmae_fast.training.step.sum_over_ranks", lambda values, device: [1.0])
    engine, meter = Engine(), Meter(LENGTH, ALONE, 0, skipped=3)

    def look(step: int) -> dict[str, float]:
        figures = meter.gradients(step, engine)
        meter.record(step, {"total": torch.tensor(1.0)}, 0.1, {})
        return figures

    assert look(10) == {"grad_norm": 1.5}
    engine.norm, engine.applied, engine.skipped_steps = float("inf"), False, 6
    assert look(20) == {}  # log.jsonl would not be JSON
    engine.skipped_steps += 10
    assert look(30) == {}
    engine.skipped_steps += 9  # one was taken
    look(40)
    engine.skipped_steps += 10
    look(50)
    engine.skipped_steps += 10
    with pytest.raises(FloatingPointError, match=f"gradients of the last {MAX_LOST} steps"):
        look(60)
    engine.norm, engine.applied = float("nan"), True
    with pytest.raises(FloatingPointError, match=r"^step 70: the gradient is not finite;"):
        look(70)
