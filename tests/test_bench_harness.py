"""The benchmark suite's own measuring: what it counts, and that wrong results leave no row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_ceilings
import bench_costs
import bench_memory
import bench_timing
import pytest
import torch
from bench_ceilings import Cost
from bench_streams import Stream

ROOT = Path(__file__).parents[1]

SUITE = """
import pytest, torch

x = torch.randn(16, 8, requires_grad=True)

class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.5

WAYS = {
    "published": lambda: x * 2,
    "right": lambda: x + x,
    "wrong": lambda: x * 2.001,
    "wrong_gradient": lambda: WrongGradient.apply(x),
}

@pytest.mark.parametrize("provider", WAYS)
def test_op(provider, measure):
    from bench_ceilings import Cost
    cost = {"fwd": Cost(1024), "fwd+bwd": Cost(2048, 4096)}
    measure("op", provider, WAYS[provider], (x,), reference=WAYS["published"], cost=cost)

@pytest.mark.parametrize("provider", ("right", "wrong"))
def test_as_others_call_it(provider, measure):
    measure("plain", provider, WAYS[provider], (x,), (x * 2).detach(), 1e-5)

def test_own_timing(benchmark, record):
    benchmark.group = "own"
    benchmark.pedantic(x.sum, rounds=4)
    record(provider="right", mode="fwd", samples=3)

def test_given_times(benchmark, record):
    benchmark.pedantic(x.sum, rounds=4)
    record(group="given", provider="right", mode="fwd", seconds=[0.25, 0.5, 0.75])

def test_forward_only(measure):
    measure("leafless", "right", lambda: torch.ones(3).sum(), expected=torch.tensor(3.0))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> tuple[str, list[dict]]:
    """(output, rows) of a small suite that runs with benchmarks/conftest.py."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_suite.py").write_text(SUITE)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-q", "--benchmark-only", "-rA",
         "--rootdir", folder, "-c", os.devnull, "--results", "rows.jsonl", "test_suite.py"],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return done.stdout + done.stderr, [json.loads(line) for line in lines]


def test_only_right_results_leave_a_row(session):
    output, rows = session
    found = {(row["group"], row["provider"], row["mode"]) for row in rows}
    assert found == {
        ("op", "published", "fwd"), ("op", "published", "fwd+bwd"),
        ("op", "right", "fwd"), ("op", "right", "fwd+bwd"),
        ("op", "wrong_gradient", "fwd"),
        ("plain", "right", "fwd"), ("plain", "right", "fwd+bwd"),
        ("leafless", "right", "fwd"), ("own", "right", "fwd"), ("given", "right", "fwd"),
    }, output  # fmt: skip
    assert "gradient 0: relative error=2.5" in output


def test_a_row_says_what_was_measured(session):
    _, rows = session
    row = next(row for row in rows if row["provider"] == "right" and row["mode"] == "fwd+bwd")
    assert 0 < row["min_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["rounds"] >= bench_timing.ROUNDS[0]
    assert (row["bytes"], row["flops"], row["dtype"]) == (2048, 4096, "float32")
    assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["median_ms"], abs=1e-4)
    assert row["peak_bytes"] >= 2 * 16 * 8 * 4
    for name in ("run", "date", "commit", "torch", "python", "device", "threads", "seed"):
        assert row[name] not in (None, "")


def test_benchmarks_that_time_themselves_have_rows_too(session):
    rows = {row["group"]: row for row in session[1]}
    assert (rows["own"]["samples"], rows["own"]["rounds"]) == (3, 4)
    given = rows["given"]
    assert (given["min_ms"], given["median_ms"], given["p80_ms"]) == (250, 500, 650)


def test_peak_bytes_counts_what_is_alive_at_once():
    def step() -> None:
        first = torch.empty(1 << 20)
        second = torch.empty(1 << 19)
        del first
        torch.empty(1 << 19)
        del second

    assert bench_memory.peak_bytes(step, "cpu") == 6 << 20


def test_saved_bytes_counts_a_storage_once():
    x = torch.ones(100, requires_grad=True)
    assert bench_memory.saved_bytes(lambda: (x * x[:]).sum()) == 400
    assert bench_memory.saved_bytes(lambda: (x * 2.0).sum()) == 0


def test_floor_is_the_longer_of_traffic_and_products(monkeypatch):
    monkeypatch.setattr(bench_ceilings, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(bench_ceilings, "gemm_rate", lambda device, dtype: 1e12)
    moving = bench_ceilings.floor(Cost(2_000_000, 1_000_000), "cpu", torch.float32)
    assert moving == (2.0, 1.0, 1.0)
    multiplying = bench_ceilings.floor(Cost(1000, 3_000_000_000), "cpu", torch.float32)
    assert multiplying.ms == pytest.approx(3.0)


def test_costs_count_what_the_ops_are_given():
    stream = Stream("audio", False, "cpu")
    rows, ranks = 2 * stream.keep, 2 * 2 * stream.keep
    tokens = 2 * rows * stream.dim * 4 + ranks  # read and written
    assert bench_costs.gather(stream)["fwd"] == Cost(stream.batch * tokens)
    product = 2 * stream.batch * rows * stream.values * stream.dim
    assert bench_costs.embed(stream)["fwd+bwd"].flops == 2 * product
    assert bench_costs.info_nce(64, 32)["fwd+bwd"].flops == 6 * 64 * 64 * 32
    assert bench_costs.attention(2, 3, 5, 7)["fwd+bwd"].flops == 7 * 2 * 2 * 3 * 5 * 5 * 7
