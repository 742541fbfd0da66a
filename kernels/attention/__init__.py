"""Attention behind one call: SDPA, FlashAttention, xFormers, plain torch; dense and packed."""

from .op import attention

__all__ = ["attention"]
