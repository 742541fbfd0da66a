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

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# The launcher puts this folder first on sys.path; its modules must not become top-level names.
_here = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _here]
if __name__ == "__main__":
    # Before torch starts OpenMP: threads that spin while they wait take the loader's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from kdcmae_fast.training.command import run_pretraining
from kdcmae_fast.training.distributed import leave
from kdcmae_fast.training.script import run_script


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_script("pretrain", __doc__, "demo.yaml", run_pretraining, arguments)


if __name__ == "__main__":
    leave(main())
