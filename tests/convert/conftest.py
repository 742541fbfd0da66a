"""Small models and files to convert."""

from pathlib import Path

import pytest
import torch

from kdcmae_fast.models import build_model

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
# What the shapes cannot tell.
HINTS = {"num_mel_bins": 32, "num_heads": 3, "decoder_num_heads": 2}


@pytest.fixture
def hints():
    return dict(HINTS)


@pytest.fixture
def golden_folder():
    return Path(__file__).parents[1] / "golden" / "cav_mae"


@pytest.fixture
def small():
    """A small model with no two parameters alike, norms included."""

    def build(name="cav_mae", **overrides):
        model = build_model(name, "tiny", **(SIZES | overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return build


@pytest.fixture
def same_state():
    def check(first, second):
        state, other = first.state_dict(), second.state_dict()
        assert list(state) == list(other)
        for key in state:
            assert torch.equal(state[key], other[key]), key

    return check
