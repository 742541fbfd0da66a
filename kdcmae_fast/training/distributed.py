"""Processes: start them under any launcher, agree between them, end them cleanly."""

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

# How many processes a launcher started that leaves the rest to others.
STEP_SIZES = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}
MEETING_POINT = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class World(NamedTuple):
    """This process among all: rank 0 .. size - 1, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs and reports."""
        return self.rank == 0


def join_world(local_rank: int | None = None) -> World:
    """Start DeepSpeed's communication: gloo on CPU, nccl on CUDA.

    Works under `deepspeed`, torchrun, Slurm with RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR set,
    and without any launcher (one process). `local_rank` is the launcher's --local_rank, if any.

    Raises ValueError where the environment names no meeting point, or only a part of one.
    """
    if local_rank is not None and local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    _check_environment()
    if "RANK" not in os.environ:
        _stand_alone()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it finds no other
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its shared-memory all-reduce would be compiled on first use; gloo needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    device = torch.device("cpu")
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device = torch.device(accelerator.current_device_name())
    elif "OMP_NUM_THREADS" not in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"no meeting point of the processes at {where} ({error}); another run may have it: "
            "give the launcher another --master_port"
        ) from error
    return World(dist.get_rank(), dist.get_world_size(), device)


def _check_environment() -> None:
    """ValueError for processes that would not find each other: each would do the whole run."""
    if "RANK" in os.environ:
        missing = [name for name in MEETING_POINT if name not in os.environ]
        if missing:
            raise ValueError(
                f"the environment sets RANK, but not {', '.join(missing)}: start with torchrun or "
                "deepspeed (see --help), or set them all"
            )
        return
    for name, launcher in STEP_SIZES.items():
        size = os.environ.get(name, "1")
        if size != "1":
            raise ValueError(
                f"{launcher} started {size} processes ({name}) without RANK, WORLD_SIZE, ... in "
                "their environment: each would train alone into the same --output; let it start "
                "one torchrun per machine (see --help)"
            )


def _stand_alone() -> None:
    """What a launcher would have put into the environment, for one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def sum_over_ranks(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """Element-wise sum over all ranks; waits for the device once."""
    parts = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    total = torch.stack(parts)
    dist.all_reduce(total)
    return total.tolist()


def gather_lists(items: Sequence[Any], world: World) -> list[Any]:
    """The items of all ranks in rank order, on every rank."""
    parts: list[list[Any]] = [[] for _ in range(world.size)]
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


@contextmanager
def naming_lost_peers(world: World) -> Iterator[None]:
    """What communication says when another process of the run has ended, as one clear line."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not is_lost_peer(error):
            raise
        raise ConnectionError(
            "another process of the run has ended or cannot be reached, its own message says why; "
            f"pass --resume to go on from the last checkpoint ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})"
        ) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` comes from gloo or nccl rather than from this process's own work."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave(code: int) -> NoReturn:
    """End this process now, with everything written flushed.

    Interpreter shutdown is skipped: communication threads that are still alive then can abort a
    process whose work is done ("terminate called without an active exception").
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
