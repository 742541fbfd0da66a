"""Wrong arguments of the max-pooled InfoNCE."""

import pytest
import torch

from kdcmae_fast.kernels import max_pooled_info_nce

MAPS, VECTORS = torch.zeros(4, 5, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((VECTORS, VECTORS), {}, r"maps must be \(B, HW, D\), got shape \(4, 3\)"),
        ((MAPS, MAPS), {}, r"vectors must be \(B, D\), got shape \(4, 5, 3\)"),
        ((MAPS, torch.zeros(4, 2)), {}, r"vectors must be .* = \(4, 3\) as maps, got \(4, 2\)"),
        ((MAPS, torch.zeros(3, 3)), {}, r"vectors must be .* = \(4, 3\) as maps, got \(3, 3\)"),
        ((MAPS[:, :0], VECTORS), {}, "maps must have 1 to 32768 cells HW, got 0"),
        ((torch.zeros(4, 32769, 3), VECTORS), {}, "maps must have .* got 32769"),
        ((MAPS.long(), VECTORS), {}, "maps must be one of float64, .* got torch.int64"),
        ((MAPS, VECTORS.long()), {}, "vectors must be one of"),
        ((MAPS, VECTORS.to("meta")), {}, "vectors is on meta, maps on cpu"),
        ((MAPS, VECTORS), {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ((MAPS, VECTORS), {"temperature": torch.ones(1)}, r"temperature must be .* shape \(1,\)"),
        ((MAPS, VECTORS), {"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
        ((MAPS, VECTORS), {"precision": "int8"}, "precision='int8' is not None or one of fp32"),
        ((MAPS.double(), VECTORS), {"precision": "bf16"}, "would lower float64 inputs"),
        ((MAPS, VECTORS), {"impl": "cuda"}, "impl='cuda' of max_pooled_info_nce is not available"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        max_pooled_info_nce(*arguments, **options)
