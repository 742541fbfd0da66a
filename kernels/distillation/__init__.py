"""Distillation: row divergences between views, the DINO loss, and the pooling before them."""

from .dino import dino_loss, update_center
from .op import distillation_loss
from .pooled import pooled_layer_norm

__all__ = ["dino_loss", "distillation_loss", "pooled_layer_norm", "update_center"]
