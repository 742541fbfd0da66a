"""How every benchmark here is run: correctness first, then time, then one row per result.

`pytest benchmarks/ --benchmark-only` runs toy shapes on a CPU and the real ones on a GPU; `--full`
takes the real ones anywhere. `--results FILE.jsonl` appends a row to the file as soon as it is
measured. `kdcmae bench report FILE.jsonl` makes tables and plots of it.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from bench_ceilings import Cost, floor
from bench_environment import SEED, environment
from bench_memory import kernel_launches, peak_bytes, saved_bytes
from bench_providers import COMPILE, PUBLISHED, choose
from bench_timing import cold_cache, device_seconds, graph_seconds, percentiles, rounds_for
from torch import Tensor

__all__ = ["choose"]  # a fixture

MODES = ("fwd", "fwd+bwd")
# Seconds of timed steps per row; on a GPU a row is timed three times, and machines are lent.
BUDGET = {"real": 0.4, "gpu": 0.1, "toy": 0.03}
GRAD_SLACK = 10.0  # a gradient may be off by this many times the tolerance of the output


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="real shapes, also without a GPU")
    parser.addoption("--no-compile", action="store_true", help="leave out torch.compile")
    parser.addoption("--results", metavar="FILE", help="append one JSON line per result to FILE")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _float32_is_float32() -> None:
    """No TF32 for anybody: PyTorch's default allows it in convolutions and not in products."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest, device: str) -> bool:
    """Whether to take the real shapes."""
    return request.config.getoption("--full") or device == "cuda"


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def flush(device: str) -> Callable[[], None]:
    return cold_cache(device)


@pytest.fixture(scope="session")
def write_row(request: pytest.FixtureRequest) -> Callable[[dict], None]:
    """Append a row to the file of `--results`, if there is one."""
    path = request.config.getoption("--results")
    facts = environment() if path else {}

    def write(row: dict) -> None:
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **facts}) + "\n")

    return write


@pytest.fixture
def record(benchmark, write_row) -> Callable[..., None]:
    """For benchmarks that time themselves: record(provider=, mode=, ...) after `benchmark` has run
    writes its row with these figures. seconds: times to write instead of the benchmark's own."""

    def write(
        *, group: str | None = None, seconds: list[float] | None = None, **figures: object
    ) -> None:
        benchmark.extra_info.update(figures)
        if not benchmark.disabled:
            taken = seconds or benchmark.stats.stats.data
            row = {"group": group or benchmark.group, **figures, **percentiles(taken)}
            write_row({**row, "rounds": len(taken)})

    return write


@pytest.fixture(params=MODES)
def measure(request, benchmark, device, full, flush, write_row) -> Callable[..., None]:
    """Time one provider of one op, forward alone and then with its backward pass.

    measure(group, provider, forward, leaves, expected, tolerance, reference=, cost=):
    `forward()` returns the op's output, which is differentiated with respect to `leaves` (none:
    forward only) along one random direction. Leaves keep requiring grad in the forward mode too:
    it is that of a training step.

    No row is written when the output differs from `expected` by more than `tolerance` (relative
    and absolute). `reference` is instead a function like `forward`, whose gradients are compared
    too in the mode that has them, relative to their largest entry.
    cost: {"fwd": Cost, "fwd+bwd": Cost}, the least the op must do, for the share of the floor.
    """

    def run(
        group: str,
        provider: str,
        forward: Callable[[], Tensor],
        leaves: tuple[Tensor, ...] = (),
        expected: Tensor | None = None,
        tolerance: float = 1e-4,
        *,
        reference: Callable[[], Tensor] | None = None,
        cost: dict[str, Cost] | None = None,
    ) -> None:
        mode = request.param
        backward = mode == "fwd+bwd"
        if backward and not leaves:
            pytest.skip("nothing to differentiate")
        with quiet(provider == COMPILE):
            output = forward()
            direction = torch.randn_like(output) if output.dim() else torch.ones_like(output)
            if provider == PUBLISHED:
                reference = None  # it would be compared with itself
            compared = leaves if backward else ()
            check(output, compared, expected, reference, direction, tolerance)
            output = output.detach()

        def step() -> None:
            result = forward()
            if backward:
                torch.autograd.grad(result, leaves, direction)

        dtype = leaves[0].dtype if leaves else output.dtype
        row = {"group": group, "provider": provider, "mode": mode,
               "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        row["peak_bytes"] = peak_bytes(step, device)
        if leaves:
            row["saved_for_backward_bytes"] = saved_bytes(forward)
        benchmark.group = f"{group} {mode}"
        size = "toy" if not full else "gpu" if device == "cuda" else "real"
        row |= times(benchmark, step, flush, device, BUDGET[size])
        if cost and mode in cost:
            row |= floor_share(cost[mode], device, dtype, row["median_ms"])
        benchmark.extra_info.update(row)
        if not benchmark.disabled:
            write_row(row)

    return run


@contextlib.contextmanager
def quiet(enabled: bool) -> Iterator[None]:
    """Without warnings: torch.compile's own, which this suite would turn into errors."""
    with warnings.catch_warnings():
        if enabled:
            warnings.simplefilter("ignore")
        yield


def check(
    output: Tensor,
    leaves: tuple[Tensor, ...],
    expected: Tensor | None,
    reference: Callable[[], Tensor] | None,
    direction: Tensor,
    tolerance: float,
) -> None:
    """Raise AssertionError where the output, or a leaf's gradient, is not the reference's."""
    grads = torch.autograd.grad(output, leaves, direction) if leaves else ()
    if reference is not None:
        expected = reference()
        wanted = torch.autograd.grad(expected, leaves, direction) if leaves else ()
        for index, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
            error = (grad.float() - want.float()).abs().max() / want.float().abs().max()
            limit = GRAD_SLACK * tolerance
            assert error <= limit, f"gradient {index}: relative {error=:.2e} {limit=:.0e}"
    if expected is not None:
        torch.testing.assert_close(
            output, expected, rtol=tolerance, atol=tolerance, check_dtype=False
        )


def times(benchmark, step, flush, device: str, budget: float) -> dict[str, object]:
    """median, p20, p80; on a GPU of the device's own time, with wall and graph time beside it."""
    if device == "cpu":
        benchmark.pedantic(step, setup=flush, rounds=rounds_for(step, flush, budget))
        seconds = [] if benchmark.disabled else benchmark.stats.stats.data
        return {**percentiles(seconds), "rounds": len(seconds)} if seconds else {"median_ms": 0.0}

    def waited() -> None:
        step()
        torch.cuda.synchronize()

    def flushed() -> None:
        flush()
        torch.cuda.synchronize()

    rounds = rounds_for(waited, flushed, budget)
    benchmark.pedantic(waited, setup=flushed, rounds=rounds)
    row: dict[str, object] = {
        **percentiles(device_seconds(step, flush, rounds)),
        "rounds": rounds,
        "launches": kernel_launches(step),
    }
    if not benchmark.disabled:
        row["wall_ms"] = percentiles(benchmark.stats.stats.data)["median_ms"]
    try:
        row["graph_ms"] = percentiles(graph_seconds(step, flush, rounds))["median_ms"]
    except Exception as error:
        row["graph_ms"], row["no_graph"] = None, str(error).splitlines()[0]
    return row


def floor_share(cost: Cost, device: str, dtype: torch.dtype, median_ms: float) -> dict[str, object]:
    """Counted work, the time it needs at this machine's measured rates, and our share of that."""
    least = floor(cost, device, dtype)
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "floor_ms": round(least.ms, 5),
        "floor_share": round(least.ms / median_ms, 4) if median_ms else None,
        "copy_gb_s": round(least.copy_gb_s, 1),
        "gemm_tflop_s": round(least.gemm_tflop_s, 3),
    }
