"""InfoNCE over all micro-batches of an optimizer step (GradCache, arXiv 2101.06983).

A first pass computes the features of every micro-batch without a graph, InfoNCE over all of them
(and all ranks), and its gradient with respect to each feature. The second pass, the usual one,
feeds those gradients back through each micro-batch's graph: the gradients are those of one batch
as large as the step, for one more forward pass of the encoder and the memory of one micro-batch.

A micro-batches of B clips, K views stacked view-major, D width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcmae_fast.batch import Batch
from kdcmae_fast.models.objectives import contrastive_losses


class RandomState(NamedTuple):
    """Where torch's generators stood, so that dropout falls alike in both passes."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The states of the CPU's generator and of `device`'s."""
        on_cuda = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None)

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class CachedContrast(NamedTuple):
    """InfoNCE of the whole step as one micro-batch sees it; called in InfoNCE's place.

    values: (K,) of the step, the same in every micro-batch. audio_grad, video_grad: (K*B, D), what
    this micro-batch's features get. random_state: at the start of its first pass.
    """

    values: Tensor
    audio_grad: Tensor
    video_grad: Tensor
    random_state: RandomState

    def __call__(self, audio: Tensor, video: Tensor) -> Tensor:
        """Pooled latents, 2 x (K*B, D) -> (K,)."""
        return _FeedBack.apply(audio, video, self.values, self.audio_grad, self.video_grad)


class _FeedBack(torch.autograd.Function):
    """The value computed before; its backward hands out the gradients computed before."""

    @staticmethod
    def forward(
        ctx: Any,
        audio: Tensor,
        video: Tensor,
        values: Tensor,
        audio_grad: Tensor,
        video_grad: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(audio_grad, video_grad)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        audio_grad, video_grad = ctx.saved_tensors
        by_row = grad.repeat_interleave(audio_grad.shape[0] // grad.shape[0])[:, None]
        return by_row * audio_grad, by_row * video_grad, None, None, None


def contrast_over_step(engine: Any, batches: list[Batch], step: int) -> list[CachedContrast]:
    """The first pass: for each of the A micro-batches, what stands in for InfoNCE in the second.

    Each stand-in has the value of InfoNCE over the step and A times its gradient: the engine
    divides the loss of every micro-batch by A.
    """
    model = engine.module
    states: list[RandomState] = []
    features: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        states.append(RandomState.now(batch.fbank.device))
        with torch.no_grad():
            features.append(engine(batch, step=step, features_only=True))
    views = model.config.num_views
    leaves = [
        torch.cat([part.unflatten(0, (views, -1)) for part in parts], dim=1).requires_grad_()
        for parts in zip(*features, strict=True)
    ]  # audio and video, (K, A*B, D)
    audio, video = (leaf.flatten(0, 1) for leaf in leaves)
    values = contrastive_losses(model.config, audio, video, model.contrast_group)
    grads = torch.autograd.grad(values.sum(), leaves)
    shares = [
        [part.flatten(0, 1) * len(batches) for part in g.chunk(len(batches), 1)] for g in grads
    ]
    return [
        CachedContrast(values.detach(), audio_grad, video_grad, state)
        for audio_grad, video_grad, state in zip(*shares, states, strict=True)
    ]
