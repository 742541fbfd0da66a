"""The terms of the objective as functions of latents and predictions, and their weighting.

B clips, K views stacked view-major (row k*B + b), D width.
"""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kdcmae_fast.config import DistillConfig, ModelConfig
from kdcmae_fast.kernels import distillation_loss, info_nce

from .clip_contrast import clip_info_nce
from .outputs import Latents, Losses, Terms

Contrast = Callable[[Tensor, Tensor], Tensor]  # `contrast_features`, 2 x (K*B, D) -> (K,)


def pool(tokens: Tensor) -> Tensor:
    """Mean over the tokens: (N, L, D) -> (N, D), summed and returned in fp32 or better."""
    return tokens.mean(dim=1, dtype=pool_dtype(tokens))


def pool_dtype(tokens: Tensor) -> torch.dtype:
    """The tokens' dtype, at least fp32."""
    return torch.promote_types(tokens.dtype, torch.float32)


def summaries(latents: Latents) -> dict[str, Tensor]:
    """What stands for each pass that was made, (K*B, D) each: CLS, or the mean over its tokens."""
    return {
        stream: pool(tokens) if cls is None else cls.to(pool_dtype(cls))
        for stream, tokens, cls in (
            ("joint", latents.joint, None),
            ("audio", latents.audio, latents.audio_cls),
            ("video", latents.video, latents.video_cls),
        )
        if tokens is not None
    }


def contrast_features(config: ModelConfig, latents: Latents) -> tuple[Tensor, Tensor]:
    """What InfoNCE compares, audio and video: (K*B, D), or with `global_local` (K*B, 2D): CLS
    beside the mean over the patch tokens."""
    found = summaries(latents)
    audio, video = found["audio"], found["video"]
    if config.global_local:
        assert latents.audio is not None and latents.video is not None  # summaries had both
        audio = torch.cat([audio, pool(latents.audio)], dim=1)
        video = torch.cat([video, pool(latents.video)], dim=1)
    return audio, video


def contrastive_losses(
    config: ModelConfig, audio: Tensor, video: Tensor, group: ProcessGroup | None
) -> Tensor:
    """InfoNCE between the `contrast_features` of each view's clips: 2 x (K*B, D) -> (K,)."""
    group = group if config.negatives == "global" else None

    def loss(a: Tensor, v: Tensor) -> Tensor:
        tau, symmetric = config.temperature, config.symmetric
        if config.frames_per_clip == 1 or config.within_clip == "negatives":
            return info_nce(a, v, temperature=tau, symmetric=symmetric, group=group)
        clips = (config.frames_per_clip, config.within_clip)
        return clip_info_nce(a, v, *clips, temperature=tau, symmetric=symmetric, group=group)

    halves = 2 if config.global_local else 1  # each half is compared on its own
    views = zip(audio.chunk(config.num_views), video.chunk(config.num_views), strict=True)
    return torch.stack(
        [
            torch.stack(
                [loss(*pair) for pair in zip(a.chunk(halves, 1), v.chunk(halves, 1), strict=True)]
            ).mean()
            for a, v in views
        ]
    )


def distillation(distill: DistillConfig, num_views: int, pooled: list[Tensor]) -> Tensor:
    """Divergence between the views (KDC-MAE, arXiv 2411.12270), a () mean over the batch.

    pooled: one (K*B, D) per stream (joint; also audio and video with on="joint+modality"); the
    streams' terms are added. With more than two views it is the mean over all pairs.
    "batch_shift" takes its minimum over the clips of this call, that is of this rank.
    """
    terms = []
    for stream in pooled:
        pairs = list(combinations(stream.chunk(num_views), 2))
        values = [
            distillation_loss(
                first,
                second,
                divergence=distill.divergence,
                distribution=distill.distribution,
                temperature=distill.temperature,
                stop_gradient=distill.stop_gradient,
            )
            for first, second in pairs
        ]
        terms.append(torch.stack(values).mean())
    return torch.stack(terms).sum()


class FixedWeights(nn.Module):
    """total = sum of weight * term."""

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, terms: dict[str, Tensor]) -> Tensor:
        """Named () terms -> () total."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()


class UncertaintyWeights(nn.Module):
    """total = sum of exp(-s) * weight * term + s with a learned s per term (Kendall et al. 2018).

    Every term of the objective has its own s: mae_audio, mae_video, contrastive, kd (those it
    has), each after summing over the views. s starts at 0, so that training starts from the fixed
    weighting; at its optimum a term's own weight has cancelled out.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        self.weights = weights
        self.log_variance = nn.Parameter(torch.zeros(len(weights)))

    def forward(self, terms: dict[str, Tensor]) -> Tensor:
        """Named () terms -> () total."""
        values = torch.stack([self.weights[name] * terms[name] for name in self.weights])
        log_variance = self.log_variance.to(values.dtype)
        return ((-log_variance).exp() * values + log_variance).sum()


class Objective(nn.Module):
    """All terms a configuration asks for. A term whose weight is 0 is not computed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        both = config.modalities == "both"
        weights = {
            **{f"mae_{name}": config.mae_loss_weight for name in config.modality_names},
            "contrastive": config.contrast_loss_weight if both else 0.0,
            "kd": config.kd_loss_weight if config.distill.on != "off" else 0.0,
        }
        weights = {name: weight for name, weight in weights.items() if weight}
        if not weights:
            raise ValueError(
                "mae_loss_weight=0 and contrast_loss_weight=0 without distillation: "
                "the objective is empty; give one of them a weight"
            )
        self.terms = frozenset(weights)
        uncertain = config.loss_weighting == "uncertainty"
        self.weighting = UncertaintyWeights(weights) if uncertain else FixedWeights(weights)

    @property
    def streams(self) -> tuple[str, ...]:
        """The passes of the shared blocks that the terms read; of one modality its own."""
        if self.config.modalities != "both":
            return self.config.modality_names
        modality = self.config.distill.on == "joint+modality" and "kd" in self.terms
        joint = "mae_audio" in self.terms or "kd" in self.terms
        split = "contrastive" in self.terms or modality
        return (("joint",) if joint else ()) + (("audio", "video") if split else ())

    def forward(
        self,
        latents: Latents,
        errors: tuple[Tensor, ...] | None,
        group: ProcessGroup | None = None,
        contrast: Contrast | None = None,
    ) -> Losses:
        """Latents and, with a mae term, the decoder's errors of each modality and row -> losses.

        contrast: takes the place of InfoNCE over these clips.
        """
        config = self.config
        views: dict[str, Tensor] = {}
        if errors is not None:
            for name, rows in zip(config.modality_names, errors, strict=True):
                views[f"mae_{name}"] = rows.view(config.num_views, -1).mean(dim=1)
        if "contrastive" in self.terms:
            audio, video = contrast_features(config, latents)
            views["contrastive"] = (
                contrast(audio, video)
                if contrast is not None
                else contrastive_losses(config, audio, video, group)
            )
        terms = {name: values.sum() for name, values in views.items()}
        if "kd" in self.terms:
            pooled = summaries(latents)
            joint_only = config.distill.on == "joint" and config.modalities == "both"
            streams = [pooled["joint"]] if joint_only else list(pooled.values())
            terms["kd"] = distillation(config.distill, config.num_views, streams)
        per_view = tuple(
            Terms({name: values[k] for name, values in views.items()})
            for k in range(config.num_views)
        )
        return Losses({"total": self.weighting(terms)} | terms, per_view)
