"""The masked reconstruction loss against a published run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcmae_fast.kernels import complementary_masks, masked_reconstruction_loss
from kdcmae_fast.kernels.tokens import patch_grid

GOLDEN = Path(__file__).parents[1] / "golden" / "cav_mae"
OP = "masked_reconstruction_loss"  # of the fixture impl
pytestmark = pytest.mark.usefixtures("impl")


@pytest.mark.parametrize("modality, key", [("audio", "fbank"), ("video", "frames")])
@pytest.mark.parametrize("run", ("m75", "m50"))
def test_published_values(run, modality, key):
    """Predictions, inputs and losses of a published CAV-MAE run (arXiv 2210.07839)."""
    tensors = load_file(GOLDEN / "io.safetensors")
    scalars = json.loads((GOLDEN / "scalars.json").read_text())["scalars"][run]
    pixels, noise = tensors[key].double(), tensors[f"{run}.noise_{modality}"]
    plan = complementary_masks(
        torch.arange(3), patch_grid(pixels, 16), scalars["mask_ratio"], num_views=1, noise=noise
    )
    assert torch.equal(plan.mask(0).byte(), tensors[f"{run}.mask_{modality}"])
    pred = tensors[f"{run}.pred_{modality}"].double()
    loss = masked_reconstruction_loss(pred, pixels, plan, patch_size=16)
    assert loss.item() == pytest.approx(scalars[f"mae_{modality}"], rel=1e-7)
