"""What the compile gate compiles for kernels/masking."""

import torch


def plan(mode: str, grid: tuple[int, ...], ratio: float = 0.75, device_step: bool = False):
    def launch() -> None:
        from kdcmae_fast.kernels.masking import kernel, reference

        ids = torch.empty(64, dtype=torch.int64, device="meta")
        step = torch.empty((), dtype=torch.int64, device="meta") if device_step else None
        sizes = reference.mode_sizes(mode, grid, ratio)
        kernel.mask_plan(ids, step, 0, 0, 0, reference.MODES.index(mode), list(grid), sizes)

    return launch


def noise(dtype: torch.dtype):
    def launch() -> None:
        from kdcmae_fast.kernels.masking import kernel

        kernel.rank_noise(torch.empty(64, 512, dtype=dtype, device="meta"))

    return launch


LAUNCHES = {
    "unstructured-audio": plan("unstructured", (8, 64)),
    "unstructured-video": plan("unstructured", (14, 14), device_step=True),
    "tf": plan("tf", (8, 64)),
    "tube": plan("tube", (8, 14, 14), 0.9),
    "block": plan("block", (14, 14)),
    "noise-float32": noise(torch.float32),
}
CASES = {name: {"launch": launch, "registers": 128} for name, launch in LAUNCHES.items()}
