"""Similarities of clips of T frames, and the ranks of the true pairs among them."""

from .op import PairRanks, RetrievalRanks, frame_similarity, retrieval_ranks

__all__ = ["PairRanks", "RetrievalRanks", "frame_similarity", "retrieval_ranks"]
