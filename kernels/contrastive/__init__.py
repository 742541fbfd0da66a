"""Contrastive losses: InfoNCE over a local or global batch, and its max-pooled form."""

from .max_pooled import diagonal_maps, max_pooled_info_nce
from .op import info_nce
from .pairs import InfoNCE

__all__ = ["InfoNCE", "diagonal_maps", "info_nce", "max_pooled_info_nce"]
