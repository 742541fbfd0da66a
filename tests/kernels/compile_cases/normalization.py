"""What the compile gate compiles for kernels/normalization; test_compile_gate.py says how."""

import torch


def norm(width: int, x: torch.dtype, residual: torch.dtype | None, norms: tuple[int, ...] = (0,)):
    """Forward and backward of 64 rows per norm."""

    def launch() -> None:
        from kdcmae_fast.kernels.normalization import kernel

        shape, runs = (64 * len(norms), width), (norms, (64,) * len(norms))
        weight = torch.empty(len(norms), width, device="meta")
        branch = torch.empty(shape, dtype=x, device="meta")
        if residual is None:
            normed, mean, rstd = kernel.layer_norm(branch, weight, weight, *runs, 1e-5, x)
            kernel.layer_norm_backward(normed, None, branch, mean, rstd, weight, *runs)
            return
        stream = torch.empty(shape, dtype=residual, device="meta")
        normed, summed, mean, rstd = kernel.add_layer_norm(
            branch, stream, weight, weight, *runs, 1e-5, x
        )
        args = normed, summed, summed, mean, rstd, weight, *runs
        if x == residual:
            kernel.layer_norm_backward(*args)
        else:
            kernel.layer_norm_backward_cast(*args, x)

    return launch


def expected(forward: int, backward: int) -> dict:
    wide = ["LDG.E.128", "STG.E.128"]
    return {
        "add_layer_norm_fwd_kernel": {"registers": forward, "contains": wide},
        "layer_norm_bwd_kernel": {"registers": backward, "contains": wide},
        "parameter_grad_kernel": {"registers": 64, "contains": ["LDG.E.128"]},
    }


F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "layer-norm": (norm(768, BF16, None), expected(72, 168)),
    "add-layer-norm": (norm(768, BF16, BF16), expected(72, 168)),
    "add-layer-norm-streams": (norm(768, BF16, F32, (0, 1, 2)), expected(72, 168)),
    "add-layer-norm-512": (norm(512, F32, F32), expected(72, 104)),
    "add-layer-norm-8192": (norm(8192, BF16, F32), expected(72, 168)),
}
