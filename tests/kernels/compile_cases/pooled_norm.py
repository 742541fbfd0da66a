"""What the compile gate compiles for pooled LayerNorm; test_compile_gate.py says how."""

import torch

WIDE_LOADS = {
    "pooled_tokens_fwd_kernel": {"registers": 160, "contains": ["LDG.E.128"]},
    "pooled_tokens_bwd_kernel": {"registers": 160, "contains": ["LDG.E.128", "STG.E.128"]},
}
DOUBLE = {name: {**expected, "registers": 200} for name, expected in WIDE_LOADS.items()}
MASKED = {name: {"registers": 160} for name in WIDE_LOADS}


def pool(length: int, width: int, dtype: torch.dtype):
    def launch() -> None:
        from kdcmae_fast.kernels.distillation import kernel_pooled

        x = torch.empty(64, length, width, dtype=dtype, device="meta")
        _, statistics = kernel_pooled.pooled_tokens(x, 1e-5)
        kernel_pooled.pooled_tokens_grad(torch.empty(64, width, device="meta"), x, statistics)

    return launch


CASES = {
    "pooled-768": (pool(177, 768, torch.float32), WIDE_LOADS),
    "pooled-768-bf16": (pool(49, 768, torch.bfloat16), WIDE_LOADS),
    "pooled-1024-half": (pool(128, 1024, torch.float16), WIDE_LOADS),
    "pooled-96": (pool(128, 96, torch.float32), WIDE_LOADS),
    "pooled-8192": (pool(16, 8192, torch.float32), WIDE_LOADS),
    "pooled-16384": (pool(4, 16384, torch.bfloat16), WIDE_LOADS),
    "pooled-one-token": (pool(1, 768, torch.float32), WIDE_LOADS),
    "pooled-float64": (pool(70, 192, torch.float64), DOUBLE),
    "pooled-1023": (pool(49, 1023, torch.float32), MASKED),
}
