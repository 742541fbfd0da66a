"""Residual addition and LayerNorm in one op, over rows that may belong to several norms."""

from .op import NormedSum, add_layer_norm

__all__ = ["NormedSum", "add_layer_norm"]
