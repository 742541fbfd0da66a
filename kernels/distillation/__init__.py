"""Distillation between two views: KL and Jensen-Shannon divergences of row distributions."""

from .op import distillation_loss

__all__ = ["distillation_loss"]
