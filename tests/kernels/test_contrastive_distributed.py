"""InfoNCE over real process groups: value and gradients of the global batch.

The file is also the program of each process: `python test_contrastive_distributed.py RANK FILE`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdcmae_fast.kernels import info_nce

WORLD = 4
BATCH = 3  # per rank
WIDTH = 5


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch of `size` ranks, and the losses' weights for reduction="none"."""
    generator = torch.Generator().manual_seed(size)
    shape = (size * BATCH, WIDTH)
    a, noise = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.rand(size * BATCH, dtype=torch.float64, generator=generator)
    return a, a + noise, weight


CASES = [
    (symmetric, reduction, dtype)
    for symmetric in (False, True)
    for reduction in ("mean", "none")
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
]


def run_case(group, rank: int, size: int, symmetric: bool, reduction: str, dtype) -> dict:
    """One loss and its gradients, of a group's rank or (group None) of the whole batch."""
    a, b, weight = inputs(size)
    rows = slice(None) if group is None else slice(rank * BATCH, (rank + 1) * BATCH)
    a, b = (x[rows].to(dtype).requires_grad_() for x in (a, b))
    tau = torch.tensor(0.2, dtype=dtype, requires_grad=True)
    loss, accuracy = info_nce(
        a, b, temperature=tau, symmetric=symmetric, reduction=reduction, group=group,
        return_accuracy=True,
    )  # fmt: skip
    objective = loss if reduction == "mean" else loss.double() @ weight[rows]
    grads = torch.autograd.grad(objective, (a, b, tau))
    return {"loss": loss.detach(), "accuracy": accuracy, "grads": [g.double() for g in grads]}


def worker(rank: int, rendezvous: str) -> None:
    """Every case in the world of 4 and in its two groups of 2; results to RENDEZVOUS.RANK."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = halves[rank // 2]
    results: dict = {"cases": {}}
    for size, group in ((WORLD, dist.group.WORLD), (2, own)):
        for case in CASES:
            place = dist.get_rank(group)
            results["cases"][(size, *case)] = run_case(group, place, size, *case)
    results["alone"] = run_case(dist.new_group([rank], use_local_synchronization=True), 0, 1,
                                True, "mean", torch.float64)  # fmt: skip
    for name, call in {
        "unequal": lambda: info_nce(torch.ones(2 + rank % 2, 4), torch.ones(2 + rank % 2, 4),
                                    group=own),
        "foreign": lambda: info_nce(torch.ones(2, 4), torch.ones(2, 4),
                                    group=halves[1 - rank // 2]),
    }.items():  # fmt: skip
        try:
            call()
        except ValueError as error:
            results[name] = str(error)
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = info_nce(empty, empty, group=own)
    loss.backward()
    results["empty"] = loss.item()
    torch.save(results, f"{rendezvous}.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a process that tears down under load


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    rendezvous = tmp_path_factory.mktemp("gloo") / "store"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(rendezvous)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log
    return [torch.load(Path(f"{rendezvous}.{rank}")) for rank in range(WORLD)]


@pytest.mark.parametrize("size", [2, WORLD])
@pytest.mark.parametrize("symmetric, reduction, dtype", CASES)
def test_equals_one_process_with_the_whole_batch(results, size, symmetric, reduction, dtype):
    case = (size, symmetric, reduction, dtype)
    exact = run_case(None, 0, size, symmetric, reduction, torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    for first in range(0, WORLD, size):
        ranks = [results[rank]["cases"][case] for rank in range(first, first + size)]
        if reduction == "mean":
            for rank in ranks:
                assert torch.equal(rank["loss"], ranks[0]["loss"])  # bit for bit
                assert torch.equal(rank["accuracy"], ranks[0]["accuracy"])
            loss, accuracy, scale = ranks[0]["loss"], ranks[0]["accuracy"], size
        else:
            loss = torch.cat([rank["loss"] for rank in ranks])
            accuracy, scale = torch.cat([rank["accuracy"] for rank in ranks]), 1
        torch.testing.assert_close(loss.double(), exact["loss"], **close)
        if dtype == torch.float64:
            torch.testing.assert_close(accuracy, exact["accuracy"])
        for index in range(2):  # an engine's mean over ranks undoes the scale
            grad = torch.cat([rank["grads"][index] for rank in ranks]) / scale
            torch.testing.assert_close(grad, exact["grads"][index], **close)
        grad_tau = sum(rank["grads"][2] for rank in ranks) / scale
        torch.testing.assert_close(grad_tau, exact["grads"][2], **close)


def test_group_of_one_equals_no_group(results):
    exact = run_case(None, 0, 1, True, "mean", torch.float64)
    for result in results:
        assert torch.equal(result["alone"]["loss"], exact["loss"])


def test_errors_reach_every_rank(results):
    for result in results:
        assert result["unequal"] == "a must have the same batch size on every rank, " \
            "got [2, 3] by rank"  # fmt: skip
        assert "group does not contain this process" in result["foreign"]
        assert result["empty"] == 0


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
