"""Our parameter names and those of the published files.

Every published block has three pairs of norms: `norm1/norm2` and, under `_a` and `_v`, one pair
per modality. Only the shared blocks ever use the latter; elsewhere they are dead weights. We
allocate none: reading drops them whatever they hold, writing fills in 1 and 0, their values in a
freshly initialised published model. So export -> load is the identity, and load -> export is the
identity for every tensor that any output depends on.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_MODALITY = {"audio": "a", "video": "v"}
_SHARED_NORM = {"joint": "", "audio": "_a", "video": "_v"}
_HEAD = {"audio": "audio", "video": "visual"}
REGISTERS = "register_tokens"  # one tensor: audio's rows, then video's

# Parameters that KDC-MAE's published code creates and nothing reads.
_UNUSED = re.compile(
    r"(latent_projection|kld_mlp|multi_noise_loss_module|probability_network|get_token_probs"
    r"|dw_fc\d*|fc)(\..+)?"
)
# norm1_a ... norm2_v outside the shared blocks.
_PRIVATE = (
    r"(?:blocks_a|blocks_v|decoder_blocks|classifier_layers|constrative_head_(?:audio|visual))"
)
_DEAD = re.compile(_PRIVATE + r"\.\d+\.norm[12]_[av]\.(weight|bias)")
_PRIVATE_NORM = re.compile(rf"({_PRIVATE}\.\d+\.norm[12])\.(weight|bias)")

_RENAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"encoder\.(audio|video)\.patch_embed\.(weight|bias)", r"patch_embed_{0}.proj.{1}"),
        (r"encoder\.(audio|video)\.patch_embed\.modality", r"modality_{0}"),
        (r"encoder\.(audio|video)\.patch_embed\.pos_embed", r"pos_embed_{0}"),
        (r"encoder\.(audio|video)\.blocks\.(.+)", r"blocks_{0}.{1}"),
        (r"encoder\.(audio|video)\.tokens\.cls", r"cls_token_{0}"),
        (r"encoder\.(audio|video)\.tokens\.registers", REGISTERS + r".{0}"),
        (r"encoder\.shared\.heads\.(audio|video)\.(.+)", r"constrative_head_{0}.{1}"),  # sic
        (r"encoder\.shared\.norm\.(joint|audio|video)\.(.+)", r"norm{0}.{1}"),
        (
            r"encoder\.shared\.blocks\.(\d+\.norm[12])\.norms\.(joint|audio|video)\.(.+)",
            r"blocks_u.{0}{1}.{2}",
        ),
        (r"encoder\.shared\.blocks\.(.+)", r"blocks_u.{0}"),
        (r"decoder\.(audio|video)_(modality|pos_embed)", r"decoder_{1}_{0}"),
        (r"decoder\.(audio|video)_head\.(.+)", r"decoder_pred_{0}.{1}"),
        (r"decoder\.mask_token", r"mask_token"),
        (r"decoder\.(embed|norm|blocks)\.(.+)", r"decoder_{0}.{1}"),
        (r"head\.norm\.(.+)", r"mlp_head.0.{0}"),
        (r"head\.linear\.(.+)", r"mlp_head.1.{0}"),
        (r"aggregator\.token", r"cls_cls_token"),
        (r"aggregator\.blocks\.(.+)", r"classifier_layers.{0}"),
        (r"aggregator\.norm\.(.+)", r"classifier_norm.{0}"),
        (r"aggregator\.linear\.(.+)", r"classifier_head.{0}"),
    )
)


def published_key(key: str) -> str | None:
    """The published name of one of our parameters; None where it has no counterpart.

    The registers of both modalities are one published tensor; see `split_registers`.
    """
    for pattern, replacement in _RENAMES:
        match = pattern.fullmatch(key)
        if match:
            names = _SHARED_NORM if "shared" in key else _MODALITY
            names = _HEAD if ".heads." in key else names
            return replacement.format(*(names.get(group, group) for group in match.groups()))
    return None


def split_registers(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with each modality's registers under a name of their own."""
    state = dict(published)
    if REGISTERS in state:
        both = state.pop(REGISTERS)
        if both.ndim != 2 or both.shape[0] % 2:
            raise ValueError(f"{REGISTERS} must be (2R, D), got {tuple(both.shape)}")
        state |= {f"{REGISTERS}.{m}": part for m, part in zip("av", both.chunk(2), strict=True)}
    return state


def join_registers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_registers`."""
    parts = {f"{REGISTERS}.{m}" for m in "av"} & state.keys()
    published = {key: tensor for key, tensor in state.items() if key not in parts}
    if parts:
        published[REGISTERS] = torch.cat([state[key] for key in sorted(parts)])
    return published


def is_extra_token(key: str) -> bool:
    """Whether a published name is one that CAV-MAE Sync has and CAV-MAE has not."""
    return key.startswith(("cls_token_", REGISTERS, "constrative_head_"))


def is_head(key: str) -> bool:
    """Whether a published name belongs to a classifier's head."""
    return key.startswith(("mlp_head.", "classifier_", "cls_cls_token"))


def is_dead(key: str) -> bool:
    """Whether the published tensor of this name never affects an output."""
    return _DEAD.fullmatch(key) is not None


def is_unused(key: str) -> bool:
    """Whether this is one of KDC-MAE's parameters that its code never reads."""
    return _UNUSED.fullmatch(key) is not None


def dead_norms(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dead norms that belong beside these published tensors: weights 1, biases 0."""
    dead = {}
    for key, tensor in published.items():
        match = _PRIVATE_NORM.fullmatch(key)
        if match:
            fill = torch.ones_like if match[2] == "weight" else torch.zeros_like
            for suffix in _MODALITY.values():
                dead[f"{match[1]}_{suffix}.{match[2]}"] = fill(tensor)
    return dead
