"""What a trained model is worth: features, retrieval, reconstruction pictures, loss curves."""

from kdcmae_fast.evaluation.features import ClipFeatures, extract_features
from kdcmae_fast.evaluation.pictures import draw_clip, reconstruct_batch
from kdcmae_fast.evaluation.plots import plot_losses
from kdcmae_fast.evaluation.ranking import RetrievalScores, retrieval_scores
from kdcmae_fast.evaluation.reconstruction import reconstruct
from kdcmae_fast.evaluation.retrieval import retrieve
from kdcmae_fast.evaluation.source import EvaluationSource

__all__ = [
    "ClipFeatures",
    "EvaluationSource",
    "RetrievalScores",
    "draw_clip",
    "extract_features",
    "plot_losses",
    "reconstruct",
    "reconstruct_batch",
    "retrieval_scores",
    "retrieve",
]
