"""Frame similarities: brute force, closed forms, gradients, strides, compile, errors."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcmae_fast import kernels
from kdcmae_fast.kernels import frame_similarity

OP = "frame_similarity"
pytestmark = pytest.mark.usefixtures("impl")

STRATEGIES = ("diagonal_mean", "diagonal_max", "mean", "max")
EVERY = pytest.mark.parametrize("strategy", STRATEGIES)
# N, M, T, D: tiles of 32 and more clips or 512 frames, none of which these sizes fill evenly
SHAPES = [(1, 1, 1, 1), (3, 65, 2, 96), (65, 3, 10, 512), (257, 129, 3, 17), (5, 7, 16, 1023)]


def clips(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def pair_loop(a: Tensor, b: Tensor, strategy: str) -> np.ndarray:
    """One pair and one cosine at a time."""

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))

    scores = np.empty((len(a), len(b)))
    for i, clip in enumerate(a.double().numpy()):
        for j, other in enumerate(b.double().numpy()):
            if strategy.startswith("diagonal"):
                cosines = [cosine(x, y) for x, y in zip(clip, other, strict=True)]
            else:
                cosines = [cosine(x, y) for x in clip for y in other]
            scores[i, j] = max(cosines) if strategy.endswith("max") else np.mean(cosines)
    return scores


@EVERY
@pytest.mark.parametrize("shape", [(12, 12, 16, 24), (1, 1, 1, 1), (5, 35, 3, 7)], ids=str)
def test_equals_one_pair_at_a_time(strategy, shape):
    n, m, frames, width = shape
    a, b = clips(n, frames, width), clips(m, frames, width)
    scores = frame_similarity(a, b, strategy=strategy)
    np.testing.assert_allclose(scores.numpy(), pair_loop(a, b, strategy), rtol=0, atol=1e-14)


@EVERY
def test_closed_forms(strategy):
    same = clips(4, 1, 6).expand(4, 5, 6)  # all frames of a clip alike
    assert torch.allclose(
        frame_similarity(same, same, strategy=strategy).diagonal(), torch.ones(4).double()
    )
    a, b = clips(6, 1, 9), clips(7, 1, 9)  # one frame: every strategy is the cosine
    cosines = torch.nn.functional.cosine_similarity(a, b.transpose(0, 1), dim=2)
    torch.testing.assert_close(frame_similarity(a, b, strategy=strategy), cosines)
    # Frames e_0 ... e_3 against themselves: 4 of 16 products are 1, the others 0.
    eye = torch.eye(4).unsqueeze(0)
    want = {"diagonal_mean": 1.0, "diagonal_max": 1.0, "mean": 0.25, "max": 1.0}[strategy]
    assert frame_similarity(eye, eye, strategy=strategy).item() == want
    shifted = eye.roll(1, dims=1)
    want = {"diagonal_mean": 0.0, "diagonal_max": 0.0, "mean": 0.25, "max": 1.0}[strategy]
    assert frame_similarity(eye, shifted, strategy=strategy).item() == want


@EVERY
def test_sides_and_lengths(strategy):
    a, b = clips(7, 3, 11), clips(40, 3, 11)
    scores = frame_similarity(a, b, strategy=strategy)
    torch.testing.assert_close(frame_similarity(b, a, strategy=strategy).t(), scores)
    longer = a * torch.rand(7, 3, 1) * 9
    torch.testing.assert_close(frame_similarity(longer, b, strategy=strategy), scores)
    unit = [torch.nn.functional.normalize(x, dim=2) for x in (a, b)]
    raw = frame_similarity(*unit, strategy=strategy, normalize=False)
    torch.testing.assert_close(raw, scores)
    torch.testing.assert_close(
        frame_similarity(3 * unit[0], unit[1], strategy=strategy, normalize=False), 3 * scores
    )


@EVERY
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(strategy, normalize):
    a, b = clips(3, 2, 5).requires_grad_(), clips(4, 2, 5).requires_grad_()
    op = functools.partial(frame_similarity, strategy=strategy, normalize=normalize)
    assert torch.autograd.gradcheck(op, (a, b))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stays_within_pytorch_s_own_error(strategy, shape, dtype, three_way):
    n, m, frames, width = shape
    leaves = clips(n, frames, width, dtype=dtype), clips(m, frames, width, dtype=dtype)

    def plain(a, b):
        return frame_similarity(a, b, strategy=strategy, impl="torch")

    three_way(functools.partial(frame_similarity, strategy=strategy), plain, leaves)


@EVERY
def test_torch_agrees_with_eager_code(strategy, three_way):
    """The reference itself, beside the obvious lines of PyTorch."""

    def plain(a, b):
        a, b = (torch.nn.functional.normalize(x, dim=2) for x in (a, b))
        products = torch.einsum("nkd,mld->nmkl", a, b)
        if strategy == "max":
            return products.amax((2, 3))
        if strategy == "mean":
            return products.mean((2, 3))
        same = products.diagonal(dim1=2, dim2=3)
        return same.amax(2) if strategy == "diagonal_max" else same.mean(2)

    leaves = clips(33, 4, 20, dtype=torch.float32), clips(6, 4, 20, dtype=torch.float32)
    three_way(functools.partial(frame_similarity, strategy=strategy), plain, leaves)


@pytest.mark.parametrize("strategy, frames", [("diagonal_max", {0}), ("max", {0})])
def test_equal_maxima_give_the_gradient_to_the_first(strategy, frames):
    a, b = clips(3, 1, 8).repeat(1, 4, 1), clips(5, 1, 8).repeat(1, 4, 1)
    a.requires_grad_(), b.requires_grad_()
    frame_similarity(a, b, strategy=strategy).sum().backward()
    for grad in (a.grad, b.grad):
        touched = grad.abs().sum(2) > 0
        assert touched[:, 0].all() and not touched[:, 1:].any()
    # Maxima at (k, l) = (1, 2) and (2, 0): the first k counts, not the first l.
    a, b = torch.eye(6)[None, [0, 1, 2]], torch.eye(6)[None, [2, 3, 1]]
    a.requires_grad_()
    frame_similarity(a, b, strategy="max", normalize=False).sum().backward()
    assert torch.equal(a.grad[0, 1], b[0, 2]) and not a.grad[0, [0, 2]].any()


@EVERY
def test_empty_sides_and_frames_without_length(strategy):
    for n, m in ((0, 3), (3, 0), (0, 0)):
        a, b = clips(n, 2, 5).requires_grad_(), clips(m, 2, 5).requires_grad_()
        scores = frame_similarity(a, b, strategy=strategy)
        assert scores.shape == (n, m)
        scores.sum().backward()
        assert a.grad.shape == a.shape and b.grad.shape == b.shape
        assert not a.grad.any() and not b.grad.any()
    a, b = clips(2, 3, 5), clips(4, 3, 5)
    a[0] = 0
    a.requires_grad_()
    scores = frame_similarity(a, b, strategy=strategy)
    assert not scores[0].any() and scores.isfinite().all()
    scores.sum().backward()
    assert a.grad.isfinite().all()


@EVERY
def test_not_a_number_shows(strategy):
    a, b = clips(40, 3, 5), clips(5, 3, 5)
    a[34, 1, 2] = math.nan
    b[2, 2, 0] = math.inf
    scores = frame_similarity(a, b, strategy=strategy)
    assert scores[34].isnan().all() and scores[:, 2].isnan().all()
    rest = torch.ones(40, 5, dtype=torch.bool)
    rest[34], rest[:, 2] = False, False
    assert scores[rest].isfinite().all()


@EVERY
def test_any_strides_and_mixed_dtypes(strategy):
    a = torch.randn(11, 6, 4).transpose(0, 2)[:, ::2]  # (4, 3, 11)
    b = torch.randn(5 * 3 * 22 + 1).half()[1:].view(5, 3, 22)[..., ::2].requires_grad_()
    scores = frame_similarity(a, b, strategy=strategy)
    again = frame_similarity(a.contiguous(), b.detach().contiguous(), strategy=strategy)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.detach(), again)
    scores.sum().backward()
    assert b.grad.shape == b.shape and b.grad.dtype == torch.float16 and not a.requires_grad
    expanded = torch.randn(1, 3, 11).expand(6, 3, 11)
    want = frame_similarity(expanded.contiguous(), a, strategy=strategy)
    torch.testing.assert_close(frame_similarity(expanded, a, strategy=strategy), want)


@EVERY
@pytest.mark.parametrize("side", [0, 1])
def test_one_side_alone_gets_its_gradient(strategy, side):
    leaves = [clips(5, 3, 7), clips(6, 3, 7)]
    both = [x.clone().requires_grad_() for x in leaves]
    frame_similarity(*both, strategy=strategy).square().sum().backward()
    leaves[side].requires_grad_()
    frame_similarity(*leaves, strategy=strategy).square().sum().backward()
    torch.testing.assert_close(leaves[side].grad, both[side].grad)
    assert leaves[1 - side].grad is None


@EVERY
def test_deterministic_whatever_the_number_of_threads(strategy):
    a, b = clips(130, 4, 33, dtype=torch.float32), clips(70, 4, 33, dtype=torch.float32)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
            scores = frame_similarity(*leaves, strategy=strategy)
            runs.append((scores, *torch.autograd.grad(scores.square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    wanted = runs[0] if kernels.backends("cpu")[OP].impl == "cpp" else runs[1]
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, wanted, strict=True))


@EVERY
def test_autocast_changes_nothing(strategy):
    a, b = clips(4, 2, 9, dtype=torch.float32), clips(4, 2, 9, dtype=torch.float32)
    want = frame_similarity(a, b, strategy=strategy)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frame_similarity(a, b, strategy=strategy), want)


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@EVERY
def test_compiles_without_breaks(strategy):
    torch._dynamo.reset()
    op = functools.partial(frame_similarity, strategy=strategy)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, m in ((4, 5), (6, 3)):
        a, b = clips(n, 2, 8).requires_grad_(), clips(m, 2, 8).requires_grad_()
        scores, again = op(a, b), compiled(a, b)
        torch.testing.assert_close(again, scores)
        wanted = torch.autograd.grad(scores.square().sum(), (a, b))
        grads = torch.autograd.grad(again.square().sum(), (a, b))
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want)


@EVERY
def test_opcheck(strategy, impl):
    ops, check = torch.ops.kdcmae_fast, torch.library.opcheck
    a, b = clips(3, 2, 5, dtype=torch.float32), clips(4, 2, 5, dtype=torch.bfloat16)
    check(ops.frame_inverse_norms.default, (a, torch.float32, True, ""))
    check(ops.frame_inverse_norms.default, (a, torch.float64, False, "a"))
    if impl == "torch":
        return
    inverses = [ops.frame_inverse_norms(x, torch.float32, True, "") for x in (a, b)]
    check(ops.frame_similarity_cpp.default, (a, b, *inverses, strategy))
    grad, index = ops.frame_similarity_cpp(a, b, *inverses, strategy)
    backward = ops.frame_similarity_grad_cpp.default
    for of_b in (False, True):
        check(backward, (grad, index, a, b, *inverses, strategy, True, of_b))


def test_cpp_keeps_no_copy_of_the_features(impl, saved_storages):
    if impl != "cpp":
        pytest.skip("of the C++ implementation")
    a, b = clips(6, 4, 64).half().requires_grad_(), clips(5, 4, 64).half().requires_grad_()
    for strategy in STRATEGIES:
        saved = saved_storages(functools.partial(frame_similarity, a, b, strategy=strategy))
        small = {pointer: size for pointer, size in saved.items()
                 if pointer not in (a.data_ptr(), b.data_ptr())}  # fmt: skip
        assert sum(small.values()) == 4 * (6 + 5) * 4 + (4 * 6 * 5 if "max" in strategy else 0)


X = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[0], X), {}, r"a must be \(N, T, D\), got shape \(2, 3\)"),
        ((X, X[0]), {}, r"b must be \(M, T, D\), got shape \(2, 3\)"),
        ((X, X[:, :1]), {}, r"as many frames and features, got \(4, 2, 3\) and \(4, 1, 3\)"),
        ((X, X[..., :1]), {}, r"as many frames and features, got \(4, 2, 3\) and \(4, 2, 1\)"),
        ((X[:, :0], X[:, :0]), {}, r"no frames or no features: shape \(4, 0, 3\)"),
        ((X[..., :0], X[..., :0]), {}, r"no frames or no features: shape \(4, 2, 0\)"),
        ((X.int(), X), {}, "a must be one of float64"),
        ((X, X.int()), {}, "b must be one of float64"),
        ((X, X.to("meta")), {}, "b is on meta, a on cpu"),
        ((X, X), {"strategy": "median"}, "strategy='median' is not one of diagonal_mean"),
        ((X, X), {"impl": "cuda"}, "impl='cuda' of frame_similarity is not available here"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        frame_similarity(*arguments, **options)


@pytest.mark.large
def test_past_int32(impl):
    """2.2e9 half-precision elements (4.3 GB), and their gradient."""
    if impl != "cpp":
        pytest.skip("PyTorch's own ops make several float32 copies of 8.6 GB")
    count = 174_800
    a = torch.zeros(count, 16, 768, dtype=torch.float16)
    assert a.numel() > 2**31
    a[-1] = torch.randn(16, 768)
    b = torch.randn(2, 16, 768).half()
    last = a[-1:].clone().requires_grad_()
    a.requires_grad_()
    for strategy in STRATEGIES:
        scores = frame_similarity(a, b, strategy=strategy)
        want = frame_similarity(last, b, strategy=strategy)
        torch.testing.assert_close(scores[-1:], want)
    (grad,) = torch.autograd.grad(scores[-1].sum(), a)
    torch.testing.assert_close(grad[-1:], torch.autograd.grad(want.sum(), last)[0])
