"""What the compile gate compiles for kernels/contrastive; test_compile_gate.py says how."""

import torch


def logits(dtype: torch.dtype, symmetric: bool):
    def launch() -> None:
        from kdcmae_fast.kernels.contrastive import kernel

        b, a = (torch.empty(n, 768, dtype=dtype, device="meta") for n in (1024, 4096))
        scale, rows = torch.empty((), device="meta"), torch.empty(1024, device="meta")
        columns = torch.empty(4096 if symmetric else 0, device="meta")
        kernel.statistics(b, a, scale, 0, symmetric, True)
        kernel.gradients(b, a, scale, 0, rows, rows, rows, columns, columns)

    return launch


def expected(forward: int, backward: int) -> dict[str, dict]:
    """Register caps of 16-bit operands, beside asynchronous copies and tensor cores."""
    tensor_cores = {
        "contains": ["LDGSTS.E.BYPASS.128"],
        "contains_90": ["HGMMA.64"],
        "contains_100": ["UTCHMMA"],
    }
    return {
        "info_nce_fwd_kernel": {"registers": forward, **tensor_cores},
        "info_nce_bwd_kernel": {
            "registers": backward, **tensor_cores, "contains": ["LDGSTS.E.BYPASS.128", "STG.E.128"],
        },
    }  # fmt: skip


def on_80(rows: dict[str, dict], instruction: str) -> dict[str, dict]:
    return {name: {**row, "contains_80": [instruction]} for name, row in rows.items()}


FLOAT32 = {  # plain multiply-adds: float32 operands are not rounded to TF32
    "info_nce_fwd_kernel": {"registers": 168, "contains": ["LDGSTS.E.BYPASS.128"]},
    "info_nce_bwd_kernel": {"registers": 168, "contains": ["LDGSTS.E.BYPASS.128", "STG.E.128"]},
}


def normalise() -> None:
    from kdcmae_fast.kernels.contrastive import kernel

    kernel.normalise(torch.empty(1024, 768, device="meta"), torch.bfloat16)


CASES = {
    "contrastive-normalise": (
        normalise, {"normalise_rows_kernel": {"registers": 48, "contains": ["LDG.E.128"]}},
    ),
    "contrastive-bf16": (
        logits(torch.bfloat16, True), on_80(expected(255, 255), "HMMA.16816.F32.BF16"),
    ),
    "contrastive-fp16-one-sided": (
        logits(torch.float16, False), on_80(expected(192, 224), "HMMA.16816.F32"),
    ),
    "contrastive-fp32": (logits(torch.float32, True), FLOAT32),
}  # fmt: skip
