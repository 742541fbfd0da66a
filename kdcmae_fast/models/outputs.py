"""What the models return. B clips, K views stacked view-major (row k*B + b), D width."""

from typing import NamedTuple

from torch import Tensor

from kdcmae_fast.kernels import MaskPlan

Plans = dict[str, MaskPlan]  # "audio", "video": those that the model has


class Terms(dict[str, Tensor]):
    """Named scalars on the device, read as attributes or items; absent names raise."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            names = ", ".join(self)
            raise AttributeError(f"there is no term {name!r} here; there are: {names}") from None

    def named(self) -> dict[str, Tensor]:
        """The scalars by name, `total` among them where there is one."""
        return dict(self)


class Losses(Terms):
    """The losses of one step: () scalars on the device.

    total: weighted sum, what `backward` starts from.
    mae_audio, mae_video, contrastive: unweighted, each summed over the K views.
    kd: unweighted distillation between the views, mean over the batch.
    per_view: for each view its own mae_audio, mae_video and contrastive.

    A term the objective does not have (no distillation, a weight of zero) is absent, not zero.
    A dict subclass, so that engines that look for tensors in a model's output find them.
    """

    def __init__(self, terms: dict[str, Tensor], per_view: tuple[Terms, ...] = ()) -> None:
        super().__init__(terms)
        self.per_view = per_view


class Latents(NamedTuple):
    """Normalised tokens behind the shared blocks; None for a pass the objective does not need.

    joint: (K*B, keep_audio + keep_video, D), audio tokens first.
    audio: (K*B, keep_audio, D). video: (K*B, keep_video, D).
    audio_cls, video_cls: (K*B, D), the CLS token of those passes where the model has one.
    """

    joint: Tensor | None
    audio: Tensor | None
    video: Tensor | None
    audio_cls: Tensor | None = None
    video_cls: Tensor | None = None


class Features(NamedTuple):
    """Unmasked features; None for a modality that was not given.

    audio, video: (B, D) the CLS token, or without one the mean over the tokens; not normalised,
        at least fp32.
    audio_tokens: (B, L_audio, D). video_tokens: (B, L_video, D).
    """

    audio: Tensor | None
    video: Tensor | None
    audio_tokens: Tensor | None
    video_tokens: Tensor | None


class Reconstruction(NamedTuple):
    """Predicted patches of all tokens, visible ones too, and the masks they were made under.

    audio: (K*B, L_audio, p*p), values ordered (mel offset, time offset).
    video: (K*B, L_video, p*p*3), values ordered (y, x, channel).
    With `norm_pix_loss` the values are in units of each patch's own mean and deviation.
    """

    audio: Tensor
    video: Tensor
    plans: Plans
