"""Which pixels of a frame its sound is recognised by.

Integrated gradients (Sundararajan et al., arXiv 1703.01365) of the similarity of frame and sound,
as the model was trained to compute it, from two kinds of starting points:

* other clips' frames (expected gradients, Erion et al., arXiv 1906.10670): what tells this clip
  from others;
* the frame itself, blurred (after blur integrated gradients, Xu et al., arXiv 2004.03383, on
  straight lines): what of it is an object with edges and a surface.

The first alone spreads over everything that differs between clips, the background too; the second
alone needs a model that knows surfaces. B frames, H W pixels, D width, K references.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.evaluation.localization_maps import blur, normalized, unit

if TYPE_CHECKING:
    from kdcmae_fast.models.cav_mae import CavMae

BLURS = (1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of the blurred starting points, in sides of the picture
GRAIN = 0.25  # standard deviation of the blur before what speaks against is cut off, in patches
SMOOTHING = 0.75  # and of the one after it, in patches
_GOLDEN = 0.618033988749895  # its multiples, less their whole part, fill 0..1 evenly


class References(NamedTuple):
    """Other clips' frames, that an attribution starts from.

    frames: (K, 3, H, W) normalised. sounds: (K, D) vectors of the same clips. indices: (K,) int64,
    their numbers in the dataset: a clip is never its own reference.
    """

    frames: Tensor
    sounds: Tensor
    indices: Tensor


def attribution_maps(
    model: "CavMae",
    frames: Tensor,
    sounds: Tensor,
    references: References,
    *,
    indices: Tensor | None = None,
) -> Tensor:
    """Evidence in each pixel that a frame and a sound belong together, (S, B, H, W), 0 or more.

    The two attributions (from the references; from as many blurred copies of the frame) are scaled
    to the same root mean square and added; where a quarter of a patch around a pixel speaks against
    the sound, there is 0; the rest is blurred by three quarters of a patch.

    frames: (B, 3, H, W), normalised or uint8. sounds: (S, B, D), S sounds to explain each frame by;
    they share the forward passes. indices: (B,) numbers of the clips, to leave out a clip's own
    frame among the references (None: keep all). Costs 2 K forward and 2 K S backward passes.
    """
    frames = normalized(model, frames)
    others = path_attribution(model, frames, sounds, _others(frames, references, indices))
    itself = path_attribution(
        model, frames, sounds, _blurred(frames, copies=len(references.frames))
    )
    patch = model.config.patch_size
    evidence = blur(_same_scale(others) + _same_scale(itself), GRAIN * patch).clamp(min=0)
    return blur(evidence, SMOOTHING * patch)


def path_attribution(
    model: "CavMae",
    frames: Tensor,
    sounds: Tensor,
    starts: Iterable[tuple[Tensor, Tensor]],
) -> Tensor:
    """What each pixel adds to the similarity of frames with sounds, (S, B, H, W).

    Mean over the starting points r of (frame - r) times the gradient of cos(video, sound) at a
    point between r and the frame, summed over the colours: a map's pixels add up to about the
    similarity less that of the starting points.

    frames: (B, 3, H, W) normalised. sounds: (S, B, D). starts: pairs of starting points, (3, H, W)
    or (B, 3, H, W), and their weights, (B,).
    """
    sounds = unit(sounds)
    total = frames.new_zeros(len(sounds), *frames[:, 0].shape)
    count = frames.new_zeros(len(frames))
    for k, (start, weight) in enumerate(starts):
        share = (k + 0.5) * _GOLDEN % 1.0
        way = frames - start
        point = (start + share * way).requires_grad_()
        with torch.enable_grad():
            video = model.encode(frames=point).video
            assert video is not None  # frames were given
            scores = [(unit(video) * sound).sum() for sound in sounds]
            gradients = [torch.autograd.grad(s, point, retain_graph=True)[0] for s in scores]
        total += weight[:, None, None] * (torch.stack(gradients) * way).sum(2)
        count += weight
    return total / count.clamp(min=1)[:, None, None]


def _others(
    frames: Tensor, references: References, indices: Tensor | None
) -> Iterable[tuple[Tensor, Tensor]]:
    for frame, number in zip(references.frames, references.indices, strict=True):
        used = frames.new_ones(len(frames))
        if indices is not None:
            used = (indices.to(number.device) != number).to(used)
        yield frame, used


def _blurred(frames: Tensor, copies: int) -> Iterable[tuple[Tensor, Tensor]]:
    side = frames.shape[-1]
    blurred = [blur(frames, share * side) for share in BLURS[:copies]]
    for k in range(copies):
        yield blurred[k % len(blurred)], frames.new_ones(len(frames))


def _same_scale(maps: Tensor) -> Tensor:
    """Each (.., H, W) map divided by its root mean square; one of zeros stays as it is."""
    size = maps.square().mean((-2, -1), keepdim=True).sqrt()
    return maps / size.clamp(min=torch.finfo(maps.dtype).tiny)
