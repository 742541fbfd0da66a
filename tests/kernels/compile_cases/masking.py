"""What the compile gate compiles for kernels/masking; test_compile_gate.py says how."""

import torch

PLAN = {
    "mask_keys_kernel": {"registers": 64},
    "rank_keys_kernel": {"registers": 64, "contains": ["LDG.E.128"]},
}
NOISE = {"rank_keys_kernel": PLAN["rank_keys_kernel"]}


def plan(mode: str, grid: tuple[int, ...], ratio: float = 0.75, device_step: bool = False):
    def launch() -> None:
        from kdcmae_fast.kernels.masking import kernel, reference

        ids = torch.empty(64, dtype=torch.int64, device="meta")
        step = torch.empty((), dtype=torch.int64, device="meta") if device_step else None
        sizes = reference.mode_sizes(mode, grid, ratio)
        kernel.mask_plan(ids, step, 0, 0, 0, reference.MODES.index(mode), list(grid), sizes)

    return launch


def noise() -> None:
    from kdcmae_fast.kernels.masking import kernel

    kernel.rank_noise(torch.empty(64, 512, device="meta"))


CASES = {
    "masking-unstructured": (plan("unstructured", (8, 64), device_step=True), PLAN),
    "masking-tf": (plan("tf", (8, 64)), PLAN),
    "masking-tube": (plan("tube", (8, 14, 14), 0.9), PLAN),
    "masking-block": (plan("block", (14, 14)), PLAN),
    "masking-noise": (noise, NOISE),
}
