"""Who computes an op in a benchmark: the published sequence, torch.compile of it, peers, we."""

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels.common import implementations, unavailable

PUBLISHED = "published"
COMPILE = "compile"

Way = Callable[[], Tensor]


def providers(op: str, *peers: str) -> pytest.MarkDecorator:
    """`provider`: published, its torch.compile, peers by name, each implementation `op` has."""
    names = (PUBLISHED, COMPILE, *peers, *implementations(op))
    return pytest.mark.parametrize("provider", names)


@pytest.fixture
def choose(request: pytest.FixtureRequest, device: str, full: bool) -> Callable[..., Way]:
    """choose(op, provider, published=, ours=, peer names=): what to time; skips what is not here.

    ours(impl) -> a way to compute the op with that implementation; a peer's function, called once,
    imports the peer and returns its way.
    """

    def pick(
        op: str,
        provider: str,
        *,
        published: Way,
        ours: Callable[[str], Way],
        **peers: Callable[[], Way],
    ) -> Way:
        if provider == PUBLISHED:
            return published
        if provider == COMPILE:
            return compiled(published, device, full and not request.config.option.no_compile)
        if provider in peers:
            return peers[provider]()
        problem = unavailable(op, provider, device)
        if problem:
            pytest.skip(problem)
        return ours(provider)

    return pick


def compiled(way: Way, device: str, wanted: bool) -> Way:
    """torch.compile of `way`; skips where it is not wanted or does not work."""
    if not wanted:
        pytest.skip("torch.compile takes seconds per shape: only with --full or on a GPU")
    problem = compile_problem(device)
    if problem:
        pytest.skip(problem)
    torch._dynamo.reset()  # every shape is compiled anew, as if it were the only one
    return torch.compile(way, dynamic=False)


@functools.cache
def compile_problem(device: str) -> str | None:
    """Why torch.compile cannot be used here, from trying; None when it can."""
    x = torch.ones(8, device=device, requires_grad=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda value: value.sin().sum())(x).backward()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch.compile does not work here: {reason}"
    return None
