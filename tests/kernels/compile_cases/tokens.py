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


def embedding(pixels: torch.Tensor, tokens: int, values: int):
    def launch() -> None:
        from kdcmae_fast.kernels.tokens import kernel_embed as kernel

        statistics = (None, None)
        if pixels.dtype == torch.uint8:
            statistics = (empty(3, dtype=torch.float32),) * 2
        weight, pos = empty(768, values), empty(tokens, 768, dtype=torch.float32)
        rest = (plan(tokens), tokens // 4, 2, [16, 16])
        kernel.embed_patches(pixels, weight, empty(768), pos, *statistics, *rest)
        grad = empty(2 * BATCH * (tokens // 4), 768)
        kernel.embed_patches_backward(grad, pixels, *statistics, *rest)

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

TENSOR_CORES = {
    "contains_80": ["HMMA.16816.F32.BF16"],
    "contains_90": ["HGMMA.64"],
    "contains_100": ["UTCHMMA"],
}
EMBEDDING = {
    "embed_patches_fwd_kernel": {
        "registers": 232, "contains": ["LDGSTS.E.BYPASS.128", "STG.E.128"], **TENSOR_CORES,
    },
    "embed_patches_bwd_kernel": {
        "registers": 232,
        # On sm_80 the gradient goes through registers, 16 bytes at a time.
        "contains_80": ["LDG.E.128", *TENSOR_CORES["contains_80"]],
        "contains_90": ["LDGSTS.E.BYPASS.128", *TENSOR_CORES["contains_90"]],
        "contains_100": ["LDGSTS.E.BYPASS.128", *TENSOR_CORES["contains_100"]],
    },
}  # fmt: skip
FBANKS = empty(BATCH, 1024, 128, dtype=torch.float32)
FRAMES = empty(BATCH, 3, 224, 224, dtype=torch.uint8)

CASES = {
    "tokens-gather-bf16": (gather(512, 768, torch.bfloat16), GATHER),
    "tokens-gather-fp32": (gather(196, 768, torch.float32), GATHER),
    "tokens-assembly-bf16": (assembly(torch.bfloat16), ASSEMBLY),
    "tokens-assembly-fp32": (assembly(torch.float32), ASSEMBLY),
    "tokens-patches-audio": (patches(FBANKS, 512), PATCHES),
    "tokens-patches-image": (patches(FRAMES, 196), BYTES),
    "tokens-embedding-audio": (embedding(FBANKS, 512, 256), EMBEDDING),
    "tokens-embedding-audio-bf16": (embedding(FBANKS.bfloat16(), 512, 256), EMBEDDING),
    "tokens-embedding-image": (embedding(FRAMES, 196, 768), EMBEDDING),
}
