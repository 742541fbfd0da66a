"""Alignment of two sets of features: maximum mean discrepancy."""

from .op import mmd_loss

__all__ = ["mmd_loss"]
