"""What an inpainted clip sounds like: WAVE files of its original and of its views."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.data.clip import FRAME_LENGTH, FRAME_SHIFT
from kdcmae_fast.evaluation.sound_inversion import fbank_to_waveform, write_wav
from kdcmae_fast.evaluation.views import Views

GIVEN_LOUDNESS = " (each patch's true loudness given)"


class SoundFile(NamedTuple):
    """A file's name and what one hears."""

    file: str
    title: str


def write_sounds(
    folder: str | Path,
    stem: str,
    fbanks: Views,
    clip: int,
    waveform: Tensor,
    *,
    rows: int,
    norm_pix: bool,
) -> list[SoundFile]:
    """<stem>_original.wav, _original_inverted.wav, and each view's _masked and _reconstructed.wav.

    fbanks: of a batch, log-mel as `kaldi_fbank` has it. clip: its row there, with `rows` rows of
    sound. waveform: (N,) the true sound. norm_pix: the reconstruction was given patch statistics.
    With several views theirs are <stem>_view1_masked.wav and so on. The inverted original tells
    what a reconstruction loses by the inversion alone. Masked patches are silent in _masked.wav.
    """
    views = len(fbanks.masked)
    stacked = [fbanks.original[clip], *fbanks.masked[:, clip], *fbanks.reconstructed[:, clip]]
    log_mel = torch.stack([picture[0, :, :rows].mT for picture in stacked])
    inverted = fbank_to_waveform(log_mel)
    sounds = [
        ("original", "original", waveform[: FRAME_LENGTH + (rows - 1) * FRAME_SHIFT]),
        ("original_inverted", "original, from its own spectrogram", inverted[0]),
    ]
    given = GIVEN_LOUDNESS if norm_pix else ""
    for view in range(views):
        name, title = (f"view{view + 1}_", f"view {view + 1}, ") if views > 1 else ("", "")
        sounds += [
            (f"{name}masked", f"{title}what the model heard", inverted[1 + view]),
            (f"{name}reconstructed", f"{title}reconstructed{given}", inverted[1 + views + view]),
        ]
    files = []
    for name, title, sound in sounds:
        path = write_wav(Path(folder) / f"{stem}_{name}.wav", sound)
        files.append(SoundFile(path.name, title))
    return files
