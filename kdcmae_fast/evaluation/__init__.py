"""What a trained model is worth: features, retrieval, reconstruction pictures, loss curves."""

from kdcmae_fast.data.datasets.boxes import ClipBoxes
from kdcmae_fast.evaluation.attribution import attribution_maps
from kdcmae_fast.evaluation.classification import ClassifySource, classify
from kdcmae_fast.evaluation.export import export_features
from kdcmae_fast.evaluation.feature_files import load_features, save_features
from kdcmae_fast.evaluation.features import (
    ClipFeatures,
    extract_features,
    extract_frame_features,
)
from kdcmae_fast.evaluation.folds import Fold
from kdcmae_fast.evaluation.hiding import Hiding, hide_patches
from kdcmae_fast.evaluation.inpainting import inpaint
from kdcmae_fast.evaluation.localization import localize
from kdcmae_fast.evaluation.localization_maps import similarity_maps
from kdcmae_fast.evaluation.localization_scores import ciou_auc
from kdcmae_fast.evaluation.localization_settings import LocalizationSettings
from kdcmae_fast.evaluation.offset import OffsetScore, best_offset, best_offsets
from kdcmae_fast.evaluation.pictures import draw_clip
from kdcmae_fast.evaluation.plots import plot_losses
from kdcmae_fast.evaluation.probe_classifiers import ProbeResult, fit_probe
from kdcmae_fast.evaluation.probing import probe, probe_features
from kdcmae_fast.evaluation.ranking import RetrievalScores, retrieval_scores
from kdcmae_fast.evaluation.reconstruction import reconstruct
from kdcmae_fast.evaluation.retrieval import retrieve
from kdcmae_fast.evaluation.score import Stretch, score_videos
from kdcmae_fast.evaluation.scoring import ClipScore, score_clip
from kdcmae_fast.evaluation.sound_inversion import fbank_to_waveform
from kdcmae_fast.evaluation.source import EvaluationSource
from kdcmae_fast.evaluation.views import reconstruct_batch
from kdcmae_fast.evaluation.weight_average import average_weights

__all__ = [
    "ClassifySource",
    "ClipBoxes",
    "ClipFeatures",
    "ClipScore",
    "EvaluationSource",
    "Fold",
    "Hiding",
    "LocalizationSettings",
    "OffsetScore",
    "ProbeResult",
    "RetrievalScores",
    "Stretch",
    "attribution_maps",
    "average_weights",
    "best_offset",
    "best_offsets",
    "ciou_auc",
    "classify",
    "draw_clip",
    "export_features",
    "extract_features",
    "extract_frame_features",
    "fbank_to_waveform",
    "fit_probe",
    "hide_patches",
    "inpaint",
    "load_features",
    "localize",
    "plot_losses",
    "probe",
    "probe_features",
    "reconstruct",
    "reconstruct_batch",
    "retrieval_scores",
    "retrieve",
    "save_features",
    "score_clip",
    "score_videos",
    "similarity_maps",
]
