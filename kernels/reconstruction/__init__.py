"""Reconstruction: the masked-patch regression loss of masked autoencoders, and its head with it."""

from .head import masked_head_reconstruction_loss
from .op import masked_reconstruction_loss

__all__ = ["masked_head_reconstruction_loss", "masked_reconstruction_loss"]
