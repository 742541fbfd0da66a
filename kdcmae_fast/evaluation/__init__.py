"""What a trained model is worth: features, retrieval, reconstruction pictures, loss curves."""

from kdcmae_fast.evaluation.features import ClipFeatures, extract_features
from kdcmae_fast.evaluation.folds import Fold
from kdcmae_fast.evaluation.hiding import Hiding, hide_patches
from kdcmae_fast.evaluation.inpainting import inpaint
from kdcmae_fast.evaluation.pictures import draw_clip
from kdcmae_fast.evaluation.plots import plot_losses
from kdcmae_fast.evaluation.probe_classifiers import ProbeResult, fit_probe
from kdcmae_fast.evaluation.probing import probe, probe_features
from kdcmae_fast.evaluation.ranking import RetrievalScores, retrieval_scores
from kdcmae_fast.evaluation.reconstruction import reconstruct
from kdcmae_fast.evaluation.retrieval import retrieve
from kdcmae_fast.evaluation.sound_inversion import fbank_to_waveform
from kdcmae_fast.evaluation.source import EvaluationSource
from kdcmae_fast.evaluation.views import reconstruct_batch

__all__ = [
    "ClipFeatures",
    "EvaluationSource",
    "Fold",
    "Hiding",
    "ProbeResult",
    "RetrievalScores",
    "draw_clip",
    "extract_features",
    "fbank_to_waveform",
    "fit_probe",
    "hide_patches",
    "inpaint",
    "plot_losses",
    "probe",
    "probe_features",
    "reconstruct",
    "reconstruct_batch",
    "retrieval_scores",
    "retrieve",
]
