"""Which implementation of an op runs: `impl="auto"` decides here, and `backends()` says why.

Every family registers its ops with `register_op`; every public function calls `resolve` once.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

log = logging.getLogger("kdcmae_fast.kernels")

Function = TypeVar("Function", bound=Callable[..., Any])

IMPLS = ("torch", "cpp", "triton", "cuda")
NONE = "none"  # in `backends()`
_MEANT_FOR = {"cpu": "cpp", "cuda": "triton"}  # missing there costs speed: said once
_OPS: dict[str, tuple[str, ...]] = {}


class Backend(NamedTuple):
    """What `impl="auto"` takes for one op on this machine, and why.

    impl: NONE where KDCMAE_IMPL asks for one that cannot run; the op raises ValueError then.
    """

    impl: str
    reason: str


_REPORTS: dict[str, Callable[[str], Backend]] = {}


def assume_constant_result(function: Function) -> Function:
    """torch.compiler.assume_constant_result for a function, without its import of torch._dynamo.

    That import takes half a second and brings Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def register_op(op: str, *, impls: tuple[str, ...] = ("torch",)) -> None:
    """Declare the implementations an op has, fastest first; `torch` is always among them."""
    if "torch" not in impls or not set(impls) <= set(IMPLS):
        raise ValueError(f"impls of {op}: {impls} must contain 'torch' and come from {IMPLS}")
    _OPS[op] = impls


def register_report(op: str, report: Callable[[str], Backend]) -> None:
    """Add an op with implementations of its own names to `backends()`: report(device) -> line."""
    _REPORTS[op] = report


def implementations(op: str) -> tuple[str, ...]:
    """The implementations `op` has, fastest first, usable here or not."""
    return _OPS[op]


def unavailable(op: str, impl: str, device: str) -> str | None:
    """Why `impl` of `op` cannot run on tensors of this device type; None when it can."""
    if impl not in _OPS[op]:
        return f"{op} has no {impl} implementation (it has {', '.join(_OPS[op])})"
    if impl == "cpp":
        if device != "cpu":
            return f"the C++ implementation takes CPU tensors, not {device}"
        return extension_problem()
    if impl == "triton":
        return _triton_problem(device)
    if impl == "cuda" and device != "cuda":
        return f"the CUDA implementation takes CUDA tensors, not {device}"
    return None


@assume_constant_result
def resolve(op: str, impl: str, device: str) -> str:
    """The implementation to run for tensors of device type `device` ("cpu", "cuda").

    An explicit `impl` that cannot run raises ValueError with the reason; only "auto" falls back.
    The environment variable KDCMAE_IMPL replaces "auto" where the op has that implementation, and
    then raises like an explicit one.
    """
    if impl == "auto":
        return _automatic(op, device, _wanted()).impl
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of auto, {', '.join(IMPLS)}")
    problem = unavailable(op, impl, device)
    if problem:
        raise ValueError(f"impl={impl!r} of {op} is not available here: {problem}")
    return impl


def backends(device: str | None = None) -> dict[str, Backend]:
    """For each op: the implementation `impl="auto"` takes on `device`, and why.

    device: "cpu" or "cuda"; by default "cuda" where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = _wanted()
    chosen = {}
    for op in _OPS:
        try:
            chosen[op] = _automatic(op, device, wanted)
        except ValueError as error:
            chosen[op] = Backend(NONE, str(error))
    chosen |= {op: report(device) for op, report in _REPORTS.items()}
    return dict(sorted(chosen.items()))


def _wanted() -> str | None:
    """The implementation that KDCMAE_IMPL asks for, if any."""
    wanted = os.environ.get("KDCMAE_IMPL") or None
    if wanted not in (None, "auto", *IMPLS):
        raise ValueError(f"KDCMAE_IMPL={wanted} is not one of auto, {', '.join(IMPLS)}")
    return None if wanted == "auto" else wanted


@functools.cache
def _automatic(op: str, device: str, wanted: str | None) -> Backend:
    if wanted in _OPS[op]:
        problem = unavailable(op, wanted, device)
        if problem:
            raise ValueError(f"KDCMAE_IMPL={wanted}, but {op} cannot use it here: {problem}")
        return Backend(wanted, f"KDCMAE_IMPL={wanted}")
    refused: list[str] = []
    for impl in _OPS[op]:
        if impl == "triton" and device == "cpu":
            continue  # its interpreter is for tests, and asked for by name
        problem = unavailable(op, impl, device)
        if problem is None:
            return Backend(impl, "; ".join([f"fastest available on {device}", *refused]))
        refused.append(f"not {impl}: {problem}")
        if impl == _MEANT_FOR.get(device):
            _say_once(impl, problem)
    raise AssertionError("unreachable: torch is always available")


@functools.cache
def _say_once(impl: str, problem: str) -> None:
    """Log why ops run without `impl`: once, not once per op; `backends()` has a line for each."""
    log.warning("ops run without %s: %s", impl, problem)


INTERFACE = 2  # of the compiled ops; raised with kInterface in csrc when one comes or changes


@functools.cache
def extension_problem() -> str | None:
    """Why the C++ ops cannot be used; None when they can."""
    how = "with a C++ compiler and torch installed, `pip install --no-build-isolation -e .`"
    try:
        module = importlib.import_module("kdcmae_fast._C")
    except ImportError as error:
        return f"kdcmae_fast._C is not built ({error}); {how} builds it"
    if getattr(module, "interface", None) != INTERFACE:
        return f"kdcmae_fast._C was built from other sources than these; {how} builds it anew"
    return None


def _triton_problem(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "this torch finds no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels take CUDA tensors, not {device} (TRITON_INTERPRET=1 emulates them)"
