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
import warnings
from collections.abc import Sequence
from pathlib import Path

# The launcher puts this folder first on sys.path; its modules must not become top-level names.
_here = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _here]
if __name__ == "__main__":
    # Before torch starts OpenMP: threads that spin while they wait take the loader's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from kdcmae_fast.messages import Parser, report_error
from kdcmae_fast.training.command import run_pretraining
from kdcmae_fast.training.distributed import leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    on_main = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if on_main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    # DeepSpeed calls collectives by names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        options = _parser().parse_intermixed_args(given)
        if options.local_rank >= 0:
            os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
        run_pretraining(options)
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, debug="--debug" in given)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    return parser


if __name__ == "__main__":
    leave(main())
