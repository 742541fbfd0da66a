"""Pretrain CAV-MAE or KDC-MAE.

One process:    deepspeed kdcmae_fast/pretrain.py --ds_config configs/zero2.json
N processes:    deepspeed --num_gpus N kdcmae_fast/pretrain.py --ds_config configs/zero2.json
Many machines:  deepspeed --hostfile hosts kdcmae_fast/pretrain.py --ds_config configs/zero2.json
torchrun:       torchrun --nproc_per_node N kdcmae_fast/pretrain.py --ds_config configs/zero2.json
Slurm:          srun torchrun --nnodes $SLURM_NNODES --nproc_per_node 8 --rdzv_backend c10d \\
                    --rdzv_endpoint $HEAD_NODE:29500 kdcmae_fast/pretrain.py --ds_config ...
No launcher:    python kdcmae_fast/pretrain.py --ds_config configs/zero2.json

Without --recipe it trains configs/demo.yaml on built-in synthetic clips. Settings are changed by
key=value, DeepSpeed's by ds.key=value:
    --recipe configs/kdc_mae.yaml data.path=train.json train.epochs=10 ds.gradient_clipping=1.0
"""

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

# The launcher puts this folder first on sys.path; its modules must not become top-level names.
_here = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _here]

from kdcmae_fast.training.command import one_line, run_pretraining
from kdcmae_fast.training.distributed import leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="settings on top of the recipe's")
    add("--ds_config", type=Path, help="DeepSpeed's JSON; default configs/zero2.json, or the run's")
    add("--recipe", type=Path, help="YAML; default configs/demo.yaml, with --resume the run's own")
    add(
        "--output", type=Path, default=Path("runs/pretrain"), help="run folder; default %(default)s"
    )
    add("--resume", action="store_true", help="go on from the newest complete checkpoint, if any")
    add("--profile", action="store_true", help="write a torch profiler trace of steps 4 to 6")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)

    rank = "" if os.environ.get("RANK", "0") == "0" else f" on rank {os.environ['RANK']}"
    level = logging.ERROR if rank else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    # DeepSpeed calls collectives by names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if options.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    try:
        run_pretraining(options)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"error{rank}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
