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
from bench_providers import compile_problem
from conftest import peak_bytes, quiet
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
MOST_CLIPS = {"fp32": 64, "bf16": 512}  # on a GPU: without tensor cores a step takes seconds
COMPILED_CLIPS = 128  # one batch size on a GPU, in bf16: torch.compile takes a minute for each
PROVIDERS = ("published", "sdpa", "compile", "ours")  # compile: of sdpa
ROUNDS = 3


class Step(NamedTuple):
    """A model with B clips; `loss(provider)` is its total."""

    model: CavMae
    batch: Batch
    noise: dict[str, Tensor]
    dtype: str

    def loss(self, provider: str) -> Callable[[], Tensor]:
        attention = (
            published.attention if provider == "published" else F.scaled_dot_product_attention
        )

        def forward() -> Tensor:
            if provider == "ours":
                return self.model(self.batch, self._plans()).total
            return published_step.step_loss(self.model, self.batch, self.noise, attention)

        run = torch.compile(forward, dynamic=False) if provider == "compile" else forward
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


@functools.cache
def make_model(preset: str, views: int, device: str) -> CavMae:
    torch.manual_seed(0)
    distill = {"on": "joint", **OBJECTIVE} if views > 1 else {"on": "off"}
    return build_model("kdc_mae", preset, num_views=views, distill=distill).to(device)


def make_step(preset: str, clips: int, views: int, dtype: str, device: str) -> Step:
    model = make_model(preset, views, device)
    torch.manual_seed(0)
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


@functools.cache
def check_agreement(preset: str, views: int, dtype: str, device: str, provider: str) -> None:
    """The loss and the gradients of a provider are those of the published step."""
    step = make_step(preset, GATE_CLIPS, views, dtype, device)
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
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_step(dtype, views, index, full, device, benchmark, record, product_rate, request):
    """The providers take turns, so that what else the machine does meets them alike."""
    preset, batches = shapes(full, device)
    if index >= len(batches):
        pytest.skip("one batch size is enough on a CPU")
    clips = batches[index]
    if clips > MOST_CLIPS[dtype]:
        pytest.skip(f"{dtype} steps of {clips} clips take too long")
    step = make_step(preset, clips, views, dtype, device)
    runs, figures, losses = {}, {}, {}
    for provider in PROVIDERS:
        if provider == "compile" and not compiles(clips, dtype, device, request.config):
            continue
        with quiet(provider == "compile"):  # which says that fp32 is not TF32, an error here
            if provider in ("sdpa", "ours"):
                check_agreement(preset, views, dtype, device, provider)
            run = training_run(step, provider, device)
            try:
                found = run()  # compiles, which is none of the step's memory
                own: dict[str, object] = {"peak_bytes": peak_bytes(run)}
                if provider != "compile":  # it would compile once more
                    own["saved_for_backward_bytes"] = activation_bytes(step, step.loss(provider))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
        assert abs(found / losses.setdefault("first", found) - 1) <= GATE[dtype], provider
        runs[provider], figures[provider] = run, own
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


def compiles(clips: int, dtype: str, device: str, config: pytest.Config) -> bool:
    """Whether torch.compile takes part; if so, as if this were its only step."""
    if device != "cuda" or config.option.no_compile or compile_problem(device):
        return False
    torch._dynamo.reset()
    return clips == COMPILED_CLIPS and dtype == "bf16"


def training_run(step: Step, provider: str, device: str) -> Callable[[], float]:
    """Forward and backward pass of a provider, waited for; returns the loss."""
    forward = step.loss(provider)
    parameters = list(step.model.parameters())

    def run() -> float:
        loss = forward()
        torch.autograd.grad(loss, parameters)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return run
