"""Other people's code for the same op, where it is installed: the extra `kdcmae-fast[peers]`.

Each function imports its package, or skips the test that asked and says why.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import pytest
import torch

VISION_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
)
_KEPT: list[torch.library.Library] = []  # definitions end with the Library that made them


def lightly_utils() -> ModuleType:
    """lightly.models.utils: token masks and index helpers."""
    return _peer("lightly", "lightly.models.utils", needs_vision=True)


def open_clip_loss() -> ModuleType:
    """open_clip.loss: ClipLoss."""
    return _peer("open_clip", "open_clip.loss", needs_vision=True)


def liger() -> ModuleType:
    """liger_kernel.transformers: LigerKLDIVLoss and others, Triton kernels for a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("liger_kernel's losses are Triton kernels and need a GPU")
    return _peer("liger_kernel", "liger_kernel.transformers")


def cut_cross_entropy() -> ModuleType:
    """cut_cross_entropy: cross-entropy of a linear layer, for 16-bit operands on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("cut_cross_entropy's kernels need a GPU")
    return _peer("cut_cross_entropy", "cut_cross_entropy")


def _peer(package: str, module: str, needs_vision: bool = False) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (the extra kdcmae-fast[peers])")
    try:
        if needs_vision:
            import_torchvision()
        return importlib.import_module(module)
    except Exception as error:
        pytest.skip(f"{module} does not import here: {type(error).__name__}: {error}")


@functools.cache
def import_torchvision() -> None:
    """Import torchvision, also one whose compiled ops were built for another torch.

    lightly and open_clip import it at once and use none of those ops here. Without a schema for
    them its import fails; with one, only calling them does.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        _KEPT.append(library)
        for schema in VISION_OPS:
            library.define(schema)
        import torchvision  # noqa: F401
