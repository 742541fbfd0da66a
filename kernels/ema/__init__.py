"""Exponential moving averages of parameters: a teacher that follows its student."""

from .op import ema_update_

__all__ = ["ema_update_"]
