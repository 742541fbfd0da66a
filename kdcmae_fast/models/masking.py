"""The mask plans of a step: K views of both modalities from the settings and the sample ids."""

import random

from torch import Tensor

from kdcmae_fast.config import MULTI_RATIO, ModelConfig
from kdcmae_fast.kernels import MaskPlan, complementary_masks

from .outputs import Plans

MODALITIES = ("audio", "video")


def audio_grid(config: ModelConfig) -> tuple[int, int]:
    """Audio patches (frequency, time); tokens are numbered frequency-major."""
    return config.num_mel_bins // config.patch_size, config.audio_length // config.patch_size


def video_grid(config: ModelConfig) -> tuple[int, int]:
    """Image patches (rows, columns)."""
    side = config.img_size // config.patch_size
    return side, side


def draw_plans(config: ModelConfig, sample_ids: Tensor, step: int) -> Plans:
    """Plans of the model's modalities for clips `sample_ids` (B,) at this step.

    views="complementary": each plan has B rows and K disjoint views (KDC-MAE, arXiv 2411.12270).
    views="independent": K*B rows (view-major) of one view each, drawn independently; view 0 is the
    same as under "complementary".
    """
    settings = {
        "audio": (audio_grid(config), 0, config.audio_mask_mode),
        "video": (video_grid(config), 1, "unstructured"),
    }
    return {
        name: _draw(config, sample_ids, step, *settings[name]) for name in config.modality_names
    }


def _draw(
    config: ModelConfig,
    sample_ids: Tensor,
    step: int,
    grid: tuple[int, int],
    stream: int,
    mode: str,
) -> MaskPlan:
    ratio = removed_share(config, stream, step)
    independent = config.views == "independent"

    def masks(num_views: int, stream: int) -> MaskPlan:
        return complementary_masks(
            sample_ids,
            grid,
            ratio,
            num_views=num_views,
            mode=mode,
            seed=config.mask_seed,
            step=step,
            stream=stream,
        )

    if not independent or config.num_views == 1:
        return masks(config.num_views, stream)
    # Each further view has its own random stream, 2 apart: streams 0 and 1 are the modalities.
    return MaskPlan.cat([masks(1, stream + 2 * view) for view in range(config.num_views)])


def removed_share(config: ModelConfig, stream: int, step: int) -> float:
    """The mask ratio of modality `stream` (0 audio, 1 video) at this step.

    multi_ratio_masking: uniform between 0.6 and 0.9 from (mask_seed, step, stream), so that all
    ranks and micro steps agree on it without a word, and so does a resumed run.
    """
    if config.multi_ratio_masking:
        return random.Random(f"{config.mask_seed}/{step}/{stream}").uniform(*MULTI_RATIO)
    own = (config.audio_mask_ratio, config.video_mask_ratio)[stream]
    return config.mask_ratio if own is None else own


def check_plans(config: ModelConfig, plans: Plans, batch: int, views: int | None = None) -> None:
    """ValueError unless `plans` suit this model and a batch of `batch` clips.

    views: how many views each plan has of its clips (None: as the model trains).
    """
    if sorted(plans) != sorted(config.modality_names):
        names = " and ".join(config.modality_names)
        raise ValueError(f"plans must have the keys {names}, got {sorted(plans)}")
    grids = {"audio": audio_grid(config), "video": video_grid(config)}
    for name in config.modality_names:
        plan, tokens = plans[name], grids[name][0] * grids[name][1]
        if not isinstance(plan, MaskPlan):
            raise ValueError(f"plans[{name!r}] must be a MaskPlan, got {type(plan).__name__}")
        wanted = (config.num_views, batch, tokens)
        if views is not None:
            wanted = (views, batch, tokens)
        elif config.views == "independent":
            wanted = (1, config.num_views * batch, tokens)
        got = (plan.num_views, plan.token_of_rank.shape[0], plan.num_tokens)
        if got != wanted:
            raise ValueError(
                f"plans[{name!r}] has (views, rows, tokens) = {got}, this model needs "
                f"{wanted} for a batch of {batch}"
            )
