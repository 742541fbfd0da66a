"""InfoNCE over all micro-batches of a step: the gradients of one big batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdcmae_fast.batch import Batch
from kdcmae_fast.config import ModelConfig, RunConfig, TrainConfig
from kdcmae_fast.models import build_model
from kdcmae_fast.training.contrast import contrast_over_step

WORKER = Path(__file__).with_name("contrast_worker.py")
SIZES = {
    "audio_length": 64, "num_mel_bins": 64, "img_size": 32, "embed_dim": 48, "modality_depth": 1,
    "num_heads": 4, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip


class Engine:
    """What the passes need of DeepSpeed's engine, in float64."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def clips(count: int) -> Batch:
    frames = torch.randn(count, 3, 32, 32, dtype=torch.float64)
    return Batch(torch.randn(count, 64, 64, dtype=torch.float64), frames, torch.arange(count))


def split(batch: Batch, parts: int) -> list[Batch]:
    return [Batch(*part) for part in zip(*(tensor.chunk(parts) for tensor in batch), strict=True)]


def two_passes(model: nn.Module, batch: Batch, parts: int, step: int) -> dict[str, Tensor]:
    """Accumulates into the parameters' gradients; returns the mean losses."""
    engine, batches = Engine(model), split(batch, parts)
    means: dict[str, Tensor] = {}
    for part, contrast in zip(batches, contrast_over_step(engine, batches, step), strict=True):
        contrast.random_state.restore()
        losses = engine(part, step=step, contrast=contrast)
        (losses.total / parts).backward()
        for name, value in losses.named().items():
            means[name] = means.get(name, 0) + value.detach() / parts
    return means


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"symmetric": True},
        {"loss_weighting": "uncertainty"},
        {"num_views": 3},
        {"cls_token": True, "num_registers": 2, "global_local": True, "frames_per_clip": 3},
    ],
    ids=["one-sided", "symmetric", "uncertainty", "three views", "frames of clips"],
)
def test_accumulated_equals_one_batch(overrides):
    torch.manual_seed(0)
    model = build_model("kdc_mae", "tiny", contrast_loss_weight=1.0, **SIZES | overrides).double()
    batch = clips(12)
    losses = model(batch, step=5)
    losses.total.backward()
    want = gradients(model)
    means = two_passes(model, batch, 4, step=5)
    torch.testing.assert_close(means, {name: v.detach() for name, v in losses.named().items()})
    torch.testing.assert_close(gradients(model), want, rtol=1e-9, atol=1e-12)
    # The usual accumulation compares fewer clips, and differs.
    for part in split(batch, 4):
        (model(part, step=5).total / 4).backward()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(model), want, rtol=1e-3, atol=1e-6)


def test_dropout_repeats_in_the_second_pass():
    torch.manual_seed(0)
    model = build_model("kdc_mae", "tiny", **SIZES).double()
    block = model.encoder.audio.blocks[0]
    block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.5))
    seen: list[Tensor] = []
    block.mlp.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    two_passes(model, clips(6), 3, step=0)
    first, second = seen[:3], seen[3:]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0] == 0, first[1] == 0)  # each micro-batch has its own


@pytest.mark.parametrize(
    "zero", [0, 2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_two_processes_times_four_micro_batches(launch, zero):
    """Sixteen clips as 2 x 4 x 2 and as one batch on one process, fp32, through DeepSpeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(zero)],
        capture_output=True, text=True, env=launch.environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "gradients agree" in done.stdout


def test_a_run_over_whole_steps(launch, losses_of, assert_close, tmp_path):
    """Two processes with two micro-batches each, against one process with one; and resumed."""
    settings = ("train.contrast_over=step", "optim.schedule=constant", "optim.warmup=0")
    launch.run(tmp_path / "one", *settings, fp32=True)
    output, accumulate = tmp_path / "four", "ds.gradient_accumulation_steps=2"
    options = {"processes": 2, "fp32": True, "batch": 4}
    launch.run(output, *settings, accumulate, "train.steps=3", **options)
    launch.run(output, *settings, accumulate, "--resume", **options)
    assert_close(tmp_path / "one", output, 1e-5)


def test_without_a_contrastive_term_it_is_an_error():
    model = ModelConfig(contrast_loss_weight=0.0)
    with pytest.raises(ValueError, match=r"^train.contrast_over=step: there is no contrastive"):
        RunConfig(model=model, train=TrainConfig(contrast_over="step"))
