"""Published checkpoints to our models and back.

Files understood: CAV-MAE and CAV-MAE Sync pretrained and fine-tuned, KDC-MAE pretrained, and
ImageNet MAE (whole or encoder only) as a starting point.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcmae_fast.messages import require_folder
from kdcmae_fast.models.build import (
    CLASSIFIER_CLASSES,
    Model,
    check_name,
    from_pretrained,
    merge_config,
    model_from_config,
    system_settings,
)
from kdcmae_fast.models.masking import audio_grid, video_grid
from kdcmae_fast.models.pretrained import check_keys, common_dtype, load_state

from .files import read_tensors, write_tensors
from .infer import check_overrides, infer_settings
from .keys import (
    dead_norms,
    is_dead,
    is_extra_token,
    is_head,
    is_unused,
    join_registers,
    published_key,
    split_registers,
)
from .mae import (
    CLS_TOKENS,
    has_decoder,
    infer_mae_settings,
    is_mae,
    is_renamed_mae,
    map_mae,
    stays_fresh,
)
from .positions import EXACT, distance_from_sincos, resize_positions

# What weights without such tokens leave to the model that starts from them.
TOKEN_SETTINGS = ("cls_token", "num_registers", "contrast_head_depth")
HEAD_WEIGHTS = ("mlp_head.1.weight", "classifier_head.weight")

log = logging.getLogger("kdcmae_fast.convert")


def load_published(
    path: str | os.PathLike[str], name: str | None = None, **config_overrides: Any
) -> Model:
    """The model of a published checkpoint, on the CPU, in the file's dtype.

    path: .pth or .safetensors; names with or without `module.`, also inside {"model": ...} or
        {"state_dict": ...}.
    name: another system on the same trunk, such as "kdc_mae" for a CAV-MAE file, or
        "cav_mae_classifier" (with `num_classes=`) to fine-tune a pretrained one: its decoder is
        dropped and the head is new. By default what the file is. "cav_mae_sync" for a CAV-MAE
        file: CLS and registers are new.
    config_overrides: fields of `ModelConfig`. Sizes are read from the shapes and may not be
        contradicted, except `audio_length`: the position tables are made for the one given.
        `num_heads` and `decoder_num_heads` default to the published head sizes (64 and 32) and
        must be given where those do not divide the width.

    Strict: unknown and missing names are an error that lists them. Dropped and logged: the norms
    no output depends on (see `keys.py`) and KDC-MAE's parameters that its code never reads. From
    an ImageNet MAE file what it lacks (modality vectors, audio positions, and for an encoder-only
    file the decoder) stays freshly initialised and is logged.
    """
    state = read_tensors(path)
    name = _system(state, path) if name is None else name
    check_name(name)
    num_classes = config_overrides.pop("num_classes", None)
    infer = infer_mae_settings if is_mae(state) else infer_settings
    try:
        fixed, guessed = infer(state, config_overrides)
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}: cannot read the sizes from it") from None
    if not _has_extra_tokens(state):
        fixed = {key: value for key, value in fixed.items() if key not in TOKEN_SETTINGS}
        if system_settings(name).get("cls_token"):  # its own, not that of where it starts from
            guessed.pop("audio_length", None)
    check_overrides(fixed, config_overrides, str(path))
    config = merge_config({**system_settings(name), **fixed, **guessed}, config_overrides)
    if name in CLASSIFIER_CLASSES and num_classes is None:
        heads = [state[key] for key in HEAD_WEIGHTS if key in state]
        num_classes = heads[0].shape[0] if heads else None
    model = model_from_config(name, config, num_classes).to(common_dtype(state))
    _fill(model, state, str(path))
    return model


def init_model(model: Model, path: str | os.PathLike[str]) -> None:
    """Start an existing model from a published file, an ImageNet MAE file or a model folder.

    The rules are those of `load_published`; a model folder may be of another system on the same
    trunk. What only the model has (a new head, uncertainty weights) keeps its initial values.
    """
    folder = Path(path).is_dir()
    state = _live_state(from_pretrained(path)) if folder else read_tensors(path)
    _fill(model, state, str(path))


def published_state(model: Model) -> dict[str, Tensor]:
    """The model's weights under the published names, dead norms included."""
    live = _live_state(model)
    return live | dead_norms(live)


def _live_state(model: Model) -> dict[str, Tensor]:
    live, dropped = {}, []
    for key, tensor in model.state_dict().items():
        name = published_key(key)
        if name is None:
            dropped.append(key)
        else:
            live[name] = tensor
    if dropped:
        log.warning("not in the published layout, left out: %s", ", ".join(dropped))
    return join_registers(live)


def export_published(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model in the published layout.

    path: .pth (names under `module.`, as published) or .safetensors (bare names). Dead norms are
    written as 1 and 0, so that the published code loads the file strictly; see `keys.py`.
    """
    if model.config.modalities != "both":
        raise ValueError(
            f"modalities={model.config.modalities}: published files are of models of both audio "
            "and video; keep the model folder"
        )
    write_tensors(path, published_state(model))


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    name: str | None = None,
    **config_overrides: Any,
) -> None:
    """A published file to a model folder, or a model folder to a published file.

    name, config_overrides: as in `load_published`; they do not apply to a model folder.

    Raises ValueError before anything is read where a model folder cannot be written.
    """
    if Path(source).is_dir():
        if name is not None or config_overrides:
            given = ", ".join([*(["name"] if name else []), *config_overrides])
            raise ValueError(f"{source} is a model folder with its own settings; drop {given}")
        export_published(from_pretrained(source), target)
    else:
        if Path(source).is_file():
            require_folder(Path(target), "OUT")
        load_published(source, name, **config_overrides).save_pretrained(target)


def _system(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    """The system a file belongs to."""
    if is_mae(state) or is_renamed_mae(state):
        return "cav_mae"
    if "blocks_a.0.attn.qkv.weight" not in state:
        names = ", ".join(sorted(state)[:5])
        raise ValueError(f"{path} is neither CAV-MAE, KDC-MAE nor MAE; it begins with {names}")
    if "classifier_head.weight" in state:
        return "cav_mae_sync_classifier"
    if "mlp_head.1.weight" in state:
        return "cav_mae_classifier"
    if _has_extra_tokens(state):
        return "cav_mae_sync"
    return "kdc_mae" if any(is_unused(key) for key in state) else "cav_mae"


def _has_extra_tokens(state: Mapping[str, Tensor]) -> bool:
    """Whether the file itself is a CAV-MAE Sync, and not what one may start from."""
    start = is_mae(state) or is_renamed_mae(state)
    return not start and any(is_extra_token(key) for key in state)


def _fill(model: Model, state: dict[str, Tensor], path: str) -> None:
    """Load published (or MAE) tensors into the model, strictly."""
    start = is_mae(state) or is_renamed_mae(state)
    whole_mae = has_decoder(state)
    tokens = _has_extra_tokens(state)
    if is_mae(state):
        given = map_mae(state, model.config.modality_depth, model.config.cls_token)
    else:
        given = split_registers(state)
    given = _with_length(_without_unused(given, model, start, path), model, path)
    has_head = any(key in given for key in HEAD_WEIGHTS)

    def may_be_absent(name: str | None) -> bool:
        if name is None:
            return True
        if is_head(name):
            return not has_head
        if is_extra_token(name) and not tokens:
            return True
        return start and stays_fresh(name, whole_mae)

    own = model.state_dict()
    names = {key: published_key(key) for key in own}
    fresh = [key for key, name in names.items() if name not in given and may_be_absent(name)]
    sources = {key: name for key, name in names.items() if name is not None and key not in fresh}
    check_keys({name: own[key] for key, name in sources.items()}, given, path)
    _check_positions(model, given, path)
    if fresh:
        log.info("%s has nothing for these, they stay as initialised: %s", path, ", ".join(fresh))
    loaded = {key: given[name] for key, name in sources.items()}
    load_state(model, loaded | {key: own[key] for key in fresh}, path)


def _without_unused(
    state: Mapping[str, Tensor], model: Model, start: bool, path: str
) -> dict[str, Tensor]:
    """The tensors to load, without those that are left out on purpose (logged)."""
    dead = [key for key in state if is_dead(key)]
    dropped = [key for key in state if is_unused(key)]
    if start and not model.config.cls_token:
        dropped += [key for key in state if key in CLS_TOKENS]
    if model.name in CLASSIFIER_CLASSES:
        decoder = [key for key in state if key.startswith("decoder_") or key == "mask_token"]
        dropped += [key for key in decoder if key not in dead]
    if dropped:
        log.info("%s: dropped, the model has no use for %s", path, ", ".join(dropped))
    if dead:
        used = sum(bool((state[key] != float(key.endswith("weight"))).any()) for key in dead)
        log.info(
            "%s: dropped %d norms that no output depends on; %d of them not as initialised",
            path,
            len(dead),
            used,
        )
    gone = {*dead, *dropped}
    return {key: tensor for key, tensor in state.items() if key not in gone}


def _with_length(given: dict[str, Tensor], model: Model, path: str) -> dict[str, Tensor]:
    """Audio position tables for this model's `audio_length` (logged)."""
    rows, columns = audio_grid(model.config)
    resized = {
        key: resize_positions(table, rows, columns)
        for key, table in given.items()
        if key in ("pos_embed_a", "decoder_pos_embed_a") and table.shape[1] != rows * columns
    }
    if resized:
        length = model.config.audio_length
        log.info("%s: made for audio_length=%d: %s", path, length, ", ".join(resized))
    return given | resized


def _check_positions(model: Model, given: Mapping[str, Tensor], path: str) -> None:
    """Warn where a pretrained file's fixed position table is not the sine-cosine one."""
    if model.name in CLASSIFIER_CLASSES:
        return
    for suffix, grid in (("a", audio_grid(model.config)), ("v", video_grid(model.config))):
        for key in (f"pos_embed_{suffix}", f"decoder_pos_embed_{suffix}"):
            error = distance_from_sincos(given[key], grid) if key in given else 0
            if error > EXACT:
                log.warning("%s: %s is not the sine-cosine table (by %.1e); kept", path, key, error)
