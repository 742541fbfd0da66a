"""Maximum mean discrepancy of two sets of rows, in plain differentiable PyTorch.

Letters: N rows of x, M rows of y, n = N + M rows z of both, D features. The README has the maths.
Everything is written in "misses" 1 - kernel instead of kernels: a miss of a close pair keeps its
relative precision, and the constants that a difference of means would cancel never arise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import assume_constant_result

VARIANTS = ("xkd", "unbiased", "kdc_rbf", "kdc_tiled")
DEFAULT_BANDWIDTHS = {
    "xkd": (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0),
    "unbiased": (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0),
    "kdc_rbf": (0.25, 0.5, 1.0, 2.0, 4.0),
}
MAX_POWER = 16  # one kernel from another by at most that power, see `chain`


class Coefficients(NamedTuple):
    """loss = constant + sum over all ordered pairs (i, j) of coefficient * miss."""

    xx: float
    yy: float
    xy: float  # of (i, j) and again of (j, i)
    constant: float


@assume_constant_result
def family(bandwidths: tuple[float, ...] | None, variant: str) -> tuple[list[float], list[int]]:
    """Ascending g of the kernels exp(-g * scale * d2), and `chain` of them.

    `scale_of` has the scale; None means the variant's own bandwidths.
    """
    if variant == "kdc_tiled":
        return [1.0], [0]
    if bandwidths is None:
        bandwidths = DEFAULT_BANDWIDTHS[variant]
    gammas = [1 / s for s in bandwidths] if variant == "kdc_rbf" else list(bandwidths)
    gammas.sort()
    return gammas, chain(gammas)


def chain(gammas: list[float]) -> list[int]:
    """For each of the ascending g: its integer ratio to the one before, 0 if it has none.

    exp(-r g d2) is the r-th power of exp(-g d2), which costs multiplications instead of an
    exponential. Larger ratios than MAX_POWER would leave the larger kernel to the rounding of the
    smaller one, where that one is nearly 1.
    """
    powers = [0]
    for before, after in zip(gammas, gammas[1:], strict=False):
        ratio = after / before
        whole = round(ratio) if ratio <= MAX_POWER else 0
        powers.append(whole if whole > 0 and abs(ratio - whole) <= 1e-12 * whole else 0)
    return powers


def coefficients(variant: str, n: int, m: int) -> Coefficients:
    """Of N = n and M = m rows."""
    xx, yy, xy, constant = -1 / n**2, -1 / m**2, 1 / (n * m), 0.0
    if variant == "unbiased":
        xx, yy = -1 / (n * (n - 1)), -1 / (m * (m - 1))
    elif variant == "kdc_tiled":
        xy, constant = -xy, 4.0
    return Coefficients(xx, yy, xy, constant)


def scale_of(variant: str, z: Tensor) -> Tensor | float:
    """What multiplies every g; of centred rows z (n, D).

    kdc_rbf: one over the mean squared distance of two different rows, which is 2 |z|^2 / (n - 1)
    summed over centred rows; 0 (every kernel is 1) if all rows are equal.
    """
    if variant == "kdc_tiled":
        return 1 / z.shape[1] ** 2  # the published code divides by D twice
    if variant != "kdc_rbf":
        return 1.0
    spread = 2 * z.detach().square().sum() / (z.shape[0] - 1)
    return torch.where(spread == 0, spread, 1 / spread)


def block_misses(
    rows: Tensor, columns: Tensor, scale: Tensor | float, gammas: list[float], dtype: torch.dtype
) -> Tensor:
    """Sum over all kernels and all pairs of a row and a column; `rows is columns` for one set."""
    norms = rows.square().sum(1).unsqueeze(1) + columns.square().sum(1)
    distances = (norms - 2 * rows @ columns.t()).clamp_min(0)
    if rows is columns:
        own = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
        distances = distances.masked_fill(own, 0)
    distances = (distances * scale).to(dtype)
    return torch.stack([torch.expm1(-gamma * distances).sum() for gamma in gammas]).sum().neg()


def mmd(x: Tensor, y: Tensor, variant: str, gammas: list[float]) -> Tensor:
    """x (N, D), y (M, D) of one dtype -> ().

    Autograd keeps a matrix per kernel and two in float64 of each of the three blocks (N, N),
    (M, M) and (N, M). Distances are float64: as differences of products they lose what the
    kernels of close pairs are made of.
    """
    n, m = x.shape[0], y.shape[0]
    z = torch.cat([x, y]).to(x.dtype if x.device.type == "mps" else torch.float64)
    z = z - z.detach().mean(0)
    scale, weights = scale_of(variant, z), coefficients(variant, n, m)
    x_rows, y_rows = z[:n], z[n:]
    total = torch.zeros_like(z[0, 0], dtype=x.dtype) + weights.constant
    for rows, columns, weight in (
        (x_rows, x_rows, weights.xx),
        (y_rows, y_rows, weights.yy),
        (x_rows, y_rows, 2 * weights.xy),
    ):
        total = total + weight * block_misses(rows, columns, scale, gammas, x.dtype)
    return total
