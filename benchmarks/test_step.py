"""One KDC-MAE training step end to end: the published way, a port of it to SDPA, and ours.

All three have the weights of the same model, the same clips and the same masks, and must agree on
the loss and on the gradients before anything is timed. Memory is counted beyond parameters and
inputs. The share of the machine's matrix-product rate (MFU) is of the FLOPs of the published step,
whoever takes the step.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import published_ops as published
import published_step
import pytest
import torch
import torch.nn.functional as F
from conftest import peak_bytes
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from kdcmae_fast.kernels import complementary_masks
from kdcmae_fast.models import Batch, build_model
from kdcmae_fast.models.cav_mae import CavMae
from kdcmae_fast.models.masking import audio_grid, video_grid

OBJECTIVE = {"divergence": "js", "distribution": "batch_shift"}  # as published
GATE = {"fp32": 1e-4, "bf16": 5e-2}  # of the loss, and of the norm of all gradients
GATE_CLIPS = 2
BATCHES = (32, 64, 128, 256, 512)
PROVIDERS = ("published", "sdpa", "ours")
ROUNDS = 3


class Step(NamedTuple):
    """A model with B clips; `loss(provider)` is its total."""

    model: CavMae
    batch: Batch
    noise: dict[str, Tensor]
    dtype: str

    def loss(self, provider: str, compiled: bool = False) -> Callable[[], Tensor]:
        attention = (
            published.attention if provider == "published" else F.scaled_dot_product_attention
        )

        def forward() -> Tensor:
            if provider == "ours":
                return self.model(self.batch, self._plans()).total
            return published_step.step_loss(self.model, self.batch, self.noise, attention)

        run = torch.compile(forward) if compiled else forward
        device = self.batch.fbank.device.type

        def under_autocast() -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=self.dtype == "bf16"):
                return run()

        return under_autocast

    def _plans(self):
        config = self.model.config
        grids = {"audio": audio_grid(config), "video": video_grid(config)}
        return {
            name: complementary_masks(
                self.batch.sample_ids,
                grids[name],
                config.mask_ratio,
                num_views=config.num_views,
                noise=noise,
            )
            for name, noise in self.noise.items()
        }


def make_step(preset: str, clips: int, views: int, dtype: str, device: str) -> Step:
    torch.manual_seed(0)
    distill = {"on": "joint", **OBJECTIVE} if views > 1 else {"on": "off"}
    model = build_model("kdc_mae", preset, num_views=views, distill=distill).to(device)
    config = model.config
    batch = Batch(
        torch.randn(clips, config.audio_length, config.num_mel_bins, device=device),
        torch.randn(clips, 3, config.img_size, config.img_size, device=device),
        torch.arange(clips, device=device),
    )
    noise = {
        name: torch.rand(clips, rows * columns, device=device)
        for name, (rows, columns) in (("audio", audio_grid(config)), ("video", video_grid(config)))
    }
    return Step(model, batch, noise, dtype)


def check_agreement(step: Step, provider: str) -> None:
    """The loss and the gradients of a provider are those of the published step."""
    parameters = list(step.model.parameters())
    results = []
    for name in ("published", provider):
        loss = step.loss(name)()
        results.append((loss, *torch.autograd.grad(loss, parameters)))
    losses = [result[0].double() for result in results]
    gradients = [torch.cat([g.double().flatten() for g in result[1:]]) for result in results]
    for expected, got in (losses, gradients):
        error = (got - expected).norm() / expected.norm()
        assert error <= GATE[step.dtype], f"{provider} is {error:.1e} off the published step"


def activation_bytes(step: Step, forward: Callable[[], Tensor]) -> int:
    """Bytes autograd keeps between forward and backward that are no parameter and no input."""
    given = {t.untyped_storage().data_ptr() for t in (*step.model.parameters(), *step.batch)}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # held, so that no storage's address is used twice
    del loss
    return sum(storages.values())


@functools.cache
def flops_per_clip(preset: str, views: int) -> float:
    """Matrix-product FLOPs of the published step, forward and backward, counted by running it."""
    step = make_step(preset, 1, views, "fp32", "cpu")
    with FlopCounterMode(display=False) as counter:
        loss = step.loss("published")()
        torch.autograd.grad(loss, list(step.model.parameters()))
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def product_rate(device: str) -> Callable[[str], float]:
    """FLOP/s of one large matrix product in the dtype of a step, the fastest of several."""
    rates: dict[str, float] = {}

    def measure(dtype: str) -> float:
        if dtype not in rates:
            size = 8192 if device == "cuda" else 1024
            kind = torch.bfloat16 if dtype == "bf16" else torch.float32
            a, b = (torch.randn(size, size, device=device).to(kind) for _ in "ab")
            timer = Timer("a @ b", globals={"a": a, "b": b})
            fastest = min(timer.timeit(5).mean for _ in range(5))
            rates[dtype] = 2 * size**3 / fastest
        return rates[dtype]

    return measure


def shapes(full: bool, device: str) -> tuple[str, tuple[int, ...]]:
    """Preset and batch sizes."""
    if device == "cuda":
        return "base", BATCHES
    return ("base", (2,)) if full else ("tiny", (2,))


@pytest.mark.parametrize("index", range(len(BATCHES)))
@pytest.mark.parametrize("views", [2, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_step(dtype, views, index, full, device, benchmark, record, product_rate):
    """The providers take turns, so that what else the machine does meets them alike."""
    preset, batches = shapes(full, device)
    if index >= len(batches):
        pytest.skip("one batch size is enough on a CPU")
    clips = batches[index]
    for provider in PROVIDERS[1:]:
        check_agreement(make_step(preset, GATE_CLIPS, views, dtype, device), provider)
    step = make_step(preset, clips, views, dtype, device)
    runs, figures = {}, {}
    for provider in PROVIDERS:
        run = training_run(step, provider, device)
        try:
            if device == "cuda":
                run()  # compiles, which is none of the step's memory
            figures[provider] = {"peak_bytes": peak_bytes(run)}
        except torch.OutOfMemoryError:
            continue
        runs[provider] = run
        kept = activation_bytes(step, step.loss(provider))
        figures[provider]["saved_for_backward_bytes"] = kept
    if not runs:
        pytest.skip(f"batch {clips} does not fit into this device's memory")
    seconds: dict[str, list[float]] = {provider: [] for provider in runs}

    def everyone() -> None:
        for provider, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[provider].append(time.perf_counter() - start)

    benchmark.group = f"step {preset} B={clips} K={views} {dtype}"
    benchmark.pedantic(everyone, rounds=ROUNDS)
    for provider, taken in seconds.items():
        if not benchmark.disabled:
            rate = clips / min(taken)
            figures[provider]["samples_per_second"] = rate
            figures[provider]["mfu"] = flops_per_clip(preset, views) * rate / product_rate(dtype)
        record(provider=provider, seconds=taken, **figures[provider])


def training_run(step: Step, provider: str, device: str) -> Callable[[], None]:
    """Forward and backward pass of a provider, waited for."""
    forward = step.loss(provider, compiled=provider == "sdpa" and device == "cuda")
    parameters = list(step.model.parameters())

    def run() -> None:
        torch.autograd.grad(forward(), parameters)
        if device == "cuda":
            torch.cuda.synchronize()

    return run
