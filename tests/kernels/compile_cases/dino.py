"""What the compile gate compiles for the DINO loss; test_compile_gate.py says how."""

import torch

FLOAT = {
    "dino_statistics_kernel": {"registers": 64, "contains": ["LDG.E.128"]},
    "dino_fwd_kernel": {"registers": 96, "contains": ["LDG.E.128"]},
    "dino_bwd_kernel": {"registers": 96, "contains": ["LDG.E.128", "STG.E.128"]},
}
DOUBLE = {name: {**expected, "registers": 160} for name, expected in FLOAT.items()}
SCALAR = {name: {"registers": 64} for name in FLOAT}


def loss(
    teachers: int, students: int, width: int, dtype: torch.dtype, exclude_matched: bool, batch=32
):
    def launch() -> None:
        from kdcmae_fast.kernels.distillation import kernel_dino

        def logits(crops: int) -> torch.Tensor:
            return torch.empty(crops, batch, width, dtype=dtype, device="meta")

        teacher, student = logits(teachers), logits(students)
        center = torch.empty(width, device="meta")
        options = (0.07, 0.1, exclude_matched)
        _, statistics = kernel_dino.dino_rows(teacher, student, center, *options)
        grad = torch.empty(batch, device="meta")
        kernel_dino.dino_rows_grad(grad, teacher, student, center, statistics, *options)

    return launch


CASES = {
    "dino-xkd": (loss(1, 2, 8192, torch.float32, False), FLOAT),
    "dino-multi-crop": (loss(2, 10, 65536, torch.bfloat16, True), FLOAT),
    "dino-one-sample": (loss(2, 3, 8192, torch.float32, True, batch=1), FLOAT),
    "dino-one-logit": (loss(2, 3, 1, torch.float32, True, batch=1), SCALAR),
    "dino-float64": (loss(2, 3, 512, torch.float64, True), DOUBLE),
    "dino-narrow-half": (loss(2, 2, 768, torch.float16, True), FLOAT),
}
