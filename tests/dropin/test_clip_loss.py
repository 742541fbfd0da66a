"""The symmetric loss of open_clip, switched to `info_nce`: one process and two.

The file is also the program of each process: `python test_clip_loss.py RANK FILE SOURCE`. SOURCE
says whose ClipLoss it compares with: "package" (open_clip, where it imports) or "stand-in", one
with the same arguments and results.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kdcmae_fast.kernels import info_nce
from kdcmae_fast.kernels.common import unavailable

WORLD, BATCH, WIDTH = 2, 5, 7
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class StandIn(nn.Module):
    """open_clip.ClipLoss with local_loss and gather_with_grad: each rank scores its own rows."""

    def __init__(
        self, local_loss: bool, gather_with_grad: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__()
        assert local_loss and gather_with_grad, "the only form written here"
        self.rank, self.world_size = rank, world_size

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        all_images, all_texts = image_features, text_features
        if self.world_size > 1:
            from torch.distributed.nn import all_gather

            all_images, all_texts = (torch.cat(all_gather(x)) for x in (all_images, all_texts))
        labels = torch.arange(len(image_features)) + self.rank * len(image_features)
        by_image = F.cross_entropy(logit_scale * image_features @ all_texts.T, labels)
        by_text = F.cross_entropy(logit_scale * text_features @ all_images.T, labels)
        return (by_image + by_text) / 2


def clip_loss_class(source: str) -> type[nn.Module]:
    """ClipLoss of the package (skips where it does not import) or the stand-in."""
    if source == "stand-in":
        return StandIn
    import bench_peers

    return bench_peers.open_clip_loss().ClipLoss


def features(world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global image and text features before normalisation, and the learned log of the scale."""
    generator = torch.Generator().manual_seed(3)
    images, noise = (
        torch.randn(world * BATCH, WIDTH, dtype=torch.float64, generator=generator)
        for _ in range(2)
    )
    return images, images + noise, torch.tensor(2.3, dtype=torch.float64)


def step(loss, rank: int, world: int) -> dict:
    """Loss and gradients of a rank's rows: loss(image features, text features, logit_scale)."""
    images, texts, log_scale = features(world)
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    leaves = [x.clone().requires_grad_() for x in (images[rows], texts[rows], log_scale)]
    value = loss(F.normalize(leaves[0], dim=-1), F.normalize(leaves[1], dim=-1), leaves[2].exp())
    return {"loss": value.detach(), "grads": torch.autograd.grad(value, leaves)}


def ours(group=None, impl: str = "auto"):
    """`info_nce` in the place of a ClipLoss."""

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        return info_nce(
            image_features, text_features, temperature=1 / logit_scale, symmetric=True,
            normalize=False, group=group, impl=impl,
        )  # fmt: skip

    return loss


@pytest.fixture(params=("package", "stand-in"))
def source(request) -> str:
    clip_loss_class(request.param)
    return request.param


@pytest.mark.parametrize("impl", ("torch", "cpp"))
def test_one_process(source, impl):
    problem = unavailable("info_nce", impl, "cpu")
    if problem:
        pytest.skip(problem)
    theirs = step(clip_loss_class(source)(local_loss=True, gather_with_grad=True), 0, 1)
    found = step(ours(impl=impl), 0, 1)
    torch.testing.assert_close(found["loss"], theirs["loss"], **CLOSE)
    for ours_grad, grad in zip(found["grads"], theirs["grads"], strict=True):
        assert grad.abs().max() > 1e-4
        torch.testing.assert_close(ours_grad, grad, **CLOSE)


def test_normalisation_can_be_left_to_us():
    images, texts, log_scale = features(1)
    both = (F.normalize(x, dim=-1) for x in (images, texts))
    fused = info_nce(images, texts, temperature=1 / log_scale.exp(), symmetric=True)
    torch.testing.assert_close(fused, StandIn(True, True)(*both, log_scale.exp()), **CLOSE)


def worker(rank: int, rendezvous: str, source: str) -> None:
    """Both losses of this rank; results to RENDEZVOUS.RANK."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    loss = clip_loss_class(source)(
        local_loss=True, gather_with_grad=True, rank=rank, world_size=WORLD
    )
    results = {"theirs": step(loss, rank, WORLD), "ours": step(ours(dist.group.WORLD), rank, WORLD)}
    torch.save(results, f"{rendezvous}.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a process that tears down under load


def test_two_processes(source, tmp_path):
    rendezvous = tmp_path / "store"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(rendezvous), source],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log
    ranks = [torch.load(Path(f"{rendezvous}.{rank}")) for rank in range(WORLD)]
    # Theirs is the loss of the rank's own rows, ours that of the global batch.
    mean = sum(rank["theirs"]["loss"] for rank in ranks) / WORLD
    for rank in ranks:
        torch.testing.assert_close(rank["ours"]["loss"], mean, **CLOSE)
        for place in range(2):  # the features' gradients, rank by rank
            torch.testing.assert_close(
                rank["ours"]["grads"][place], rank["theirs"]["grads"][place], **CLOSE
            )
    # logit_scale is one parameter of all ranks: an engine averages its gradients.
    scale = {who: sum(rank[who]["grads"][2] for rank in ranks) / WORLD for who in ranks[0]}
    torch.testing.assert_close(scale["ours"], scale["theirs"], **CLOSE)
    alone = step(StandIn(True, True), 0, 1)
    assert (alone["loss"] - mean).abs() > 1e-3, "negatives of the other rank took no part"


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2], sys.argv[3])
