"""The C++ attention for bfloat16, on each of this CPU's units for its products."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast.kernels import attention
from kdcmae_fast.kernels.attention import backends, fused

PROBLEM = backends.problem("cpp", "cpu")
UNITS = ("avx512_bf16", "amx")
HERE = UNITS[: UNITS.index(fused.units()) + 1] if PROBLEM is None else ()
SIZES = [  # L, S, d
    (1, 1, 8), (3, 2, 1), (7, 3, 17), (2, 400, 24), (49, 49, 64), (33, 65, 80), (177, 128, 32),
    (130, 257, 32),
]  # fmt: skip

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


@pytest.fixture(params=UNITS)
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """impl="cpp" runs on these units, where this CPU has them."""
    if request.param not in HERE:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(fused, "units", lambda: request.param)
    return request.param


def inputs(length=5, keys=7, width=8, batch=2, heads=3) -> list[Tensor]:
    shape, other = (batch, heads, length, width), (batch, heads, keys, width)
    return [torch.randn(s).bfloat16().requires_grad_() for s in (shape, other, other)]


def cpp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, impl="cpp")


@pytest.mark.parametrize("length, keys, width", SIZES)
def test_stays_within_sdpa_s_own_error(units, length, keys, width, within_budget):
    q, k, v = inputs(length, keys, width)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    results = [
        cpp(q, k, v),
        F.scaled_dot_product_attention(q, k, v),
        F.scaled_dot_product_attention(*wide),
    ]
    within_budget(*results)
    upstream = torch.randn_like(q)
    grads = [
        torch.autograd.grad(result, given, upstream.to(result.dtype))
        for result, given in zip(results, ((q, k, v), (q, k, v), wide), strict=True)
    ]
    for each in zip(*grads, strict=True):
        within_budget(*each, factor=3.0)


def test_lse_is_the_logarithm_of_each_query_s_sum(units):
    q, k, v = (x.detach() for x in inputs(37, 53, 32))
    _, lse = torch.ops.kdcmae_fast.attention_cpp(q, k, v, units == "amx")
    scores = q.double() @ k.double().mT / 32**0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_strides(units):
    qkv = torch.randn(2, 40, 3, 4, 24).bfloat16()  # (B, L, 3, H, d)
    fused_heads = qkv.permute(2, 0, 3, 1, 4).unbind()
    sliced = [x[..., 3:11] for x in fused_heads]  # not at multiples of 4 bytes
    shared = [x[:1].expand(2, -1, -1, -1) for x in fused_heads]
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in fused_heads]
    for given in (fused_heads, sliced, shared, columns):
        apart = [x.detach().clone(memory_format=torch.contiguous_format) for x in given]
        given = [x.detach().requires_grad_() for x in given]
        apart = [x.requires_grad_() for x in apart]
        out, want = cpp(*given), cpp(*apart)
        assert torch.equal(out, want)
        upstream = torch.randn(*out.shape[:2], out.shape[3], out.shape[2]).bfloat16().mT
        for a, b in zip(
            torch.autograd.grad(out, given, upstream),
            torch.autograd.grad(want, apart, upstream.contiguous()),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_same_bits_on_any_number_of_threads(units):
    q, k, v = inputs(70, 90, 32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = cpp(q, k, v)
            results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_each_input_may_be_the_only_one_with_a_gradient(units):
    q, k, v = inputs()
    full = torch.autograd.grad(cpp(q, k, v).sum(), (q, k, v))
    for keep in range(3):
        given = [x.detach().requires_grad_(i == keep) for i, x in enumerate((q, k, v))]
        cpp(*given).sum().backward()
        assert torch.equal(given[keep].grad, full[keep])


def test_large_scores_do_not_overflow(units):
    q, k, v = inputs(40, 40, 32)
    out = cpp(1e4 * q, 1e4 * k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_keys_far_below_zero_leave_no_trace_of_the_padding(units):
    q, k, v = (x.detach() for x in inputs(33, 33, 16))
    q, k = q.abs(), -1e4 * k.abs() - 1e4  # exp(-lse) would be infinite for a score of 0
    given = [x.requires_grad_() for x in (q, k, v)]
    out = cpp(*given)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), given):
        assert grad.isfinite().all()


@pytest.mark.parametrize("which", range(3))
def test_nan_stays_in_its_head_and_query(units, which):
    given = inputs(40, 50, 32)
    with torch.no_grad():
        clean = cpp(*given)
        given[which][1, 2, 4, 5] = float("nan")
        out = cpp(*given)
    hit = torch.zeros(2, 3, 40, dtype=torch.bool)
    hit[1, 2, 4 if which == 0 else slice(None)] = True
    assert torch.equal(out[~hit], clean[~hit])
    assert out[hit].isnan().any(-1).all()


@pytest.mark.parametrize("sizes", [(5, 5, 8, 0, 3), (0, 5, 8, 2, 3)])
def test_empty_inputs(units, sizes):
    given = inputs(*sizes)
    out = cpp(*given)
    out.sum().backward()
    assert out.shape == given[0].shape
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in given)


def test_packed_documents(units):
    q, k, v = (torch.randn(14, 3, 8).bfloat16() for _ in "qkv")
    bounds = (0, 3, 6, 6, 14)
    out = attention(q, k, v, cu_seqlens=bounds, impl="cpp")
    want = attention(q, k, v, cu_seqlens=bounds, impl="torch")
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_opcheck():
    tiles = HERE[-1] == "amx"
    contiguous = [x.detach() for x in inputs(keys=7)]
    fused_heads = torch.randn(2, 5, 3, 4, 8).bfloat16().permute(2, 0, 3, 1, 4).unbind()
    for given in (contiguous, fused_heads):
        torch.library.opcheck(torch.ops.kdcmae_fast.attention_cpp, (*given, tiles))
        out, lse = torch.ops.kdcmae_fast.attention_cpp(*given, tiles)
        torch.library.opcheck(
            torch.ops.kdcmae_fast.attention_backward_cpp,
            (torch.randn_like(out), *given, out, lse, tiles),
        )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_breaks():
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        given = inputs(batch=batch)
        out, again = attention(*given), compiled(*given)
        assert torch.equal(out, again)
        for a, b in zip(
            torch.autograd.grad(out.sum(), given),
            torch.autograd.grad(again.sum(), given),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_what_is_kept_for_backward(units, saved_storages):
    q, k, v = inputs(64, 64, 32)
    kept = saved_storages(lambda: cpp(q, k, v))
    assert sum(kept.values()) <= 4 * q.numel() * 2 + q.numel() // 32 * 4


def test_errors_of_the_operators():
    run = torch.ops.kdcmae_fast.attention_cpp
    back = torch.ops.kdcmae_fast.attention_backward_cpp
    q, k, v = (x.detach() for x in inputs())
    out, lse = run(q, k, v, False)
    for arguments, message in (
        ((q.float(), k, v), "q must be bfloat16"),
        ((q, k[:1], v), "k must be bfloat16"),
        ((q, k, v[..., :4]), "v must be bfloat16"),
        ((q[0], k, v), r"must be \(B, H, L, d\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments, False)
    for arguments, message in (
        ((out[:, :1], q, k, v, out, lse), "grad must be"),
        ((out, q, k, v, out.float(), lse), "out must be bfloat16"),
        ((out, q, k, v, out, lse[:1]), "lse must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            back(*arguments, False)


def test_float32_is_refused():
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="impl='cpp' takes bfloat16, got q in torch.float32"):
        cpp(x, x, x)
