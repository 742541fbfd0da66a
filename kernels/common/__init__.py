"""What every op family shares: the choice of implementation and argument checks."""

from .checks import check_dtype, check_mask_plan, check_ndim, check_number, check_shape
from .dispatch import (
    Backend,
    assume_constant_result,
    backends,
    extension_problem,
    implementations,
    register_op,
    register_report,
    resolve,
    unavailable,
)
from .distinct import distinct
from .precision import compute_dtype, without_autocast

__all__ = [
    "Backend",
    "assume_constant_result",
    "backends",
    "check_dtype",
    "check_mask_plan",
    "check_ndim",
    "check_number",
    "check_shape",
    "compute_dtype",
    "distinct",
    "extension_problem",
    "implementations",
    "register_op",
    "register_report",
    "resolve",
    "unavailable",
    "without_autocast",
]
