"""The max-pooled InfoNCE over a real process group: value and gradients of the global batch.

The file is also the program of each process: `python test_max_pooled_distributed.py RANK FILE`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdcmae_fast.kernels import max_pooled_info_nce
from kdcmae_fast.kernels.common import unavailable
from kdcmae_fast.kernels.contrastive.max_pooled import OP

WORLD = 2
BATCH = 3  # per rank
IMPLS = [impl for impl in ("torch", "cpp") if not unavailable(OP, impl, "cpu")]
CASES = [
    (impl, symmetric, reduction, dtype)
    for impl in IMPLS
    for symmetric in (False, True)
    for reduction in ("mean", "none")
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch, and the losses' weights for reduction="none"."""
    generator = torch.Generator().manual_seed(5)
    rows = WORLD * BATCH
    shapes = ((rows, 4, 5), (rows, 5))
    maps, vectors = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    maps[:, 1] += vectors
    return maps, vectors, torch.rand(rows, dtype=torch.float64, generator=generator)


def run_case(group, rank: int, impl: str, symmetric: bool, reduction: str, dtype) -> dict:
    """One loss and its gradients, of a group's rank or (group None) of the whole batch."""
    maps, vectors, weight = inputs()
    rows = slice(None) if group is None else slice(rank * BATCH, (rank + 1) * BATCH)
    leaves = [x[rows].to(dtype).requires_grad_() for x in (maps, vectors)]
    leaves.append(torch.tensor(0.2, dtype=dtype, requires_grad=True))
    loss, accuracy = max_pooled_info_nce(
        *leaves[:2], temperature=leaves[2], symmetric=symmetric, reduction=reduction, group=group,
        return_accuracy=True, impl=impl,
    )  # fmt: skip
    objective = loss if reduction == "mean" else loss.double() @ weight[rows]
    grads = torch.autograd.grad(objective, leaves)
    return {"loss": loss.detach(), "accuracy": accuracy, "grads": [g.double() for g in grads]}


def worker(rank: int, rendezvous: str) -> None:
    """Every case; results to RENDEZVOUS.RANK."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    results: dict = {case: run_case(group, rank, *case) for case in CASES}
    try:
        max_pooled_info_nce(torch.ones(2 + rank, 3, 4), torch.ones(2 + rank, 4), group=group)
    except ValueError as error:
        results["unequal"] = str(error)
    empty = torch.zeros(0, 3, 4, requires_grad=True)
    loss = max_pooled_info_nce(empty, torch.zeros(0, 4), group=group)
    loss.backward()
    results["empty"] = loss.item()
    torch.save(results, f"{rendezvous}.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a process that tears down under load


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    rendezvous = tmp_path_factory.mktemp("gloo") / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(rendezvous)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
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


@pytest.mark.parametrize("impl, symmetric, reduction, dtype", CASES)
def test_equals_one_process_with_the_whole_batch(results, impl, symmetric, reduction, dtype):
    ranks = [result[(impl, symmetric, reduction, dtype)] for result in results]
    exact = run_case(None, 0, "torch", symmetric, reduction, torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    if reduction == "mean":
        assert torch.equal(ranks[1]["loss"], ranks[0]["loss"])  # bit for bit
        assert torch.equal(ranks[1]["accuracy"], ranks[0]["accuracy"])
        loss, accuracy, scale = ranks[0]["loss"], ranks[0]["accuracy"], WORLD
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


def test_errors_reach_every_rank(results):
    for result in results:
        assert result["unequal"] == "maps must have the same batch size on every rank, " \
            "got [2, 3] by rank"  # fmt: skip
        assert result["empty"] == 0


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
