"""Initial weights, as the published CAV-MAE (arXiv 2210.07839) has them."""

from torch import nn


def init_weights(model: nn.Module) -> None:
    """Linear layers: Xavier uniform, bias 0. LayerNorm: 1 and 0.

    Patch projections, modality vectors and the mask token are set by the modules that own them.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
