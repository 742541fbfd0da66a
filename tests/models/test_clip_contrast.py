"""InfoNCE with several frames of a clip in the batch, against the formula pair by pair.

The file is also the program of each process: `python test_clip_contrast.py RANK FILE`.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdcmae_fast.kernels import info_nce
from kdcmae_fast.models import Batch, clip_contrast
from kdcmae_fast.models.clip_contrast import clip_info_nce

FRAMES, TAU, WORLD = 3, 0.3, 2
CASES = [(mode, symmetric) for mode in ("masked", "positives") for symmetric in (False, True)]


def features(rows=12):
    generator = torch.Generator().manual_seed(0)
    a, noise = (torch.randn(rows, 5, dtype=torch.float64, generator=generator) for _ in "ab")
    return a, a + noise


def by_hand(a, b, within_clip, symmetric):
    z = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T / TAU

    def one_sided(z):  # softmax over the rows for each column
        total = 0.0
        for j in range(len(z)):
            clip = j // FRAMES
            siblings = [i for i in range(len(z)) if i // FRAMES == clip]
            others = sum(math.exp(z[i, j]) for i in range(len(z)) if i // FRAMES != clip)
            right = [j] if within_clip == "masked" else siblings
            good = sum(math.exp(z[i, j]) for i in right)
            total -= math.log(good / (good + others))
        return total / len(z)

    return (one_sided(z) + one_sided(z.T)) / 2 if symmetric else one_sided(z)


@pytest.mark.parametrize("within_clip, symmetric", CASES)
@pytest.mark.parametrize("elements", [2**24, 1, 30])
def test_formula(monkeypatch, within_clip, symmetric, elements):
    """Whatever the blocks are."""
    monkeypatch.setattr(clip_contrast, "BLOCK_ELEMENTS", elements)
    a, b = features()
    loss = clip_info_nce(a, b, FRAMES, within_clip, temperature=TAU, symmetric=symmetric)
    assert loss.item() == pytest.approx(by_hand(a, b, within_clip, symmetric), abs=1e-12)


@pytest.mark.parametrize("within_clip, symmetric", CASES)
def test_gradients(within_clip, symmetric):
    inputs = [x.requires_grad_() for x in features(6)]
    assert torch.autograd.gradcheck(
        lambda a, b: clip_info_nce(a, b, FRAMES, within_clip, symmetric=symmetric), inputs
    )


def test_one_frame_per_clip_is_plain_info_nce():
    a, b = features()
    for mode in ("masked", "positives"):
        for symmetric in (False, True):
            loss = clip_info_nce(a, b, 1, mode, symmetric=symmetric)
            torch.testing.assert_close(loss, info_nce(a, b, symmetric=symmetric))


def test_large_logits_and_low_precision():
    a, b = (x.bfloat16() for x in features())
    loss = clip_info_nce(a, b, FRAMES, "masked", temperature=1e-3)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_no_rows_and_broken_clips():
    assert clip_info_nce(torch.zeros(0, 4), torch.zeros(0, 4), 3, "masked") == 0
    with pytest.raises(ValueError, match="frames_per_clip=5: a batch of 12 rows is no whole"):
        clip_info_nce(*features(), 5, "masked")


def test_no_whole_matrix_is_kept(monkeypatch):
    monkeypatch.setattr(clip_contrast, "BLOCK_ELEMENTS", 240)

    def kept():
        found = {}
        a, b = (x.requires_grad_() for x in features(240))

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            clip_info_nce(a, b, FRAMES, "masked")
        return sum(found.values())

    assert kept() < 240 * 240 / 2
    monkeypatch.setattr(clip_contrast, "checkpoint", lambda f, *args, **_: f(*args))
    assert kept() > 240 * 240


@pytest.mark.parametrize("within_clip", ["masked", "negatives", "positives"])
def test_in_the_model(small, batch, within_clip):
    two = Batch(*(tensor[:4] for tensor in batch))
    options = {"frames_per_clip": 2, "within_clip": within_clip, "num_registers": 2}
    model = small("cav_mae_sync", **options)
    audio, video = model(two, features_only=True)
    found = model(two).contrastive
    if within_clip == "negatives":
        torch.testing.assert_close(found, info_nce(audio, video))
    else:
        torch.testing.assert_close(found, clip_info_nce(audio, video, 2, within_clip))
        with pytest.raises(ValueError, match="frames_per_clip=2: a batch of 5 rows"):
            model(batch)


def worker(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    results = []
    for within_clip, symmetric in CASES:
        mine = [x.chunk(WORLD)[rank].clone().requires_grad_() for x in features()]
        loss = clip_info_nce(
            *mine, FRAMES, within_clip, symmetric=symmetric, group=dist.group.WORLD
        )
        results.append((loss.detach(), torch.autograd.grad(loss, mine)))
    torch.save(results, f"{rendezvous}.{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Value on every rank; gradients, averaged over ranks as an engine does."""
    rendezvous = tmp_path / "meet"
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(rendezvous)])
        for rank in range(WORLD)
    ]
    assert [process.wait(120) for process in started] == [0] * WORLD
    found = [torch.load(f"{rendezvous}.{rank}") for rank in range(WORLD)]
    for case, (within_clip, symmetric) in enumerate(CASES):
        whole = [x.requires_grad_() for x in features()]
        loss = clip_info_nce(*whole, FRAMES, within_clip, symmetric=symmetric)
        expected = torch.autograd.grad(loss, whole)
        for rank in range(WORLD):
            value, grads = found[rank][case]
            torch.testing.assert_close(value, loss.detach())
            for grad, full in zip(grads, expected, strict=True):
                own = full.chunk(WORLD)[rank]
                torch.testing.assert_close(grad / WORLD, own)


if __name__ == "__main__":
    worker(int(sys.argv[1]), str(Path(sys.argv[2])))
