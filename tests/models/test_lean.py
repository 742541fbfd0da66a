"""Layers that keep less for backward: PyTorch's numbers, and what they keep."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdcmae_fast.models.blocks import Block
from kdcmae_fast.models.lean import GeluLinear, Linear, Norm, NormedLinear
from kdcmae_fast.models.rows import Filler, take_tokens

X = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plain_block(block: Block, x):
    """The block from PyTorch's own functions."""

    def norm(x, layer):
        return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)

    def linear(x, layer):
        return F.linear(x, layer.weight, layer.bias)

    heads = block.attn.num_heads
    qkv = linear(norm(x, block.norm1), block.attn.qkv)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + linear(mixed, block.attn.proj)
    return x + linear(F.gelu(linear(norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)


def make_block(dim=8, dtype=torch.float64):
    torch.manual_seed(3)
    block = Block(dim, 2, 4.0).to(dtype)
    for parameter in block.parameters():  # norms and biases, too, away from 1 and 0
        nn.init.normal_(parameter, std=0.4)
    return block


def values_and_grads(function, x, parameters, weight):
    x = x.detach().requires_grad_()
    y = function(x)
    return y, *torch.autograd.grad((y * weight).sum(), (x, *parameters))


def test_block_equals_pytorch_s_functions():
    block = make_block()
    parameters, weight = list(block.parameters()), torch.randn_like(X)
    ours = values_and_grads(block, X, parameters, weight)
    plain = values_and_grads(lambda x: plain_block(block, x), X, parameters, weight)
    for result, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_block_in_bf16_autocast_errs_as_pytorch_does():
    block, exact = make_block(64, torch.float32), make_block(64)
    x, weight = torch.randn(4, 33, 64), torch.randn(4, 33, 64)
    results = []
    for function in (block, lambda x: plain_block(block, x)):

        def under_autocast(x, function=function):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x)

        results.append(values_and_grads(under_autocast, x, list(block.parameters()), weight))
    wanted = values_and_grads(exact, x.double(), list(exact.parameters()), weight.double())
    for ours, plain, want in zip(*results, wanted, strict=True):
        assert ours.dtype == plain.dtype
        error, budget = (ours.double() - want).norm(), (plain.double() - want).norm()
        assert error <= 1.5 * budget


def test_block_keeps_ten_widths_per_token(saved_storages):
    block = make_block(64, torch.float32)
    x = torch.randn(4, 33, 64, requires_grad=True)
    kept = saved_storages(lambda: block(x))
    for parameter in block.parameters():
        kept.pop(parameter.data_ptr(), None)
    # x, q, k and v, attention, x + attention, and four widths inside the MLP; plus statistics.
    assert 10 <= sum(kept.values()) / (x.numel() * 4) < 10.5


@pytest.mark.parametrize("layer", [Linear, GeluLinear, NormedLinear])
@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_only_what_is_asked_for_is_differentiated(layer, frozen):
    torch.manual_seed(1)
    module, norm = layer(8, 4).double(), Norm(8).double().requires_grad_(False)
    x = X.clone().requires_grad_(frozen != "x")
    if frozen != "x":
        getattr(module, frozen).requires_grad_(False)
    y = module(norm(x) if layer is NormedLinear else x)
    y.square().sum().backward()
    before = {Linear: lambda x: x, GeluLinear: F.gelu, NormedLinear: lambda x: norm(x).value}
    twin = X.clone().requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in (module.weight, module.bias))
    F.linear(before[layer](twin), weight, bias).square().sum().backward()
    for name, got, want in (("x", x, twin), ("weight", module.weight, weight),
                            ("bias", module.bias, bias)):  # fmt: skip
        if name == frozen:
            assert got.grad is None
        else:
            torch.testing.assert_close(got.grad, want.grad)


def test_rows_of_tokens_differentiate():
    ids = torch.tensor([[3, 0], [1, 4], [2, 1]])
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: take_tokens(x, ids), x)
    torch.testing.assert_close(take_tokens(x, ids)[1, 1], x[1, 4])
    tokens = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def there_and_back(tokens, x):
        filler = Filler(tokens, ids)
        return filler.spread(filler.pack(x))

    assert torch.autograd.gradcheck(there_and_back, (tokens, x))
    spread = there_and_back(tokens, x)
    for row in range(3):
        for token in range(5):
            source = x[row] if token in ids[row] else tokens
            torch.testing.assert_close(spread[row, token], source[token])
