"""The guess that knows the clips but not this one: every patch as it is on average elsewhere."""

import torch
from torch import Tensor

from kdcmae_fast.evaluation.views import Views


class MeanClip:
    """Errors of guessing each hidden patch as the mean, over the other clips, of that place's.

    A model told from the other modality alone is better than this only if something of this very
    clip comes across. Patches are in the space the model predicts in, sums in fp64, so the errors
    are those of leaving out one clip after the other and do not depend on the batches.
    """

    def __init__(self) -> None:
        self._clips = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, views: Views) -> None:
        """The clips of a batch, B of them with K views of L patches of P values."""
        target, weight, hidden = (part.double().cpu() for part in views.targets)
        times = hidden.sum(0).unsqueeze(-1)  # (B, L, 1): in how many views a patch is hidden
        both = torch.stack([times.expand_as(target), times * weight.expand_as(target)])
        sums = {
            "all": target.sum(0),  # (L, P)
            "weight": both.sum(1),  # (2, L, P): hidden patches, plain and in the picture's units
            "first": (both * target).sum(1),
            "second": (both * target.square()).sum(1),
        }
        self._sums = {name: self._sums.get(name, 0) + part for name, part in sums.items()}
        self._clips += len(target)

    def errors(self) -> dict[str, float] | None:
        """{"loss", "shown"} as in `Errors`, over all hidden patches; None without another clip."""
        if self._clips < 2 or not self._sums["weight"][0].any():
            return None
        # With n clips of mean m, the mean of the others is off by n / (n - 1) times x - m.
        mean = self._sums["all"] / self._clips
        first, second, weight = (self._sums[name] for name in ("first", "second", "weight"))
        wrong = (second - 2 * mean * first + mean.square() * weight).sum((1, 2))
        factor = (self._clips / (self._clips - 1)) ** 2 / weight[0].sum()
        return dict(zip(("loss", "shown"), (wrong * factor).tolist(), strict=True))
