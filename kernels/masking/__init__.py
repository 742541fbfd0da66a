"""Mask plans: which tokens each view of each sample keeps."""

from .op import complementary_masks
from .plan import MaskPlan, len_keep

__all__ = ["MaskPlan", "complementary_masks", "len_keep"]
