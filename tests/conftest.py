"""Fixtures shared by the whole suite."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _one_seed():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


# Relative Frobenius error that a result of this dtype may have whatever PyTorch's own is.
FROBENIUS = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
}


@pytest.fixture
def within_budget() -> Callable[..., None]:
    """Error rule for float ops: at most `factor` times PyTorch's own error in the same dtype, at
    the worst element (`slack` more) and in the Frobenius norm (FROBENIUS more). The second has
    next to no absolute part: gradients of 1e-6 that are all wrong fail."""

    def check(result: Tensor, same_dtype: Tensor, exact: Tensor, factor=2.0, slack=1e-6) -> None:
        exact = exact.to(torch.float64)
        error, budget = (x.to(torch.float64) - exact for x in (result, same_dtype))
        if exact.numel() == 0:
            return
        worst, allowed = error.abs().max(), factor * budget.abs().max() + slack
        assert worst <= allowed, f"{worst=:.3e} {allowed=:.3e}"
        whole, size = error.norm(), exact.norm() + (1.0 if exact.numel() == 1 else 1e-6)
        allowed = factor * budget.norm() + FROBENIUS[result.dtype] * size
        assert whole <= allowed, f"{whole=:.3e} {allowed=:.3e}"

    return check


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten outputs show up as NaN (ints: a huge value), not as whatever was in memory."""

    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            fill = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
            return tensor.fill_(fill) if tensor.dtype != torch.bool else tensor.fill_(True)

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def _value_and_grads(op: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    out = op(*leaves)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.fixture
def value_and_grads() -> Callable[..., list[Tensor]]:
    """value_and_grads(op, leaves): op's output and every leaf's gradient, one fixed cotangent."""
    return _value_and_grads


@pytest.fixture
def three_way(within_budget) -> Callable[..., None]:
    """three_way(op, plain, leaves): `op` may err at most twice as much as the same maths in eager
    torch and the same dtype (`plain`), its gradients three times; fp64 `plain` is the truth."""

    def check(
        op: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: tuple[Tensor, ...]
    ) -> None:
        results = _value_and_grads(op, leaves)
        eager = _value_and_grads(plain, leaves)
        exact = _value_and_grads(plain, tuple(leaf.double() for leaf in leaves))
        for index, (result, same_dtype, truth) in enumerate(
            zip(results, eager, exact, strict=True)
        ):
            assert result.dtype == same_dtype.dtype and result.shape == truth.shape
            within_budget(result, same_dtype, truth, factor=2.0 if index == 0 else 3.0)

    return check


@pytest.fixture
def saved_storages() -> Callable[[Callable[[], Tensor]], dict[int, int]]:
    """saved_storages(forward): data pointer -> bytes of every tensor autograd keeps."""

    def record(forward: Callable[[], Tensor]) -> dict[int, int]:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert forward().requires_grad
        return storages

    return record
