"""Attention: every back-end against the definition, packed against dense, choice and errors."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast.kernels import attention, backends
from kdcmae_fast.kernels.attention import backends as choice
from kdcmae_fast.kernels.attention import blocked
from kdcmae_fast.kernels.attention import op as attention_op

HERE = ("auto", "sdpa", "blocked", "torch")
BOUNDS = (0, 3, 6, 6, 10, 13, 14)  # lengths 3 3 0 4 3 1
AS_TENSOR = torch.tensor(BOUNDS, dtype=torch.int32)


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query at a time, from the formula."""
    result = torch.empty_like(q)
    for index in range(q.shape[2]):
        scores = (k * q[:, :, index : index + 1]).sum(-1) / math.sqrt(q.shape[-1])
        weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
        result[:, :, index] = (weight[..., None] * v).sum(2)
    return result


def dense(batch=2, heads=3, length=5, width=8, keys=None, dtype=torch.float64):
    shape, other = (batch, heads, length, width), (batch, heads, keys or length, width)
    return [
        torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_()
        for size in (shape, other, other)
    ]


def packed(total=14, heads=3, width=8, dtype=torch.float64):
    return [
        torch.randn(total, heads, width, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(3)
    ]


def by_document(q: Tensor, k: Tensor, v: Tensor, bounds=BOUNDS) -> Tensor:
    pieces = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        rows = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        if stop > start:
            pieces.append(definition(*rows)[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("length, keys", [(1, 1), (5, 5), (7, 3), (49, 49), (2, 400)])
def test_matches_the_definition(impl, length, keys):
    q, k, v = dense(length=length, keys=keys)
    with torch.no_grad():
        want = definition(q, k, v)
    torch.testing.assert_close(attention(q, k, v, impl=impl), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", HERE)
def test_gradcheck(impl):
    q, k, v = dense(1, 2, 4, 3)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, impl=impl), (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, cu_seqlens=(0, 1, 4, 7), impl=impl), tuple(packed(7, 1, 3))
    )


@pytest.mark.parametrize("impl", ["auto", "blocked", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length, width", [(49, 64), (177, 32)])
def test_stays_within_sdpa_s_own_error(impl, dtype, length, width, within_budget):
    q, k, v = dense(2, 2, length, width, dtype=dtype)
    out, same = attention(q, k, v, impl=impl), F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == dtype
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide)
    within_budget(out, same, exact)
    upstream = torch.randn_like(exact)
    grads, same_grads, exact_grads = (
        torch.autograd.grad(value, inputs, upstream.to(value.dtype))
        for value, inputs in ((out, (q, k, v)), (same, (q, k, v)), (exact, wide))
    )
    for grad, other, want in zip(grads, same_grads, exact_grads, strict=True):
        within_budget(grad, other, want, factor=3.0)


@pytest.mark.parametrize("impl", HERE)
def test_large_scores_do_not_overflow(impl):
    q, k, v = dense(dtype=torch.float32)
    out = attention(1e4 * q, 1e4 * k, v, impl=impl)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("kind", ["tuple", "int32", "int64"])
def test_packed_equals_document_by_document(impl, kind):
    q, k, v = packed()
    with torch.no_grad():
        want = by_document(q, k, v)
    bounds = BOUNDS if kind == "tuple" else AS_TENSOR.to(getattr(torch, kind))
    out = attention(q, k, v, cu_seqlens=bounds, impl=impl)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    same = attention(q, k, v, cu_seqlens=bounds, max_seqlen=4, impl=impl)
    assert torch.equal(out, same)


def test_packed_documents_do_not_see_each_other():
    q, k, v = packed()
    out = attention(q, k, v, cu_seqlens=BOUNDS)
    (grad,) = torch.autograd.grad(out[3:6].sum(), v)
    assert grad[3:6].abs().sum() > 0
    assert not grad[:3].any() and not grad[6:].any()


def test_neighbours_of_equal_length_run_as_one_batch():
    assert attention_op._runs([3, 3, 0, 4, 3, 1]) == [(0, 2, 3), (6, 1, 4), (10, 1, 3), (13, 1, 1)]
    assert attention_op._runs([2, 0, 2]) == [(0, 2, 2)]
    assert attention_op._runs([0]) == []


@pytest.mark.parametrize("impl", HERE)
def test_empty_inputs(impl):
    q, k, v = dense(batch=0)
    attention(q, k, v, impl=impl).sum().backward()
    assert q.grad.shape == q.shape
    q, k, v = packed(total=0)
    out = attention(q, k, v, cu_seqlens=(0, 0), impl=impl)
    assert out.shape == q.shape and out.requires_grad
    assert attention(q, k, v, cu_seqlens=(0,), impl=impl).shape == q.shape


@pytest.mark.parametrize("impl", HERE)
def test_strides_of_a_fused_qkv_projection(impl):
    qkv = torch.randn(2, 5, 3, 4, 8)  # (B, L, 3, H, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    want = attention(q.contiguous(), k.contiguous(), v.contiguous(), impl=impl)
    torch.testing.assert_close(attention(q, k, v, impl=impl), want)
    rows = qkv.flatten(0, 1)
    out = attention(rows[:, 0], rows[:, 1], rows[:, 2], cu_seqlens=(0, 5, 10), impl=impl)
    torch.testing.assert_close(out.view(2, 5, 4, 8).transpose(1, 2), want)


@pytest.mark.parametrize("impl", HERE)
def test_partial_gradients_determinism_and_autocast(impl):
    q, k, v = dense(dtype=torch.float32)
    full = torch.autograd.grad(attention(q, k, v, impl=impl).sum(), (q, k, v))
    for keep in range(3):
        inputs = [x.detach().requires_grad_(i == keep) for i, x in enumerate((q, k, v))]
        attention(*inputs, impl=impl).sum().backward()
        torch.testing.assert_close(inputs[keep].grad, full[keep])
    out = attention(q, k, v, impl=impl)
    assert torch.equal(out, attention(q, k, v, impl=impl))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out, attention(q, k, v, impl=impl))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("impl", HERE)
def test_compiles_without_breaks(impl):
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, impl=impl),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for batch in (2, 3):
        inputs = dense(batch, dtype=torch.float32)
        out, again = attention(*inputs, impl=impl), compiled(*inputs)
        torch.testing.assert_close(again, out)
        for x, y in zip(
            torch.autograd.grad(again.sum(), inputs),
            torch.autograd.grad(out.sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


def test_packed_compiles_with_host_bounds():
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    rows = packed(dtype=torch.float32)
    torch.testing.assert_close(
        compiled(*rows, cu_seqlens=BOUNDS), attention(*rows, cu_seqlens=BOUNDS)
    )


def test_opcheck():
    torch.library.opcheck(torch.ops.kdcmae_fast.attention, tuple(dense(dtype=torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_blocked_passes(dtype):
    contiguous = [x.detach() for x in dense(keys=7, dtype=dtype)]
    fused = torch.randn(2, 5, 3, 4, 8).to(dtype).permute(2, 0, 3, 1, 4).unbind()
    for inputs in (contiguous, fused):
        torch.library.opcheck(torch.ops.kdcmae_fast.attention_blocked, tuple(inputs))
        out, lse = torch.ops.kdcmae_fast.attention_blocked(*inputs)
        torch.library.opcheck(
            torch.ops.kdcmae_fast.attention_blocked_backward,
            (torch.randn_like(out), *inputs, out, lse),
        )


def test_blocks_of_every_size_agree(monkeypatch):
    q, k, v = dense(2, 3, 5, 8, keys=7)
    upstream = torch.randn_like(q)
    want = torch.autograd.grad(attention(q, k, v, impl="torch"), (q, k, v), upstream)
    for most in (1, 35, 2 * 35, 100 * 35):  # 1, 1, 2 and all 3 heads at a time
        monkeypatch.setattr(blocked, "MAX_SCORES", most)
        grads = torch.autograd.grad(attention(q, k, v, impl="blocked"), (q, k, v), upstream)
        for grad, other in zip(grads, want, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl, most", [("sdpa", 5), ("blocked", 5), ("torch", 90)])
def test_what_is_kept_for_backward(impl, most, saved_storages):
    q, k, v = dense(2, 3, 64, 8, dtype=torch.float32)
    kept = saved_storages(lambda: attention(q, k, v, impl=impl))
    assert sum(kept.values()) <= most * q.numel() * 4


def test_auto_follows_the_measured_rule(monkeypatch):
    assert choice.automatic("cpu", torch.float32) == "sdpa"
    assert choice.automatic("cpu", torch.float16) == "blocked"
    monkeypatch.setattr(choice, "problem", lambda impl, device: None)
    assert choice.automatic("cpu", torch.bfloat16) == "cpp"
    monkeypatch.setattr(choice, "problem", lambda impl, device: "no such products")
    assert choice.automatic("cpu", torch.bfloat16) == "blocked"
    monkeypatch.undo()
    assert choice.automatic("cuda", torch.bfloat16) == "sdpa"
    assert backends("cpu")["attention"].impl == "sdpa"
    assert "flash-attn is not installed" in choice.report("cuda").reason
    monkeypatch.setenv("KDCMAE_IMPL", "torch")
    assert choice.requested("auto", "cpu") == "torch"
    assert backends("cpu")["attention"] == ("torch", "KDCMAE_IMPL=torch")
    assert choice.requested("sdpa", "cpu") == "sdpa"


def fake_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attn and xformers with their documented layouts, (B, L, H, d), computed plainly."""

    def batched(q, k, v, attn_bias=None):
        if attn_bias is not None:
            rows = [x[0] for x in (q, k, v)]
            ends = [0]
            for length in attn_bias:
                ends.append(ends[-1] + length)
            return by_document(*rows, bounds=ends)[None]
        return definition(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k):
        assert cu_q is cu_k and cu_q.dtype == torch.int32 and max_q == max_k == 4
        return by_document(q, k, v, bounds=cu_q.tolist())

    class BlockDiagonalMask:
        from_seqlens = staticmethod(list)

    modules = {
        "flash_attn": {"flash_attn_func": batched, "flash_attn_varlen_func": varlen},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": batched},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
        "torch.nn.attention.varlen": {"varlen_attn": varlen},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("impl", ["flash_attn", "xformers"])
def test_optional_packages_get_their_layouts(impl, monkeypatch):
    fake_packages(monkeypatch)
    monkeypatch.setattr(attention_op, "requested", lambda impl, device: impl)
    monkeypatch.setitem(attention_op.DTYPES, impl, (torch.float64,))
    with torch.no_grad():
        q, k, v = dense()
        torch.testing.assert_close(attention(q, k, v, impl=impl), definition(q, k, v))
        q, k, v = packed()
        out = attention(q, k, v, cu_seqlens=BOUNDS, impl=impl)
        torch.testing.assert_close(out, by_document(q, k, v))


@pytest.mark.parametrize("chosen", ["auto", "sdpa", "flash_attn"])
def test_bounds_on_the_device_go_to_a_varlen_kernel(chosen, monkeypatch):
    fake_packages(monkeypatch)
    monkeypatch.setattr(attention_op, "HALF", (torch.float64,))
    with torch.no_grad():
        rows = packed()
        out = attention_op._on_device(*rows, AS_TENSOR, 4, chosen)
        torch.testing.assert_close(out, by_document(*rows))


@pytest.mark.parametrize(
    "bounds, max_seqlen, chosen, message",
    [
        (AS_TENSOR, None, "auto", "max_seqlen is needed with cu_seqlens on a GPU"),
        (AS_TENSOR, 4, "torch", "impl='torch' needs cu_seqlens on the host"),
        (AS_TENSOR, 4, "xformers", "impl='xformers' needs cu_seqlens on the host"),
        (AS_TENSOR, 4, "auto", "cu_seqlens on a GPU needs bfloat16 or float16, got q in"),
        (AS_TENSOR.long(), 4, "auto", "cu_seqlens must be one of int32, got torch.int64"),
        (AS_TENSOR[None], 4, "auto", r"cu_seqlens must be \(documents \+ 1,\)"),
    ],
)
def test_errors_of_bounds_on_the_device(bounds, max_seqlen, chosen, message):
    with pytest.raises(ValueError, match=message):
        attention_op._on_device(*packed(), bounds, max_seqlen, chosen)


X = torch.zeros(2, 3, 5, 8)
R = torch.zeros(14, 3, 8)
M = X.to("meta")


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[0], X[0], X[0]), {}, r"q must be \(B, H, L, d\), .* got shape \(3, 5, 8\)"),
        ((X, X[0], X), {}, r"k must be \(B, H, S, d\), got shape"),
        ((X, X[:1], X), {}, r"k must be .* = \(2, 3, 5, 8\), got \(1, 3, 5, 8\)"),
        ((X, X, X[:, :, :4]), {}, r"v must be .* = \(2, 3, 5, 8\), got \(2, 3, 4, 8\)"),
        ((X, X[:, :, :0], X[:, :, :0]), {}, "k has no tokens to attend to"),
        ((X.int(), X, X), {}, "q must be one of float64"),
        ((X, X.double(), X), {}, "k is torch.float64, q torch.float32"),
        ((X, X, X.to("meta")), {}, "v is on meta, q on cpu"),
        ((X, X, X), {"max_seqlen": 5}, "max_seqlen=5 belongs to packed inputs"),
        ((X, X, X), {"cu_seqlens": (0, 2)}, r"q must be \(total, H, d\) with cu_seqlens"),
        ((R, R[1:], R), {"cu_seqlens": BOUNDS}, r"k must be .* got \(13, 3, 8\)"),
        ((R, R, R), {"cu_seqlens": (0, 3)}, r"run from 0 to 14, the rows of q, got ends \(0, 3\)"),
        ((R, R, R), {"cu_seqlens": ()}, r"run from 0 to 14, the rows of q, got ends \(\)"),
        ((R, R, R), {"cu_seqlens": (0, 9, 3, 14)}, "cu_seqlens must not decrease, got 9 then 3"),
        ((R, R, R), {"cu_seqlens": AS_TENSOR.float()}, "cu_seqlens must be one of int32, int64"),
        ((R, R, R), {"cu_seqlens": AS_TENSOR[None]}, r"cu_seqlens must be \(documents \+ 1,\)"),
        ((R, R, R), {"cu_seqlens": BOUNDS, "max_seqlen": 3}, "max_seqlen=3 is below the longest"),
        ((R, R, R), {"cu_seqlens": BOUNDS, "max_seqlen": -1}, "max_seqlen must not be negative"),
        ((X, X, X), {"impl": "cudnn"}, "impl='cudnn' is not one of auto, sdpa"),
        ((M, M, M), {"impl": "blocked"}, "'blocked' of attention is not available here: it takes"),
        ((M, M, M), {"impl": "cpp"}, "impl='cpp' of attention is not available here: it takes CPU"),
        ((X, X, X), {"impl": "flash_attn"}, "the package flash-attn is not installed"),
        ((X, X, X), {"impl": "xformers"}, "the package xformers is not installed"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_kernel_on_a_gpu_equals_dense_runs():
    rows = [x.detach().cuda().requires_grad_() for x in packed(width=64, dtype=torch.bfloat16)]
    out = attention(*rows, cu_seqlens=AS_TENSOR.cuda(), max_seqlen=4)
    want = attention(*rows, cu_seqlens=BOUNDS, impl="torch")
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    for grad, other in zip(
        torch.autograd.grad(out.sum(), rows), torch.autograd.grad(want.sum(), rows), strict=True
    ):
        torch.testing.assert_close(grad, other, rtol=3e-2, atol=3e-2)
