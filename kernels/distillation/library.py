"""What the ops of this family share: dtypes, and the fused forms as ops of the torch library.

One op per direction and implementation: csrc/cpu/*.cpp fills in `<name>_cpp`, a Triton launcher
`<name>_triton`. Each has a fixed number of outputs, none of which is an input; none knows autograd.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def define_fused(
    name: str, schema: str, fake: Callable[..., Any], module: str
) -> dict[str, Callable[..., Any]]:
    """Define `<name>_cpp` and `<name>_triton`; returns implementation -> op.

    fake: outputs from the shapes of the arguments. module: where the Triton launcher `name` is,
    imported when it is first called.
    """

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    for impl in ("cpp", "triton"):
        torch.library.define(f"kdcmae_fast::{name}_{impl}", schema)
        torch.library.register_fake(f"kdcmae_fast::{name}_{impl}", fake)
    torch.library.impl(f"kdcmae_fast::{name}_triton", ("cuda", "cpu"), launch)
    namespace = torch.ops.kdcmae_fast
    return {impl: getattr(namespace, f"{name}_{impl}").default for impl in ("cpp", "triton")}
