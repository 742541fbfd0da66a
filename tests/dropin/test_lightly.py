"""Index helpers and a masked autoencoder in the manner of the package lightly, on our ops.

Each test runs with lightly's own helpers where the package imports, and with stand-ins of the same
names, arguments and results (as its documentation describes them) everywhere.
"""

import types

import bench_peers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import unavailable
from kdcmae_fast.kernels.tokens import patchify

PATCH, GRID, WIDTH, DECODER_WIDTH = 4, (5, 5), 24, 16
TOKENS = GRID[0] * GRID[1]
VALUES = 3 * PATCH * PATCH
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class StandIn:
    """lightly.models.utils, as far as its masked autoencoder uses it."""

    @staticmethod
    def random_token_mask(size, mask_ratio=0.6, mask_class_token=False, device=None):
        """(ids kept, ids masked) of (batch, length); token 0 is kept if it is the class token."""
        batch, length = size
        keep = int((length - (not mask_class_token)) * (1 - mask_ratio))
        noise = torch.rand(batch, length, device=device)
        if not mask_class_token:
            noise[:, 0] = -1
            keep = max(1, keep + 1)
        order = noise.argsort(dim=1)
        return order[:, :keep], order[:, keep:]

    @staticmethod
    def get_at_index(tokens: Tensor, index: Tensor) -> Tensor:
        return tokens.take_along_dim(index.unsqueeze(-1), dim=1)

    @staticmethod
    def set_at_index(tokens: Tensor, index: Tensor, value: Tensor) -> Tensor:
        rows = torch.arange(len(tokens)).unsqueeze(1)
        return tokens.index_put((rows, index), value)

    @staticmethod
    def mask_at_index(tokens: Tensor, index: Tensor, mask_token: Tensor) -> Tensor:
        masked = torch.zeros(tokens.shape[:2], dtype=torch.bool).scatter(1, index, True)
        return torch.where(masked.unsqueeze(-1), mask_token, tokens)

    @staticmethod
    def repeat_token(token: Tensor, size: tuple[int, int]) -> Tensor:
        return token.repeat(*size, 1)

    @staticmethod
    def patchify(images: Tensor, patch_size: int) -> Tensor:
        cut = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


@pytest.fixture(params=("package", "stand-in"))
def utils(request) -> types.ModuleType | type:
    return bench_peers.lightly_utils() if request.param == "package" else StandIn


@pytest.fixture(params=("torch", "cpp"))
def impl(request) -> str:
    problem = unavailable("gather_tokens", request.param, "cpu")
    if problem:
        pytest.skip(problem)
    return request.param


def same_masks(utils, batch: int, mask_ratio: float, impl: str):
    """lightly's (idx_keep, idx_mask) with a class token, and the plan of the same numbers."""
    torch.manual_seed(7)
    indices = utils.random_token_mask((batch, 1 + TOKENS), mask_ratio)
    torch.manual_seed(7)
    noise = torch.rand(batch, 1 + TOKENS)[:, 1:]
    plan = kernels.complementary_masks(
        torch.arange(batch), GRID, mask_ratio, num_views=1, noise=noise, impl=impl
    )
    return indices, plan


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours: Tensor, theirs: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Equal values, and equal gradients along one random direction."""
    torch.testing.assert_close(ours, theirs, **CLOSE)
    direction = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(x, leaves, direction) for x in (ours, theirs)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("mask_ratio", (0.75, 0.6, 0.5))
def test_random_token_mask(utils, impl, mask_ratio):
    (idx_keep, idx_mask), plan = same_masks(utils, 5, mask_ratio, impl)
    assert torch.equal(idx_keep[:, 1:] - 1, plan.ids_keep(0))
    assert torch.equal(idx_mask - 1, plan.ids_masked(0))
    assert (idx_keep[:, 0] == 0).all()


def test_get_at_index(utils, impl):
    (idx_keep, _), plan = same_masks(utils, 5, 0.75, impl)
    x = double(5, 1 + TOKENS, WIDTH)
    ours = torch.cat([x[:, :1], kernels.gather_tokens(x[:, 1:], plan, impl=impl)], dim=1)
    assert_same(ours, utils.get_at_index(x, idx_keep), (x,))


def test_set_at_index(utils, impl):
    (idx_keep, _), plan = same_masks(utils, 5, 0.75, impl)
    x, mask_token, pos = double(5, plan.len_keep, WIDTH), double(1, 1, WIDTH), double(TOKENS, WIDTH)
    filler = utils.repeat_token(mask_token, (5, TOKENS))
    theirs = utils.set_at_index(filler, idx_keep[:, 1:] - 1, x) + pos
    ours = kernels.assemble_decoder_input(x, [plan], mask_token, pos, impl=impl)
    assert_same(ours, theirs, (x, mask_token, pos))


def test_mask_at_index(utils, impl):
    (_, idx_mask), plan = same_masks(utils, 5, 0.75, impl)
    x, mask_token = double(5, TOKENS, WIDTH), double(1, 1, WIDTH)
    theirs = utils.mask_at_index(x, idx_mask - 1, mask_token)
    visible = kernels.gather_tokens(x, plan, impl=impl)
    pos = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    ours = kernels.assemble_decoder_input(visible, [plan], mask_token, pos, impl=impl)
    assert_same(ours, theirs, (x, mask_token))


def test_patchify(utils):
    images = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    assert torch.equal(patchify(images, PATCH), utils.patchify(images, PATCH))


class LightlyMae(nn.Module):
    """The package's masked autoencoder example, at toy size: images -> loss."""

    def __init__(self, utils) -> None:
        super().__init__()
        self.utils = utils
        self.embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, 1 + TOKENS, WIDTH))
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.decoder_embed = nn.Linear(WIDTH, DECODER_WIDTH)
        self.mask_token = nn.Parameter(torch.randn(1, 1, DECODER_WIDTH))
        self.decoder_pos = nn.Parameter(torch.randn(1, 1 + TOKENS, DECODER_WIDTH))
        self.decoder = nn.TransformerEncoderLayer(
            DECODER_WIDTH, 2, 32, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(DECODER_WIDTH, VALUES)

    def plain(self, images: Tensor, idx_keep: Tensor, idx_mask: Tensor) -> Tensor:
        batch, utils = len(images), self.utils
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(batch, -1, -1), patches], dim=1) + self.pos
        x = self.decoder_embed(self.encoder(utils.get_at_index(tokens, idx_keep)))
        filler = utils.repeat_token(self.mask_token, (batch, 1 + TOKENS))
        x = self.decoder(utils.set_at_index(filler, idx_keep, x) + self.decoder_pos)
        pred = self.head(utils.get_at_index(x, idx_mask))
        target = utils.get_at_index(utils.patchify(images, PATCH), idx_mask - 1)
        return F.mse_loss(pred, target)

    def on_our_ops(self, images: Tensor, plan: kernels.MaskPlan, impl: str) -> Tensor:
        patches = kernels.embed_visible_patches(
            images, self.embed.weight, self.embed.bias, self.pos[:, 1:], plan,
            patch_size=PATCH, impl=impl,
        )  # fmt: skip
        first = (self.class_token + self.pos[:, :1]).expand(len(images), -1, -1)
        x = self.decoder_embed(self.encoder(torch.cat([first, patches], dim=1)))
        tokens = kernels.assemble_decoder_input(
            x[:, 1:], [plan], self.mask_token, self.decoder_pos[:, 1:], impl=impl
        )
        x = self.decoder(torch.cat([x[:, :1] + self.decoder_pos[:, :1], tokens], dim=1))
        return kernels.masked_reconstruction_loss(
            self.head(x[:, 1:]), images, plan, patch_size=PATCH, norm_pix=False, impl=impl
        )


def test_a_whole_model(utils, impl):
    indices, plan = same_masks(utils, 5, 0.75, impl)
    model = LightlyMae(utils).double()
    images = torch.randn(5, 3, 20, 20, dtype=torch.float64)
    theirs, ours = model.plain(images, *indices), model.on_our_ops(images, plan, impl)
    assert_same(ours, theirs, tuple(model.parameters()))
