"""What the compile gate compiles for kernels/distillation; test_compile_gate.py says how."""

import torch

ROWS = {
    "distillation_fwd_kernel": {"registers": 96, "contains": ["LDG.E.128"]},
    "distillation_bwd_kernel": {"registers": 128, "contains": ["LDG.E.128", "STG.E.128"]},
}


def rows(divergence: str, distribution: str, width: int, dtype: torch.dtype):
    def launch() -> None:
        from kdcmae_fast.kernels.distillation import kernel

        p = torch.empty(64, width, dtype=dtype, device="meta")
        kernel.distillation_rows(p, p, divergence, distribution, 1.0)
        grad = torch.empty(64, device="meta")
        kernel.distillation_rows_grad(grad, p, p, divergence, distribution, 1.0)

    return launch


CASES = {
    "distillation-kl": (rows("kl", "softmax", 768, torch.float32), ROWS),
    "distillation-kl-12": (rows("kl_12", "softmax", 768, torch.bfloat16), ROWS),
    "distillation-js": (rows("js", "softmax", 8192, torch.float32), ROWS),
    "distillation-shift": (rows("kl", "shift", 768, torch.bfloat16), ROWS),
    "distillation-js-batch-shift": (rows("js", "batch_shift", 768, torch.float32), ROWS),
}
