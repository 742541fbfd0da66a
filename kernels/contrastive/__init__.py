"""Contrastive losses: InfoNCE over a local or global batch."""

from .op import InfoNCE, info_nce

__all__ = ["InfoNCE", "info_nce"]
