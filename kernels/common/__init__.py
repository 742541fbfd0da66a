"""What every op family shares: the choice of implementation and argument checks."""

from .checks import check_dtype, check_mask_plan, check_ndim, check_shape
from .dispatch import Backend, backends, register_op, resolve, unavailable

__all__ = [
    "Backend",
    "backends",
    "check_dtype",
    "check_mask_plan",
    "check_ndim",
    "check_shape",
    "register_op",
    "resolve",
    "unavailable",
]
