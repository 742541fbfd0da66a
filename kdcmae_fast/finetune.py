"""Fine-tune a pretrained CAV-MAE, KDC-MAE or CAV-MAE Sync to classify clips.

One process:    deepspeed kdcmae_fast/finetune.py --ds_config configs/zero2.json
N processes:    deepspeed --num_gpus N kdcmae_fast/finetune.py --ds_config configs/zero2.json
and as `pretrain.py` under torchrun, Slurm and a hostfile.

Without --recipe it trains configs/finetune_demo.yaml on built-in synthetic clips. The model to
start from, and clips with labels:
    --recipe configs/finetune_vggsound.yaml train.init_from=runs/pretrain/model \\
        data.path=train.json data.eval_path=test.json data.label_csv=labels.csv
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

from kdcmae_fast.training.command import run_finetuning
from kdcmae_fast.training.distributed import leave
from kdcmae_fast.training.script import run_script


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_script("finetune", __doc__, "finetune_demo.yaml", run_finetuning, arguments)


if __name__ == "__main__":
    leave(main())
