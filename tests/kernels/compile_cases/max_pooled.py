"""What the compile gate compiles for the max-pooled InfoNCE; test_compile_gate.py says how."""

import torch


def all_passes(dtype: torch.dtype, cells: int, normalize: bool):
    def launch() -> None:
        from kdcmae_fast.kernels.contrastive import kernel_max_pooled as kernel

        maps = torch.empty(64, cells, 512, dtype=dtype, device="meta")
        vectors = torch.empty(256, 512, dtype=dtype, device="meta")
        inverse = torch.empty(64, cells, device="meta")
        scale, unit = torch.empty((), device="meta"), torch.empty((), device="meta")
        rows = (maps, inverse, vectors, scale)
        logits, index = kernel.scores(*rows)
        grad = torch.empty(64, 256, device="meta")
        kernel.gradient_by_maps(*rows, unit, grad, logits, index, normalize, dtype)
        kernel.gradient_by_vectors(*rows, unit, grad, index)

    return launch


def expected(registers: tuple[int, int, int], dot_80: str | None) -> dict[str, dict]:
    """Register caps of the three kernels, beside wide copies and (dot_80) tensor cores."""
    names = ("max_pooled_fwd_kernel", "max_pooled_maps_bwd_kernel", "max_pooled_vectors_bwd_kernel")
    rows = {}
    for name, cap in zip(names, registers, strict=True):
        stores = [] if name == "max_pooled_fwd_kernel" else ["STG.E.128"]
        rows[name] = {"registers": cap, "contains": ["LDGSTS.E.BYPASS.128", *stores]}
        if dot_80:
            rows[name] |= {
                "contains_80": [dot_80], "contains_90": ["HGMMA.64"], "contains_100": ["UTCHMMA"],
            }  # fmt: skip
    return rows


CASES = {
    "max-pooled-bf16-7x7": (
        all_passes(torch.bfloat16, 49, True), expected((144, 255, 255), "HMMA.16816.F32.BF16"),
    ),
    "max-pooled-fp16-14x14": (
        all_passes(torch.float16, 196, False), expected((216, 168, 255), "HMMA.16816.F32"),
    ),
    # Plain multiply-adds: float32 operands are not rounded to TF32.
    "max-pooled-fp32-7x7": (all_passes(torch.float32, 49, True), expected((184, 80, 96), None)),
}  # fmt: skip
