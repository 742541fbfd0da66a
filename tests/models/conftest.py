"""Golden inputs and results of the published models (tiny sizes, fp64 evaluation)."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcmae_fast.convert import load_published
from kdcmae_fast.kernels import complementary_masks
from kdcmae_fast.models import Batch, build_model

GOLDEN = Path(__file__).parents[1] / "golden" / "cav_mae"
SIZES = {
    "audio_length": 64,
    "img_size": 32,
    "patch_size": 8,
    "num_mel_bins": 32,
    "embed_dim": 24,
    "num_heads": 3,
    "modality_depth": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}


@pytest.fixture(scope="session")
def golden():
    """Inputs, tensors and gradients by name."""
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="session")
def golden_scalars():
    return json.loads((GOLDEN / "scalars.json").read_text())["scalars"]


@pytest.fixture(scope="session")
def golden_folder():
    return GOLDEN


@pytest.fixture
def golden_batch(golden):
    return Batch(golden["fbank"].double(), golden["frames"].double(), torch.arange(3))


@pytest.fixture
def noise_plans():
    """Plans of the golden model from stored noise."""

    def make(golden, run, ratio, num_views):
        return {
            name: complementary_masks(
                torch.arange(3),
                grid,
                ratio,
                num_views=num_views,
                noise=golden[f"{run}.noise_{name}"],
            )
            for name, grid in (("audio", (8, 8)), ("video", (4, 4)))
        }

    return make


@pytest.fixture
def close():
    """Largest difference as a share of the expected tensor's scale."""

    def check(result, expected, tolerance=1e-6):
        expected = torch.as_tensor(expected, dtype=torch.float64)
        result = torch.as_tensor(result, dtype=torch.float64).detach()
        assert result.shape == expected.shape
        error = (result - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{error:.2e}"

    return check


@pytest.fixture
def small():
    """A tiny fp64 model by name and settings, always from the same seed."""

    def build(name="cav_mae", **overrides):
        torch.manual_seed(1)
        return build_model(name, "tiny", **(SIZES | overrides)).double()

    return build


@pytest.fixture
def batch():
    """Five clips for the `small` models."""
    generator = torch.Generator().manual_seed(2)
    fbank = torch.randn(5, 64, 32, generator=generator, dtype=torch.float64)
    frames = torch.randn(5, 3, 32, 32, generator=generator, dtype=torch.float64)
    return Batch(fbank, frames, torch.tensor([3, 1, 4, 15, 9]))


@pytest.fixture
def gradients():
    """Named gradients of a model's total loss; the model is left without gradients."""

    def compute(model, batch, **arguments):
        losses = model(batch, **arguments)
        losses.total.backward()
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return losses, found

    return compute


@pytest.fixture(scope="session")
def published():
    """published_shapes.py."""
    path = Path(__file__).parent / "published_shapes.py"
    return SimpleNamespace(**runpy.run_path(str(path)))


@pytest.fixture(scope="session")
def clips():
    """Three clips of 0.96 s by a formula."""
    b, t, f = torch.arange(3.0).double(), torch.arange(96).double(), torch.arange(128).double()
    b = b[:, None, None]
    fbank = torch.sin(0.05 * t[:, None] * (1 + 0.3 * b) + 0.1 * f + b)
    b, c = b[..., None], torch.arange(3).double()[:, None, None]
    y, x = torch.arange(224).double()[:, None], torch.arange(224).double()
    frames = torch.cos(0.02 * (c + 1) * y * (1 + 0.2 * b) + 0.03 * x + b)
    return Batch(fbank, frames, torch.arange(3))


@pytest.fixture
def formula_plans(published):
    """For `clips`: the kept tokens i are those with the smallest 5 i mod L."""
    plans = {}
    for name, grid in (("audio", published.AUDIO_GRID), ("video", published.VIDEO_GRID)):
        tokens = grid[0] * grid[1]
        noise = (5 * torch.arange(tokens) % tokens).double().expand(3, -1)
        plans[name] = complementary_masks(torch.arange(3), grid, 0.75, num_views=1, noise=noise)
    return plans


@pytest.fixture
def load(tmp_path, published):
    """A published model on weights by the formula, from the shapes of its tensors."""

    def make(shapes, name=None, **overrides):
        path = tmp_path / "formula.safetensors"
        save_file(published.formula_weights(shapes), path)
        return load_published(path, name, **(published.HEADS | overrides))

    return make


@pytest.fixture
def near():
    """Within 1e-7 of figures given to eight or nine digits."""

    def check(value, expected):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-7)

    return check
