"""How every benchmark here is run: correctness first, then time, then one row per result.

`pytest benchmarks/ --benchmark-only` runs toy shapes on a CPU and the real ones on a GPU; `--full`
takes the real ones anywhere. `--results FILE.jsonl` appends the rows to a file.
"""

import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpuinfo import get_cpu_info
from torch import Tensor

ROWS: list[dict] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="real shapes, also without a GPU")
    parser.addoption("--results", metavar="FILE", help="append one JSON line per result to FILE")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest, device: str) -> bool:
    """Whether to take the real shapes."""
    return request.config.getoption("--full") or device == "cuda"


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes autograd keeps between forward and backward, parameters and inputs included once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def peak_bytes(step: Callable[[], None]) -> int | None:
    """Peak allocation above the start of one step; CUDA only (None elsewhere)."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture
def measure(benchmark, device: str) -> Callable[..., None]:
    """Time one provider of one op and record a row.

    measure(group, provider, forward, leaves, expected): `forward()` returns the op's output, whose
    mean over all elements is differentiated with respect to `leaves` (none: forward only).
    `expected` is the reference output; the row is not written when `forward()` differs from it.
    """

    def run(
        group: str,
        provider: str,
        forward: Callable[[], Tensor],
        leaves: tuple[Tensor, ...] = (),
        expected: Tensor | None = None,
        tolerance: float = 1e-4,
    ) -> None:
        with torch.no_grad():
            output = forward()
        if expected is not None:
            torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)

        def step() -> None:
            output = forward()
            if leaves:
                torch.autograd.grad(output.float().mean(), leaves)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        extra = {"provider": provider, "peak_bytes": peak_bytes(step)}
        if leaves:
            extra["saved_for_backward_bytes"] = saved_bytes(forward)
        benchmark.extra_info.update(extra)
        benchmark.pedantic(step, rounds=15, warmup_rounds=3)
        if not benchmark.disabled:
            ROWS.append({"group": group, **extra, **timing(benchmark.stats.stats.data)})

    return run


def timing(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    p20, median, p80 = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).mul(1e3)
    return {"median_ms": round(median.item(), 4), "p20_ms": round(p20.item(), 4),
            "p80_ms": round(p80.item(), 4)}  # fmt: skip


def environment() -> dict[str, str | int]:
    """What a row needs to be comparable with another."""
    sha = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    on_cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_cuda else get_cpu_info()["brand_raw"]
    return {"commit": sha, "torch": torch.__version__, "python": platform.python_version(),
            "device": device, "threads": torch.get_num_threads()}  # fmt: skip


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--results")
    if path and ROWS:
        with open(path, "a") as file:
            for row in ROWS:
                file.write(json.dumps({**row, **environment()}) + "\n")
