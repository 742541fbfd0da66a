"""Axes of a chart: their range, their ticks, and curves made small enough for a page."""

import math
from typing import NamedTuple

from kdcmae_fast.report.log import Curve

LOG_SCALE_FROM = 20.0  # ratio of largest to smallest value from which a log scale reads better
BUCKETS = 300  # of the steps; each keeps its least and its largest value
SIZE = 1000.0  # of the drawing; the page stretches it


class Scale(NamedTuple):
    """Where a value is along an axis: at(low) = 0, at(high) = 1."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, as a share of the axis."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return value / (self.high - self.low) - self.low / (self.high - self.low)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within the axis."""
        found = _log_ticks(self.low, self.high, count) if self.log else []
        return found if len(found) >= 2 else _linear_ticks(self.low, self.high, count)


def value_scale(values: list[float], *, linear: bool = False) -> Scale:
    """An axis that holds all values with a little room; logarithmic where they differ much."""
    low, high = min(values), max(values)
    if not linear and low > 0 and high / low > LOG_SCALE_FROM:
        room = (high / low) ** 0.05
        return Scale(low / room, high * room, log=True)
    spread = high - low
    if spread <= 1e-6 * max(abs(low), abs(high)):
        spread = 0.0
    room = 0.06 * spread or 0.5 * abs(high) or 1.0
    bottom = 0.0 if low >= 0 and low - room < 0.15 * high else low - room
    return Scale(bottom, high + room)


def step_scale(steps: list[float]) -> Scale:
    """An axis from the first step to the last; from 0 where that is close."""
    low, high = min(steps), max(steps)
    if low < 0.1 * high:
        low = 0.0
    return Scale(low, high if high > low else low + 1.0)


def running_mean(curve: Curve) -> Curve | None:
    """Mean around each value, 5 % of the log wide; None for logs too short to need it.

    Where fewer values come before one than that, about as few after it count: the steep start of a
    run stays where it is.
    """
    widest = len(curve) // 40
    if widest < 2:
        return None
    sums = [0.0]
    for _, value in curve:
        sums.append(sums[-1] + value)
    means = []
    for place, (step, _) in enumerate(curve):
        after = min(widest, max(place, widest // 8))
        first, last = max(0, place - widest), min(len(curve), place + after + 1)
        means.append((step, (sums[last] - sums[first]) / (last - first)))
    return means


def thin(curve: Curve) -> Curve:
    """The same picture of a curve with at most 600 points: extremes stay."""
    if len(curve) <= 2 * BUCKETS:
        return curve
    kept = []
    for bucket in range(BUCKETS):
        first = bucket * len(curve) // BUCKETS
        part = curve[first : (bucket + 1) * len(curve) // BUCKETS]
        low, high = min(part, key=_value), max(part, key=_value)
        kept += [low] if low == high else sorted((low, high))
    return kept


def write_tick(value: float) -> str:
    """A tick's label, short."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}".replace("e-0", "e-")


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, as close to `count` of them as that gives."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    found: list[list[float]] = []
    for step in (power * factor for factor in (0.5, 1, 2, 5, 10)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found.append([place * step for place in range(first, last + 1)])
    return min(found, key=lambda ticks: abs(len(ticks) - count))


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [10.0**power * factor for power in powers for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) <= count + 1:
            return found
    return found[:: math.ceil(len(found) / count)]
