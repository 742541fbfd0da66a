"""CAV-MAE Sync (arXiv 2505.01237): a frame and the sound around it, as one pair."""

from kdcmae_fast.config import ModelConfig

from .cav_mae import CavMae


class CavMaeSync(CavMae):
    """CAV-MAE on segments of sound, with a CLS and register tokens per modality.

    A clip has T frames and T segments of `audio_length` fbank rows (`data.segments`); a row of a
    batch is one frame and its segment. The CLS tokens meet in InfoNCE and stay out of the joint
    pass, which the reconstruction starts from; registers end before the shared blocks, or with
    `keep_registers` behind their single-modality passes. Everything else is `CavMae`'s.

    With `frames_per_clip` n > 1 a batch has n rows of each clip, side by side; sample ids that
    differ give them masks of their own. `within_clip` says what they are to each other in InfoNCE.

    `encode(...).audio` and `.video` are the CLS tokens, `.audio_tokens` and `.video_tokens` those
    of the patches.
    """

    def __init__(self, config: ModelConfig, *, name: str = "cav_mae_sync") -> None:
        super().__init__(config, name=name)
        # The published inference restarts a deeper joint stack as its pretraining does.
        self.encode_chain = config.shared_chain
