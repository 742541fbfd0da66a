"""What the compile gate compiles for kernels/reconstruction; test_compile_gate.py says how."""

import torch

BATCH = 64


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def loss(pixels: torch.Tensor, tokens: int, values: int, masked_only: bool):
    def launch() -> None:
        from kdcmae_fast.kernels.reconstruction import kernel

        keep = tokens // 4
        pred = empty(2 * BATCH, tokens - keep if masked_only else tokens, values)
        statistics = (None, None)
        if pixels.dtype == torch.uint8:
            statistics = (empty(3, dtype=torch.float32),) * 2
        ranks = empty(BATCH, tokens, dtype=torch.int16)
        static = (keep, 2, [16, 16], True, masked_only)
        kernel.reconstruction_loss(pred, pixels, *statistics, ranks, *static)
        grad = empty(2 * BATCH, dtype=torch.float32)
        kernel.reconstruction_loss_backward(grad, pred, pixels, *statistics, ranks, *static)

    return launch


def head(pixels: torch.Tensor, tokens: int, values: int, dtype: torch.dtype, masked_only: bool):
    def launch() -> None:
        from kdcmae_fast.kernels.reconstruction import kernel_head as kernel

        keep = tokens // 4
        x = empty(2 * BATCH, tokens - keep if masked_only else tokens, 512, dtype=dtype)
        weight, bias = empty(values, 512, dtype=dtype), empty(values, dtype=dtype)
        statistics = (None, None)
        if pixels.dtype == torch.uint8:
            statistics = (empty(3, dtype=torch.float32),) * 2
        plan = empty(BATCH, tokens, dtype=torch.int16)
        static = (keep, 2, [16, 16], True, masked_only)
        arguments = (x, weight, bias, pixels, *statistics, plan, plan, *static)
        _, mean, rstd = kernel.head_reconstruction_loss(*arguments)
        row_weight = empty(2 * BATCH, dtype=torch.float32)
        kernel.head_reconstruction_loss_backward(row_weight, mean, rstd, *arguments)
        kernel.head_reconstruction_loss_and_gradients(*arguments)

    return launch


# Predictions are read and gradients written 16 bytes at a time; pixels come in target order.
AUDIO = {
    "reconstruction_loss_fwd_kernel": {"registers": 64, "contains": ["LDG.E.128"]},
    "reconstruction_loss_bwd_kernel": {"registers": 64, "contains": ["LDG.E.128", "STG.E.128"]},
}


def head_rows(forward: int, backward: int, pixels: list[str], tensor_cores: dict) -> dict:
    copies = {"contains": ["LDGSTS.E.BYPASS.128", *pixels], **tensor_cores}
    return {
        "head_loss_fwd_kernel": {"registers": forward, **copies},
        "head_loss_bwd_kernel": {"registers": backward, **copies},
        "patch_statistics_kernel": {"registers": 64, "contains": pixels},
    }


NO_TENSOR_CORES = {"lacks": ["UTC", "HGMMA", "HMMA"]}  # they would round float32 to TF32
TENSOR_CORES = {
    "contains_80": ["HMMA.16816.F32.BF16"],
    "contains_90": ["HGMMA.64"],
    "contains_100": ["UTCHMMA"],
}

FBANKS = empty(BATCH, 1024, 128, dtype=torch.float32)
FRAMES = empty(BATCH, 3, 224, 224, dtype=torch.uint8)
CASES = {
    "reconstruction-audio": (loss(FBANKS, 512, 256, True), AUDIO),
    "reconstruction-image": (loss(FRAMES, 196, 768, False), AUDIO),
    "reconstruction-head-audio": (
        head(FBANKS, 512, 256, torch.bfloat16, True),
        head_rows(255, 160, ["LDG.E.128"], TENSOR_CORES),
    ),
    "reconstruction-head-image": (
        head(FRAMES, 196, 768, torch.bfloat16, False),
        head_rows(255, 232, [], TENSOR_CORES),
    ),
    "reconstruction-head-fp32": (
        head(FBANKS, 512, 256, torch.float32, False),
        head_rows(128, 96, ["LDG.E.128"], NO_TENSOR_CORES),
    ),
}
