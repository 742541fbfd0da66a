"""Reconstruction pictures: the right patches hidden and filled in, and a PNG of the right shape."""

import struct

import pytest
import torch

from kdcmae_fast.data import FrontEnd
from kdcmae_fast.data.loader import collate
from kdcmae_fast.evaluation import pictures
from kdcmae_fast.evaluation.pictures import draw_clip
from kdcmae_fast.evaluation.views import reconstruct_batch, reconstruct_views
from kdcmae_fast.kernels import complementary_masks, masked_reconstruction_loss
from kdcmae_fast.kernels.tokens import patchify

GRID = (4, 6)


@pytest.fixture
def plan():
    return complementary_masks(torch.arange(3), GRID, 0.75, num_views=2)


@pytest.fixture
def original():
    return torch.randn(3, 3, GRID[0] * 4, GRID[1] * 4)


def png_size(path) -> tuple[int, int]:
    """(width, height) from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_error_is_the_loss_and_a_perfect_guess_is_the_original(original, plan, norm_pix):
    target = patchify(original, 4).repeat(2, 1, 1)
    if norm_pix:
        spread = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        target = (target - target.mean(-1, keepdim=True)) / spread
    options = {"patch_size": 4, "norm_pix": norm_pix}
    perfect = reconstruct_views(original, target, plan, **options)
    torch.testing.assert_close(perfect.reconstructed[1], original)
    assert perfect.error.abs().max() < 1e-10
    guess = torch.randn_like(target)
    views = reconstruct_views(original, guess, plan, **options)
    loss = masked_reconstruction_loss(guess, original, plan, reduction="none", **options)
    torch.testing.assert_close(views.error.flatten(), loss)


def test_given_means_are_those_of_the_removed_patches(original, plan):
    guess = torch.randn(6, 24, 48)
    options = {"patch_size": 4, "mean": 2.0, "std": 3.0}
    views = reconstruct_views(original, guess, plan, norm_pix=True, **options)
    patches = patchify(original * 3 + 2, 4)
    for view in range(2):
        flat = patches.mean(-1, keepdim=True).expand_as(patches)
        expected = torch.where(plan.mask(view)[..., None].bool(), flat, patches)
        torch.testing.assert_close(patchify(views.given[view], 4), expected)
    assert reconstruct_views(original, guess, plan, norm_pix=False, **options).given is None


def test_views_hide_what_their_plan_removes(original, plan):
    views = reconstruct_views(original, torch.zeros(6, 24, 48), plan, patch_size=4, norm_pix=False)
    for view in range(2):
        hidden = patchify(views.masked[view], 4).isnan()
        assert torch.equal(hidden.all(-1), plan.mask(view).bool())
        assert torch.equal(hidden.any(-1), hidden.all(-1))
        filled = patchify(views.reconstructed[view], 4) == 0
        assert torch.equal(filled.all(-1), plan.mask(view).bool())


@pytest.mark.parametrize(
    "overrides",
    [{}, {"norm_pix_loss": False}, {"views": "independent"}, {"num_views": 1, "name": "cav_mae"}],
)
def test_a_model_s_reconstruction_as_a_picture(
    make_model, clips, data, tmp_path, monkeypatch, overrides
):
    model = make_model(**overrides)
    batch = FrontEnd(data, model.config)(collate([clips().read(index, 0) for index in range(2)]))
    frames, fbanks = reconstruct_batch(model, batch)
    num_views = model.config.num_views
    assert frames.reconstructed.shape == (num_views, 2, 3, 32, 32)
    assert fbanks.masked.shape == (num_views, 2, 1, 32, 64)
    torch.testing.assert_close(frames.original, batch.frames / 255)
    drawn = []
    new_figure = pictures.new_figure
    monkeypatch.setattr(
        pictures, "new_figure", lambda *size: drawn.append(new_figure(*size)) or drawn[0]
    )
    path = draw_clip(
        tmp_path / "new" / "clip.png",
        "a clip",
        frames,
        fbanks,
        1,
        rows=60,
        hidden="all but a little",
    )
    width, height = png_size(path)
    assert 800 < width < 1400
    assert 300 * num_views < height < 1600
    assert path.stat().st_size > 10_000
    (figure,) = drawn
    norm_pix = model.config.norm_pix_loss
    lines = 1 + (2 + norm_pix) * num_views
    assert len(figure.axes) == 2 * lines
    caption = figure._supxlabel.get_text()
    assert ("mean and standard deviation" in caption) == norm_pix
    assert caption.startswith("all but a little\n")
    sound = figure.axes[1]
    assert [label.get_text() for label in sound.get_yticklabels()] == ["0.25", "1", "4"]
    (padding,) = sound.patches  # 60 of 64 rows are sound
    assert padding.get_x() == pytest.approx(0.6) and padding.get_width() == pytest.approx(0.04)
    assert f"error {frames.error[0, 1]:.3f}" in figure.axes[2 * (2 + norm_pix)].get_title("right")


def test_drawing_leaves_matplotlib_s_state_alone(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    import sys

    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    from kdcmae_fast.figure import new_figure, save_figure

    save_figure(new_figure(1, 1), tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_missing_matplotlib_is_said(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs Matplotlib; `pip install matplotlib`"):
        draw_clip(tmp_path / "x.png", "", None, None, 0)
