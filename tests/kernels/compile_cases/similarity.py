"""What the compile gate compiles for kernels/similarity; test_compile_gate.py says how."""

import torch

COPIES = {"contains": ["LDGSTS.E.BYPASS.128"]}
TENSOR_CORES = {**COPIES, "contains_90": ["HGMMA.64"], "contains_100": ["UTCHMMA"]}


def operands(frames: int, dtype: torch.dtype, kind: torch.dtype):
    a, b = (torch.empty(n, frames, 768, dtype=dtype, device="meta") for n in (1024, 2048))
    return a, b, *(torch.empty(x.shape[:2], dtype=kind, device="meta") for x in (a, b))


def scores(strategy: str, frames: int, dtype: torch.dtype):
    def launch() -> None:
        from kdcmae_fast.kernels.similarity import kernel

        kernel.scores(*operands(frames, dtype, torch.float32), strategy)

    return launch


def scores_grad(strategy: str, dtype: torch.dtype):
    def launch() -> None:
        from kdcmae_fast.kernels.similarity import kernel

        grad = torch.empty(1024, 2048, device="meta")
        index = torch.empty(1024, 2048, dtype=torch.int32, device="meta")
        sides = operands(16, dtype, torch.float32)
        kernel.scores_grad(grad, index, *sides, strategy, True, False)
        kernel.scores_grad(grad, index, *sides, strategy, True, True)

    return launch


def counts(strategy: str, frames: int, dtype: torch.dtype):
    def launch() -> None:
        from kdcmae_fast.kernels.similarity import kernel

        a, _, a_inverse, _ = operands(frames, dtype, torch.float64)
        kernel.pair_counts(a, a, a_inverse, a_inverse, strategy, 1e-10, False, 0)

    return launch


def forward(registers: int, **contains: list[str]) -> dict[str, dict]:
    return {"frame_similarity_fwd_kernel": {"registers": registers, **contains}}


def counting(registers: int) -> dict[str, dict]:
    return {"retrieval_counts_kernel": {"registers": registers, **COPIES}}


BACKWARD = {"frame_similarity_bwd_kernel": {"registers": 72, "contains": ["LDG.E.128"]}}

CASES = {
    "similarity-mean-bf16": (
        scores("diagonal_mean", 16, torch.bfloat16), forward(208, **TENSOR_CORES),
    ),
    "similarity-diagonal-max-fp16": (
        scores("diagonal_max", 16, torch.float16), forward(255, **TENSOR_CORES),
    ),
    "similarity-max-bf16": (scores("max", 16, torch.bfloat16), forward(128, **TENSOR_CORES)),
    "similarity-max-10-frames": (scores("max", 10, torch.float32), forward(168, **COPIES)),
    "similarity-mean-fp32": (scores("diagonal_mean", 16, torch.float32), forward(224, **COPIES)),
    "similarity-grad-max": (scores_grad("max", torch.float32), BACKWARD),
    "similarity-grad-diagonal-max": (scores_grad("diagonal_max", torch.bfloat16), BACKWARD),
    "similarity-counts-mean": (counts("diagonal_mean", 16, torch.float32), counting(192)),
    "similarity-counts-diagonal-max": (counts("diagonal_max", 16, torch.bfloat16), counting(192)),
    "similarity-counts-max": (counts("max", 16, torch.float32), counting(168)),
}  # fmt: skip
