"""Tokens: embed the visible patches, gather them, put them back for the decoder."""

from .op import assemble_decoder_input, embed_visible_patches, gather_tokens
from .patches import gather_patches, patch_grid, patchify, unpatchify

__all__ = [
    "assemble_decoder_input",
    "embed_visible_patches",
    "gather_patches",
    "gather_tokens",
    "patch_grid",
    "patchify",
    "unpatchify",
]
