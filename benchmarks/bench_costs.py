"""The least each op must do, counted from shapes: {"fwd": Cost, "fwd+bwd": Cost}.

Every tensor the op must read or write counts once in each direction, masks and indices in their
smallest form (int16 ranks); products count two FLOPs per multiply-add. e: bytes per value.
"""

from bench_ceilings import Cost
from bench_streams import VIEWS, Stream

RANKS = 2  # bytes per entry of a mask plan


def masks(stream: Stream) -> dict[str, Cost]:
    """ids_keep and ids_restore in int64 and mask in float32 for each view."""
    per_sample = VIEWS * (8 * stream.keep + 12 * stream.tokens)
    return {"fwd": Cost(stream.batch * per_sample)}


def gather(stream: Stream, e: int = 4) -> dict[str, Cost]:
    kept = VIEWS * stream.keep
    ids = RANKS * kept
    forward = 2 * kept * stream.dim * e + ids
    backward = (stream.tokens + kept) * stream.dim * e + ids
    return both(stream.batch, forward, backward)


def embed(stream: Stream, e: int = 4) -> dict[str, Cost]:
    """Visible patches only; no gradient of the pixels, none of the positions."""
    rows = VIEWS * stream.keep
    moved = rows * (stream.values + stream.dim) * e
    weight = stream.values * stream.dim * e
    flops = 2 * stream.batch * rows * stream.values * stream.dim
    return both(stream.batch, moved, moved, flops, flops, shared=weight)


def assemble(stream: Stream, e: int = 4) -> dict[str, Cost]:
    moved = VIEWS * (stream.keep + stream.tokens) * stream.decoder_dim * e
    return both(stream.batch, moved, moved)


def reconstruction(stream: Stream, e: int = 4) -> dict[str, Cost]:
    """Every patch is masked in some view; the gradient covers all predictions, zeros too."""
    masked = VIEWS * (stream.tokens - stream.keep)
    read = (stream.tokens + masked) * stream.values * e
    return both(stream.batch, read, read + VIEWS * stream.tokens * stream.values * e)


def info_nce(batch: int, dim: int, e: int = 4) -> dict[str, Cost]:
    """One product forward, two backward, for one direction or both; logits need no memory."""
    product = 2 * batch * batch * dim
    return both(batch, 2 * dim * e, 4 * dim * e, product, 2 * product)


def rows(batch: int, dim: int, e: int = 4, gradients: int = 2) -> dict[str, Cost]:
    """A loss of two (B, D) inputs, row by row, with the gradients of both or of one."""
    return both(batch, 2 * dim * e, (2 + gradients) * dim * e)


def attention(batch: int, heads: int, length: int, dim: int, e: int = 4) -> dict[str, Cost]:
    """Two products forward, five backward: the scores are not kept."""
    tensor = heads * length * dim * e
    product = 2 * batch * heads * length * length * dim
    return both(batch, 4 * tensor, 8 * tensor, 2 * product, 5 * product)


def both(
    batch: int,
    forward: int,
    backward: int,
    flops: int = 0,
    backward_flops: int = 0,
    shared: int = 0,
) -> dict[str, Cost]:
    """Costs of both modes from bytes per sample, bytes per batch in each pass, and FLOPs."""
    once = Cost(batch * forward + shared, flops)
    more = Cost(batch * backward + shared, backward_flops)
    return {"fwd": once, "fwd+bwd": Cost(once.bytes + more.bytes, once.flops + more.flops)}
