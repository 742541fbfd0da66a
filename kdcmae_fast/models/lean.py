"""Linear layers that keep what their operand was made from, not the operand.

nn.Linear keeps its operand for the gradient of its weight. Behind LayerNorm and GELU that is a
second copy of something kept anyway: here backward makes it again, one cheap pass over memory.
Under autocast the weight, too, is cast again instead of being kept in both dtypes. Parameters and
results are nn.Linear's.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdcmae_fast.kernels import add_layer_norm

Segments = tuple[tuple[int, int], ...]  # (norm, rows) runs of `add_layer_norm`


class Normed(NamedTuple):
    """LayerNorm of a stream, and what it was made from.

    value, stream: (..., D), the result and what went in. parameters: (2, S, D), weights and biases
    of S norms, a copy. segments: which rows have which norm.
    """

    value: Tensor
    stream: Tensor
    parameters: Tensor
    segments: Segments
    eps: float


def normalize(
    x: Tensor, residual: Tensor | None, parameters: Tensor, segments: Segments, eps: float
) -> Normed:
    """LayerNorm of x + residual, in the dtype that the layers behind it multiply in."""
    value, stream = add_layer_norm(
        x,
        residual,
        parameters[0],
        parameters[1],
        segments=segments,
        eps=eps,
        out_dtype=operand_dtype(x, parameters),
    )
    return Normed(value, stream, parameters.detach(), segments, eps)


def operand_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which dtype a linear layer of this weight multiplies: autocast's where it is on."""
    device = x.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


class Norm(nn.LayerNorm):
    """LayerNorm of a stream after the addition of a branch to it."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Normed:
        """(..., D) each -> LayerNorm(x + residual)."""
        rows = x.numel() // x.shape[-1]
        return normalize(x, residual, _stack(self), ((0, rows),), self.eps)


class NormParameters(nn.LayerNorm):
    """A LayerNorm that hands out its weight and bias, for a pass that several of them share.

    Called as a module, so that an engine that keeps parameters in shards has them whole.
    """

    def forward(self) -> Tensor:  # type: ignore[override]
        """(2, 1, D)."""
        return _stack(self)


def _stack(norm: nn.LayerNorm) -> Tensor:
    return torch.stack([norm.weight, norm.bias])[:, None]


class Linear(nn.Linear):
    """nn.Linear of a tensor, which is kept; the weight is kept in its own dtype only."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        return _Linear.apply(x.to(operand_dtype(x, self.weight)), self.weight, self.bias)


class NormedLinear(nn.Linear):
    """nn.Linear of LayerNorm's output; keeps LayerNorm's input."""

    def forward(self, normed: Normed) -> Tensor:  # type: ignore[override]
        """(..., D) -> (..., D')."""
        return _NormedLinear.apply(
            normed.value,
            normed.stream,
            normed.parameters,
            self.weight,
            self.bias,
            normed.segments,
            normed.eps,
        )


class GeluLinear(nn.Linear):
    """nn.Linear of GELU(x), the exact (erf) one; keeps x."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        x = x.to(operand_dtype(x, self.weight))
        return _GeluLinear.apply(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _gradients(grad, x, weight, ctx.needs_input_grad)


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        stream: Tensor,
        parameters: Tensor,
        weight: Tensor,
        bias: Tensor,
        segments: Segments,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(stream, parameters, weight)
        ctx.options = {"segments": segments, "eps": eps, "out_dtype": value.dtype}
        return _product(value, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stream, parameters, weight = ctx.saved_tensors
        value = add_layer_norm(stream, None, *parameters, **ctx.options).normed
        needed = ctx.needs_input_grad
        dx, *rest = _gradients(grad, value, weight, (needed[0], *needed[3:5]))
        return dx, None, None, *rest, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, *rest = _gradients(grad, F.gelu(x), weight, ctx.needs_input_grad)
        return None if dx is None else torch.ops.aten.gelu_backward(dx, x), *rest


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias in x weight^T + bias."""
    dx = grad @ weight.to(grad.dtype) if needed[0] else None
    rows = grad.reshape(-1, grad.shape[-1])
    dweight = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if needed[1] else None
    dbias = rows.sum(dim=0, dtype=weight.dtype) if needed[2] else None
    return dx, dweight, dbias
