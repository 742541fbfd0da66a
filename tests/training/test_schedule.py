"""Learning-rate schedules and run lengths against closed forms."""

import math

import pytest

from kdcmae_fast.config import OptimConfig, TrainConfig
from kdcmae_fast.training.schedule import lr_factor, run_length


def factor(step, epoch=0, total=100, **optim):
    return lr_factor(step, total_steps=total, epoch=epoch, optim=OptimConfig(**optim))


def test_published_warmup_and_cosine():
    """CAV-MAE Sync (arXiv 2505.01237): 25 epochs of 3424 steps, 10 % warm-up, down to a tenth."""

    def rate(step):
        return 2e-4 * factor(step, total=85_600, schedule="cosine", warmup=0.1, final_lr=0.1)

    assert rate(0) == pytest.approx(2.336e-8, rel=1e-3)
    assert rate(8_559) == pytest.approx(2e-4)
    assert rate(8_560) == pytest.approx(2e-4)
    assert rate(42_800) == pytest.approx(1.256e-4, rel=1e-3)
    assert rate(85_600) == pytest.approx(2e-5)
    assert rate(100_000) == pytest.approx(2e-5)


def test_cosine_is_symmetric_about_its_middle():
    for step in range(10, 56):
        pair = [factor(s, schedule="cosine", warmup=0.1, final_lr=0.0) for s in (step, 110 - step)]
        assert sum(pair) == pytest.approx(1.0)


def test_warmup_is_linear_under_every_schedule():
    for schedule in ("constant", "cosine", "halving"):
        for step in range(20):
            assert factor(step, schedule=schedule, warmup=0.2) == pytest.approx((step + 1) / 20)


def test_no_warmup():
    assert factor(0, schedule="constant", warmup=0.0) == 1.0
    assert factor(0, schedule="cosine", warmup=0.0) == 1.0
    assert factor(0, total=3, schedule="cosine", warmup=0.05) == 1.0


def test_published_halving():
    """CAV-MAE: full rate for epochs 0 to 9, then half, halved again every five epochs."""
    expected = [1.0] * 10 + [0.5] * 5 + [0.25] * 5 + [0.125] * 5
    found = [
        factor(0, epoch=epoch, schedule="halving", warmup=0.0, halving_start=10, halving_every=5)
        for epoch in range(25)
    ]
    assert found == expected


def test_run_length():
    steps = run_length(TrainConfig(steps=7), num_clips=100, global_batch=8, accumulation=1)
    assert (steps.total_steps, steps.batches_per_epoch, steps.samples_per_step) == (7, 12, 8)
    assert [steps.epoch(s) for s in (0, 11, 12, 24)] == [0, 0, 1, 2]
    epochs = run_length(TrainConfig(epochs=5), num_clips=100, global_batch=8, accumulation=4)
    assert epochs.total_steps == math.floor(5 * 12 / 4)
    assert epochs.samples_per_step == 32
    assert [epochs.epoch(s) for s in (0, 2, 3)] == [0, 0, 1]


def test_run_length_errors():
    with pytest.raises(ValueError, match="data has 7 clips, fewer than the 8 of one batch"):
        run_length(TrainConfig(steps=7), num_clips=7, global_batch=8, accumulation=1)
    with pytest.raises(ValueError, match="one must say how long to train"):
        run_length(TrainConfig(), num_clips=8, global_batch=8, accumulation=1)
    with pytest.raises(ValueError, match="ds.gradient_accumulation_steps=16"):
        run_length(TrainConfig(epochs=1), num_clips=80, global_batch=8, accumulation=16)
