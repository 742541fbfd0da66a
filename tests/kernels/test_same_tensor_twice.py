"""One tensor as two arguments of an op: the same as its copy, compiled too."""

import pytest
import torch

from kdcmae_fast import kernels

pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")


def assembled(tokens, plan):
    """Two segments under one plan."""
    return kernels.assemble_decoder_input(tokens, [plan] * 2, torch.ones(3), torch.zeros(12, 3))


CASES = {
    "info_nce": (kernels.info_nce, (5, 8)),
    "distillation_loss": (kernels.distillation_loss, (5, 8)),
    "mmd_loss": (kernels.mmd_loss, (5, 8)),
    "frame_similarity": (kernels.frame_similarity, (5, 3, 8)),
    "add_layer_norm": (
        lambda x, y: kernels.add_layer_norm(x, y, x[0, 0], y[0, 0]).normed,
        (2, 3, 8),
    ),
}


@pytest.mark.parametrize("op", CASES)
def test_values_and_gradients_are_those_of_a_copy(op):
    function, shape = CASES[op]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    a, b = (x.detach().clone().requires_grad_() for _ in range(2))
    of_copies = function(a, b)
    weights = torch.linspace(-1, 1, of_copies.numel()).view_as(of_copies)
    wanted = sum(torch.autograd.grad(of_copies, (a, b), weights))
    torch._dynamo.reset()
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        result = call(x, x)
        torch.testing.assert_close(result, of_copies)
        torch.testing.assert_close(torch.autograd.grad(result, x, weights)[0], wanted)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_one_plan_for_two_segments(impl, grad, monkeypatch):
    """Also without gradients, where torch.compile traces the forward pass in another way."""
    monkeypatch.setenv("KDCMAE_IMPL", impl)
    plan = kernels.complementary_masks(torch.arange(2), (2, 3), 0.6)
    tokens = torch.linspace(-1, 1, 48).view(4, 4, 3).requires_grad_(grad)
    torch._dynamo.reset()
    compiled = torch.compile(assembled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, plan), assembled(tokens, plan))
