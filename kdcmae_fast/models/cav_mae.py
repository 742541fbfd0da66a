"""CAV-MAE (arXiv 2210.07839) and, with two or more views, KDC-MAE (arXiv 2411.12270).

With `modalities` audio or video a masked autoencoder of that one, distillation included.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from kdcmae_fast.batch import Batch
from kdcmae_fast.config import ModelConfig
from kdcmae_fast.kernels import MaskPlan

from .decoder import Decoder
from .encoder import Encoder
from .init import init_weights
from .masking import check_plans, draw_plans
from .objectives import Contrast, Objective, contrast_features, summaries
from .outputs import Features, Latents, Losses, Plans, Reconstruction
from .pretrained import PretrainedModel


class CavMae(PretrainedModel):
    """Audio-visual masked autoencoder with a contrastive term and self-distillation of views.

    config: sizes, masking and objective. name: the system it is saved under.

    contrast_group: ranks whose clips are negatives of each other with `negatives="global"`; None
    (default) means this process alone. The training engine sets it.
    """

    encode_chain = "composed"  # of the shared blocks in `encode`, where the released code composes

    def __init__(self, config: ModelConfig, *, name: str = "cav_mae") -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.contrast_group: ProcessGroup | None = None
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.objective = Objective(config)
        init_weights(self)

    def forward(
        self,
        batch: Batch,
        plans: Plans | None = None,
        step: int = 0,
        *,
        contrast: Contrast | None = None,
        features_only: bool = False,
    ) -> Losses | tuple[Tensor, Tensor]:
        """Losses of one step.

        batch: B clips. plans: {"audio": MaskPlan, "video": MaskPlan} instead of the model's own,
        which follow from `mask_seed`, `step` and the sample ids. contrast: takes the place of
        InfoNCE over these clips. features_only: return what InfoNCE compares instead, audio and
        video, (K*B, D) each.

        Errors: ValueError for plans or ids that do not suit the batch, and for losses of no clips.
        """
        if self._clips(batch) == 0 and not features_only:
            raise ValueError("batch has 0 clips: the losses are means over clips; give at least 1")
        plans = self._plans(batch, plans, step)
        batch = self._rows(batch)
        if features_only:
            latents = self.encoder(batch.fbank, batch.frames, plans, ("audio", "video"))
            return contrast_features(self.config, latents)
        latents = self.encoder(batch.fbank, batch.frames, plans, self.objective.streams)
        errors = None
        if self.config.mae_loss_weight:
            errors = self.decoder(self._decoded(latents), plans, batch=batch)
        return self.objective(latents, errors, self.contrast_group, contrast)

    def encode(self, fbank: Tensor | None = None, frames: Tensor | None = None) -> Features:
        """Unmasked features of one or both modalities.

        fbank: (B, T, F) normalised. frames: (B, 3, H, W) uint8, or floats already normalised.
        """
        if fbank is None and frames is None:
            raise ValueError("fbank and frames are both None: give at least one of them")
        for name, value in (("audio", fbank), ("video", frames)):
            if value is not None:
                self.require(name)
                if value.shape[-1] == 0:
                    raise ValueError(f"this needs {name}, and these clips have none")
        latents = self.encoder.encode(fbank, frames, self.encode_chain)
        found = summaries(latents)
        return Features(found.get("audio"), found.get("video"), latents.audio, latents.video)

    def reconstruct(
        self, batch: Batch, plans: Plans | None = None, step: int = 0
    ) -> Reconstruction:
        """Predicted patches of all tokens under each view's mask; arguments as in `forward`.

        plans: of as many rows as there are clips they may have any number of views, whatever the
        model trains with, and keep none or all of a modality's tokens.
        A modality that the model does not have has no patches, (K*B, 0, P).
        """
        clips = self._clips(batch)
        first = (plans or {}).get(self.config.modality_names[0])
        if plans and isinstance(first, MaskPlan) and len(first.token_of_rank) == clips:
            check_plans(self.config, plans, clips, first.num_views)
        else:
            plans = self._plans(batch, plans, step)
            batch = self._rows(batch)
        streams = ("joint",) if self.config.modalities == "both" else self.config.modality_names
        latents = self.encoder(batch.fbank, batch.frames, plans, streams)
        audio, video = self.decoder(self._decoded(latents), plans, masked_only=False)
        return Reconstruction(audio, video, plans)

    def _plans(self, batch: Batch, plans: Plans | None, step: int) -> Plans:
        clips = self._clips(batch)
        if self.config.modalities == "both" and batch.frames.shape[0] != clips:
            raise ValueError(f"frames has {batch.frames.shape[0]} clips, fbank has {clips}")
        if plans is None:
            if tuple(batch.sample_ids.shape) != (clips,):
                shape = tuple(batch.sample_ids.shape)
                raise ValueError(f"sample_ids must be (B,) = ({clips},), got {shape}")
            return draw_plans(self.config, batch.sample_ids, step)
        check_plans(self.config, plans, clips)
        return plans

    def _rows(self, batch: Batch) -> Batch:
        """The clips as the plans' rows: independent views are rows of their own."""
        views = self.config.num_views
        if self.config.views == "complementary" or views == 1:
            return batch
        fbank, frames, sample_ids = batch
        if "audio" in self.config.modality_names:
            fbank = fbank.repeat(views, 1, 1)
        if "video" in self.config.modality_names:
            frames = frames.repeat(views, 1, 1, 1)
        return Batch(fbank, frames, sample_ids.repeat(views))

    def require(self, *modalities: str) -> None:
        """ValueError unless the model has all of these, "audio" and "video"."""
        for name in modalities:
            if name not in self.config.modality_names:
                kind = self.config.modalities
                raise ValueError(
                    f"this needs {name}, and the model has none: it was pretrained on {kind} alone "
                    f"(model.modalities={kind})"
                )

    def _clips(self, batch: Batch) -> int:
        return (batch.frames if self.config.modalities == "video" else batch.fbank).shape[0]

    def _decoded(self, latents: Latents) -> Tensor:
        """The tokens that the decoder starts from."""
        both = self.config.modalities == "both"
        tokens = latents.joint if both else getattr(latents, self.config.modalities)
        assert tokens is not None  # the objective asked for that pass
        return tokens
