"""Reconstruction: the masked-patch regression loss of masked autoencoders."""

from .op import masked_reconstruction_loss

__all__ = ["masked_reconstruction_loss"]
