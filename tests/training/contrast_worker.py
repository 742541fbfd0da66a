"""One process of test_contrast.py: accumulated gradients against those of one big batch.

Usage, under torchrun: contrast_worker.py ZERO_STAGE
"""

import copy
import sys

import deepspeed
import torch
from torch import Tensor
from torch import distributed as dist

from kdcmae_fast.batch import Batch
from kdcmae_fast.models import build_model
from kdcmae_fast.training.distributed import join_world, leave
from kdcmae_fast.training.step import train_step
from kdcmae_fast.training.weights import full_weights

ACCUMULATION, MICRO_BATCH, LR, STEP = 4, 2, 64.0, 3
SIZES = {
    "audio_length": 64, "num_mel_bins": 64, "img_size": 32, "embed_dim": 48, "modality_depth": 1,
    "num_heads": 4, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip


class Raw:
    """Clips as the loader hands them over, with their Batch ready."""

    bad = ()

    def __init__(self, batch: Batch) -> None:
        self.batch = batch


def clips(count: int) -> Batch:
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return Batch(torch.randn(count, 64, 64), frames, torch.arange(count))


def big_batch(model: torch.nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of all clips in one batch on one process."""
    losses = model(batch, step=STEP)
    losses.total.backward()
    return losses.named(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def main(zero_stage: int) -> None:
    world = join_world()
    torch.manual_seed(1)
    model = build_model("kdc_mae", "tiny", contrast_loss_weight=1.0, **SIZES)
    want_losses, want = big_batch(
        copy.deepcopy(model), clips(world.size * ACCUMULATION * MICRO_BATCH)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    model.contrast_group = dist.group.WORLD
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 0.0,  # DeepSpeed clips to 1.0 unless told not to
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    everything = clips(world.size * ACCUMULATION * MICRO_BATCH)
    mine = [
        Raw(Batch(*(part[start : start + MICRO_BATCH] for part in everything)))
        for start in range(
            world.rank * MICRO_BATCH, len(everything.fbank), world.size * MICRO_BATCH
        )
    ]
    losses, _ = train_step(
        engine, iter(mine), lambda raw, device: raw.batch, world, STEP, contrast_over="step"
    )
    for name, value in losses.items():
        dist.all_reduce(value)
        torch.testing.assert_close(
            value / world.size, want_losses[name].detach(), rtol=1e-5, atol=1e-6
        )

    after = full_weights(engine, on_main=world.is_main)
    if world.is_main:
        largest = max(grad.abs().max() for grad in want.values())
        for name, grad in want.items():
            got = (before[name] - after[name]) / LR
            torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-5 * float(largest), msg=name)
        print("gradients agree")
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
