"""Fixtures shared by the whole suite."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _one_seed():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def within_budget() -> Callable[..., None]:
    """Error rule for float ops: at most `factor` times PyTorch's own error in the same dtype."""

    def check(result: Tensor, same_dtype: Tensor, exact: Tensor, factor=2.0, slack=1e-6) -> None:
        exact = exact.to(torch.float64)
        budget = (same_dtype.to(torch.float64) - exact).abs().max()
        error = (result.to(torch.float64) - exact).abs().max()
        assert error <= factor * budget + slack, f"{error=:.3e} {budget=:.3e}"

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
