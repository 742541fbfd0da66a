"""The public op API. Importing it needs torch only: no Triton, no DeepSpeed, no GPU."""

from pathlib import Path

# In a checkout the op folders are in the top-level kernels/; in a wheel they are already here.
# csrc/ tells the two apart: beside an installed wheel, `kernels` would be somebody else's package.
_root = Path(__file__).parents[2]
if (_root / "csrc").is_dir():
    __path__.append(str(_root / "kernels"))

from .alignment import mmd_loss
from .attention import attention
from .common import backends
from .contrastive import diagonal_maps, info_nce, max_pooled_info_nce
from .distillation import dino_loss, distillation_loss, pooled_layer_norm, update_center
from .ema import ema_update_
from .masking import MaskPlan, complementary_masks
from .mlp import mlp
from .normalization import add_layer_norm
from .reconstruction import masked_head_reconstruction_loss, masked_reconstruction_loss
from .similarity import frame_similarity, retrieval_ranks
from .tokens import assemble_decoder_input, embed_visible_patches, gather_tokens

__all__ = [
    "MaskPlan",
    "add_layer_norm",
    "assemble_decoder_input",
    "attention",
    "backends",
    "complementary_masks",
    "diagonal_maps",
    "dino_loss",
    "distillation_loss",
    "ema_update_",
    "embed_visible_patches",
    "frame_similarity",
    "gather_tokens",
    "info_nce",
    "masked_head_reconstruction_loss",
    "masked_reconstruction_loss",
    "max_pooled_info_nce",
    "mlp",
    "mmd_loss",
    "pooled_layer_norm",
    "retrieval_ranks",
    "update_center",
]
