"""The transformer's MLP in one op that keeps its input and pre-activation only."""

from .op import mlp

__all__ = ["mlp"]
