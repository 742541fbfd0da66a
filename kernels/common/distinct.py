"""The same tensor as two arguments of one op."""

from torch import Tensor


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, one that is there twice as a view of itself from the second time on.

    torch.compile does not trace an autograd.Function that is handed the same tensor twice.
    """
    return tuple(
        tensor.view_as(tensor) if any(tensor is other for other in tensors[:place]) else tensor
        for place, tensor in enumerate(tensors)
    )
