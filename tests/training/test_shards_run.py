"""Training from shards with real processes: which clips each rank sees, whatever their number.

23 clips, which neither 1, 2, 3 ranks nor the batch of 6 divides: 3 steps an epoch.
"""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kdcmae_fast.data.shards import PreparedClip, finish_dataset, write_shard

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("soundfile")

CLIPS, BATCH, EPOCH_STEPS = (7, 9, 7), 6, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root, number = tmp_path_factory.mktemp("shards"), 0
    for shard, size in enumerate(CLIPS):
        write_shard(root, shard, [clip(number + i) for i in range(size)], first=number)
        number += size
    finish_dataset(root, len(CLIPS), {})
    return root


def clip(number: int) -> PreparedClip:
    rng = np.random.default_rng(number)
    data = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(data, "JPEG")
    sound = 0.1 * rng.standard_normal(12_000).astype(np.float32)
    return PreparedClip(f"clip {number}", "", 0.0, 0.75, [data.getvalue()] * 2, [0.1, 0.5], sound)


def train(launch, shards: Path, output: Path, processes: int, steps: int) -> list[list[list[int]]]:
    """Train up to `steps`, resuming; clips of each rank and of each step of this launch."""
    seen = output.with_name(f"{output.name}_{processes}_{steps}")
    seen.mkdir(parents=True)
    command = launch.command(
        output, "--resume", "data.source=shards", f"data.path={shards}", "data.shuffle_window=10",
        "data.mixup=0.3", "data.noise=true", "data.time_mask=16", "optim.schedule=constant",
        "optim.warmup=0", f"train.steps={steps}", "data.num_workers=1",
        processes=processes, fp32=True, batch=BATCH, launcher="torchrun",
    )  # fmt: skip
    script = next(i for i, part in enumerate(command) if part.endswith("pretrain.py"))
    command[script] = str(Path(__file__).with_name("shards_worker.py"))
    environment = {**launch.environment, "SEEN": str(seen)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    logs = [seen / f"{rank}.jsonl" for rank in range(processes)]
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


def steps_of(ranks: list[list[list[int]]]) -> list[list[int]]:
    """Clips of each step over all ranks, in rank order."""
    return [sum(parts, []) for parts in zip(*ranks, strict=True)]


@pytest.mark.slow
def test_one_two_and_three_ranks_see_the_same_clips(launch, shards, assert_close, tmp_path):
    runs = {n: train(launch, shards, tmp_path / f"run{n}", n, 7) for n in (1, 2, 3)}
    for processes, ranks in runs.items():
        assert len(ranks) == processes
        assert {len(steps) for steps in ranks} == {7}
        assert {len(ids) for steps in ranks for ids in steps} == {BATCH // processes}
    whole = steps_of(runs[1])
    assert steps_of(runs[2]) == whole and steps_of(runs[3]) == whole
    for first in (0, EPOCH_STEPS):
        epoch = sum(whole[first : first + EPOCH_STEPS], [])
        assert len(set(epoch)) == EPOCH_STEPS * BATCH  # each clip once at most, 5 left over
    assert whole[:EPOCH_STEPS] != whole[EPOCH_STEPS : 2 * EPOCH_STEPS]
    for processes in (2, 3):
        assert_close(tmp_path / "run1", tmp_path / f"run{processes}", 1e-4)

    # Stopped in the middle of the first and of the second epoch, each leg on other ranks.
    output = tmp_path / "legs"
    legs = [train(launch, shards, output, n, steps) for n, steps in ((3, 2), (2, 5), (1, 7))]
    assert sum(map(steps_of, legs), []) == whole
    assert_close(output, tmp_path / "run1", 1e-4)
