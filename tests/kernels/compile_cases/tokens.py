"""What the compile gate compiles for kernels/tokens; test_compile_gate.py says how."""

import torch

BATCH = 64
WIDE = ["LDG.E.128", "STG.E.128"]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def plan(tokens: int) -> torch.Tensor:
    return empty(BATCH, tokens, dtype=torch.int16)


def gather(tokens: int, dim: int, dtype: torch.dtype):
    def launch() -> None:
        from kdcmae_fast.kernels.tokens import kernel

        keep = tokens // 4
        kernel.gather_rows(empty(BATCH, tokens, dim, dtype=dtype), plan(tokens), keep, 2)
        grad = empty(2 * BATCH, keep, dim, dtype=dtype)
        kernel.gather_rows_backward(grad, plan(tokens), keep, 2)

    return launch


def patches(pixels: torch.Tensor, tokens: int):
    def launch() -> None:
        from kdcmae_fast.kernels.tokens import kernel

        channels = 1 if pixels.dim() == 3 else pixels.shape[1]
        statistics = (empty(channels, dtype=torch.float32),) * 2
        if pixels.dtype != torch.uint8:
            statistics = (None, None)
        kernel.visible_patches(
            pixels, *statistics, plan(tokens), tokens // 4, 2, [16, 16], torch.bfloat16
        )

    return launch


def assembly(dtype: torch.dtype):
    def launch() -> None:
        from kdcmae_fast.kernels.tokens import kernel

        plans, keeps = [plan(512), plan(196)], [128, 49]
        x, pos = empty(2 * BATCH, 177, 512, dtype=dtype), empty(708, 512, dtype=torch.float32)
        kernel.assemble(x, pos, pos.to(dtype), plans, keeps, 2, False)
        grad = empty(2 * BATCH, 708, 512, dtype=dtype)
        kernel.assemble_backward(grad, plans, keeps, 2, False)
        kernel.assemble_backward_pos(grad, plans, keeps, 2, False)

    return launch


GATHER = {
    "gather_rows_fwd_kernel": {"registers": 64, "contains": WIDE},
    "gather_rows_bwd_kernel": {"registers": 64, "contains": WIDE},
}
ASSEMBLY = {
    "assemble_fwd_kernel": {"registers": 96, "contains": WIDE},
    "assemble_bwd_kernel": {"registers": 96, "contains": WIDE},
}
PATCHES = {"visible_patches_fwd_kernel": {"registers": 96, "contains": WIDE}}
BYTES = {"visible_patches_fwd_kernel": {"registers": 96, "contains": ["STG.E.128"]}}

CASES = {
    "tokens-gather-bf16": (gather(512, 768, torch.bfloat16), GATHER),
    "tokens-gather-fp32": (gather(196, 768, torch.float32), GATHER),
    "tokens-assembly-bf16": (assembly(torch.bfloat16), ASSEMBLY),
    "tokens-assembly-fp32": (assembly(torch.float32), ASSEMBLY),
    "tokens-patches-audio": (patches(empty(BATCH, 1024, 128, dtype=torch.float32), 512), PATCHES),
    "tokens-patches-image": (patches(empty(BATCH, 3, 224, 224, dtype=torch.uint8), 196), BYTES),
}
