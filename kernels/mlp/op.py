"""The public MLP: argument checks, autocast, and the autograd that keeps less."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import check_dtype, check_ndim, check_shape, register_op, resolve, without_autocast

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

register_op("mlp", impls=("torch",))


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    impl: str = "auto",
) -> Tensor:
    """linear, exact (erf) GELU, linear: the numbers of nn.Linear and nn.GELU, less kept.

    x: (..., D); weight1: (H, D); bias1: (H,) or None; weight2: (E, H); bias2: (E,) or None: as
        nn.Linear has them. All of one dtype (float64, float32, bfloat16, float16), unless autocast
        is on, which casts them all as it does for linear layers.
    impl: "auto" or "torch"; the GEMMs are PyTorch's.

    Returns (..., E). Backward keeps x and the pre-activation (..., H); the GELU's output, as large
    as the latter, is computed again. Differentiable once. Errors are ValueErrors that name the
    argument.
    """
    _check(x, weight1, bias1, weight2, bias2)
    resolve("mlp", impl, x.device.type)
    dtype = _autocast_dtype(x.device)
    cast = [_cast(tensor, dtype) for tensor in (x, weight1, bias1, weight2, bias2)]
    dtypes = [tensor.dtype for tensor in cast if tensor is not None]
    if len(set(dtypes)) > 1:
        raise ValueError(f"the operands must share a dtype or autocast be on, got {dtypes}")
    return _LeanMlp.apply(*cast)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if tensor is None or dtype is None or tensor.dtype == torch.float64:  # as autocast does
        return tensor
    return tensor.to(dtype)


class _LeanMlp(torch.autograd.Function):
    """The reference, with a backward that computes the GELU's output anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
    ) -> Tensor:
        with without_autocast(x.device):
            hidden = F.linear(x, weight1, bias1)
            y = F.linear(F.gelu(hidden), weight2, bias2)
        ctx.save_for_backward(x, hidden, weight1, weight2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight1, weight2 = ctx.saved_tensors
        need_x, need_weight1, need_bias1, need_weight2, need_bias2 = ctx.needs_input_grad
        dx = dweight1 = dbias1 = dweight2 = dbias2 = None
        with without_autocast(grad.device):
            rows = grad.reshape(-1, grad.shape[-1])
            if need_weight2:
                dweight2 = rows.t() @ F.gelu(hidden).reshape(-1, hidden.shape[-1])
            if need_bias2:
                dbias2 = rows.sum(0)
            if need_x or need_weight1 or need_bias1:
                dhidden = torch.ops.aten.gelu_backward(grad @ weight2, hidden)
                rows = dhidden.reshape(-1, hidden.shape[-1])
                if need_weight1:
                    dweight1 = rows.t() @ x.reshape(-1, x.shape[-1])
                if need_bias1:
                    dbias1 = rows.sum(0)
                if need_x:
                    dx = dhidden @ weight1
        return dx, dweight1, dbias1, dweight2, dbias2


def _check(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> None:
    if not isinstance(x, Tensor) or x.dim() == 0:
        got = "()" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (..., D), got {got}")
    check_ndim("weight1", weight1, 2, "(H, D)")
    check_ndim("weight2", weight2, 2, "(E, H)")
    hidden, out = weight1.shape[0], weight2.shape[0]
    check_shape("weight1", weight1, (hidden, x.shape[-1]), "(H, D) with the D of x")
    check_shape("weight2", weight2, (out, hidden), "(E, H) with the H of weight1")
    named = {"x": x, "weight1": weight1, "weight2": weight2}
    for name, bias, width in (("bias1", bias1, hidden), ("bias2", bias2, out)):
        if bias is not None:
            check_shape(name, bias, (width,), "one value per output")
            named[name] = bias
    for name, tensor in named.items():
        check_dtype(name, tensor, FLOATS)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must share it")
