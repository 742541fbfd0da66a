"""What the compile gate compiles for kernels/ema; test_compile_gate.py says how."""

import torch

WIDE = {"registers": 64, "contains": ["LDG.E.128", "STG.E.128"]}


def update(student: torch.dtype, shadow: torch.dtype | None, with_tensor: bool, address: int):
    def launch() -> None:
        from kdcmae_fast.kernels.ema import kernel

        # Meta tensors have no address, and the alignment of addresses is part of the launch.
        entry = kernel.Entry((address,) * 3, 2 * kernel.CHUNK, student, shadow)
        momentum = torch.empty((), dtype=torch.float64, device="meta") if with_tensor else None
        kernel.launch((entry,), torch.device("meta"), 0.996, momentum)

    return launch


CASES = {
    "ema-fp32": (update(torch.float32, None, False, 512), {"ema_update_kernel": WIDE}),
    "ema-bf16-shadow": (
        update(torch.bfloat16, torch.bfloat16, True, 512), {"ema_update_kernel": WIDE},
    ),
    "ema-fp16-unaligned": (
        update(torch.float16, None, True, 514), {"ema_update_kernel": {"registers": 64}},
    ),
}  # fmt: skip
