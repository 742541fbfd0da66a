"""What the compile gate compiles for kernels/alignment; test_compile_gate.py says how."""

import torch


def pairs(dtype: torch.dtype, variant: str, width: int):
    def launch() -> None:
        from kdcmae_fast.kernels.alignment import kernel, reference

        x, y = (torch.empty(n, width, dtype=dtype, device="meta") for n in (1024, 768))
        kernel.loss_and_grads(x, y, variant, *reference.family(None, variant), True, True)

    return launch


def expected(backward: int, aligned: bool = True, **instructions: list[str]) -> dict[str, dict]:
    """Register caps; rows that are not aligned are not read 16 bytes at a time, but written so."""
    copies = {"registers": backward, "contains": ["LDGSTS.E.BYPASS.128"], **instructions}
    return {
        "mmd_rows_kernel": {
            "registers": 64, "contains": ["LDG.E.128", "STG.E.128"] if aligned else ["STG.E.128"],
        },
        "mmd_fwd_kernel": copies,
        "mmd_bwd_kernel": {**copies, "contains": ["LDGSTS.E.BYPASS.128", "STG.E.128"]},
    }  # fmt: skip


TENSOR_CORES = {
    "contains_80": ["HMMA.16816.F32.BF16"],
    "contains_90": ["HGMMA.64"],
    "contains_100": ["UTCHMMA"],
}

CASES = {
    "alignment-xkd-bf16": (pairs(torch.bfloat16, "xkd", 8192), expected(168, **TENSOR_CORES)),
    "alignment-rbf-bf16": (pairs(torch.bfloat16, "kdc_rbf", 768), expected(168, **TENSOR_CORES)),
    "alignment-xkd-fp32": (pairs(torch.float32, "xkd", 768), expected(168)),
    "alignment-tiled-fp32": (pairs(torch.float32, "kdc_tiled", 1023), expected(168, False)),
}
