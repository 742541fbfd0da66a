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


# Predictions are read and gradients written 16 bytes at a time; pixels come in target order.
AUDIO = {
    "reconstruction_loss_fwd_kernel": {"registers": 64, "contains": ["LDG.E.128"]},
    "reconstruction_loss_bwd_kernel": {"registers": 64, "contains": ["LDG.E.128", "STG.E.128"]},
}

FBANKS = empty(BATCH, 1024, 128, dtype=torch.float32)
FRAMES = empty(BATCH, 3, 224, 224, dtype=torch.uint8)
CASES = {
    "reconstruction-audio": (loss(FBANKS, 512, 256, True), AUDIO),
    "reconstruction-image": (loss(FRAMES, 196, 768, False), AUDIO),
}
