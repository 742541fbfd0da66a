"""DeepSpeed's JSON: read, overridden by `ds.key=value`, checked.

It owns batch size, accumulation, precision, clipping and ZeRO. What our recipe owns (optimizer,
schedule, logging, checkpoints) is an error there, and so is a key DeepSpeed would silently ignore.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcmae_fast.config_file import Settings, did_you_mean, find_config, merge, parse_value

OURS = {
    "optimizer": "optim.name, optim.lr, ...",
    "scheduler": "optim.schedule, optim.warmup, ...",
    "tensorboard": "nothing: TensorBoard is always written",
    "wandb": "train.wandb",
    "csv_monitor": "nothing: log.jsonl is always written",
    "comet": "nothing: log.jsonl is always written",
    "checkpoint": "train.checkpoint_every and train.keep_checkpoints",
    "activation_checkpointing": "model.activation_checkpointing",
    "train_batch_size": "nothing: train_micro_batch_size_per_gpu x gradient_accumulation_steps "
    "x processes gives it",
}
KNOWN = (
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type", "data_types",
    "prescale_gradients", "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "aio",
)  # fmt: skip
ZERO_STAGES = (0, 1, 2, 3)


def load_deepspeed_config(path: str | Path, arguments: Sequence[str] = ()) -> Settings:
    """Read DeepSpeed's JSON and lay `ds.key=value` arguments over it.

    Raises:
        ValueError: one line: not JSON, a key that our recipe owns or that DeepSpeed does not know,
            a missing or impossible batch size, fp16.
        FileNotFoundError: no such file.
    """
    try:
        config = json.loads(find_config(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object {{...}}, found {type(config).__name__}")
    return check_deepspeed_config(config, arguments, str(path))


def check_deepspeed_config(config: Settings, arguments: Sequence[str], origin: str) -> Settings:
    """The same for settings read from elsewhere; `origin` names where in errors."""
    origins = dict.fromkeys(config, origin)
    for argument in arguments:
        key, equals, text = argument.removeprefix("ds.").partition("=")
        if not equals or not key:
            raise ValueError(
                f"argument {argument}: expected ds.key=value, as in ds.bf16.enabled=false"
            )
        value = parse_value(text, argument)
        for part in reversed(key.split(".")):
            value = {part: value}
        merge(config, value, exclusive=False)
        origins[key.split(".")[0]] = f"argument {argument}"
    _check_owners(config, origins)
    _check_values(config, origins, origin)
    return config


def accumulation_of(config: Mapping[str, Any]) -> int:
    """Micro steps in one optimizer step."""
    return int(config.get("gradient_accumulation_steps", 1))


def uses_bf16(config: Mapping[str, Any]) -> bool:
    """bf16 compute over fp32 master weights; otherwise all is fp32."""
    return bool(config.get("bf16", {}).get("enabled", False))


def zero_stage_of(config: Mapping[str, Any]) -> int:
    """What is sharded: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def check_zero_settings(config: Mapping[str, Any]) -> None:
    """ValueError for what DeepSpeed would not take under zero_optimization or bf16; imports it."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    _check_group("zero_optimization", config, DeepSpeedZeroConfig)
    _check_group("bf16", config, DeepSpeedBF16Config)


def _check_group(group: str, config: Mapping[str, Any], kind: Any) -> None:
    from pydantic import ValidationError

    try:
        kind(**config.get(group, {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        word = ".".join(map(str, first["loc"]))
        problem = first["msg"]
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(word, list(kind.model_fields))
            problem = f"unknown DeepSpeed setting{hint}"
        value = first["input"]
        raise ValueError(f"ds.{group}.{word}={value}: {problem}") from None


def for_engine(config: Mapping[str, Any], *, load_universal: bool) -> Settings:
    """A copy with what every run of ours needs and nobody should have to write.

    Gradients are clipped only where the JSON says so; DeepSpeed itself would clip to a norm of 1.
    """
    defaults = {
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    ours = {**defaults, **json.loads(json.dumps(config))}
    if load_universal:
        ours["checkpoint"] = {"load_universal": True}
    return ours


def _check_owners(config: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    for key in config:
        if key in OURS:
            raise ValueError(
                f"{origins[key]}: {key} does not belong in DeepSpeed's JSON; use {OURS[key]}"
            )
        if key not in KNOWN and key != "fp16":
            raise ValueError(
                f"{origins[key]}: unknown DeepSpeed setting {key}{did_you_mean(key, KNOWN)}"
            )


def _check_values(config: Mapping[str, Any], origins: Mapping[str, str], path: str) -> None:
    for key in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{origins[key]}: {key}={config[key]}: expected an object {{...}}")
    if config.get("fp16", {}).get("enabled"):
        raise ValueError(f"{origins['fp16']}: fp16.enabled=true: use bf16.enabled=true, or fp32")
    if "train_micro_batch_size_per_gpu" not in config:
        raise ValueError(f"{path}: train_micro_batch_size_per_gpu is missing (clips per process)")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = config.get(key, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{origins[key]}: {key}={value}: expected a whole number of 1 or more")
    clip = config.get("gradient_clipping", 0)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not clip >= 0:
        where = origins["gradient_clipping"]
        raise ValueError(f"{where}: gradient_clipping={clip}: expected a number of 0 or more")
    enabled = config.get("bf16", {}).get("enabled", False)
    if not isinstance(enabled, bool):
        raise ValueError(f"{origins['bf16']}: bf16.enabled={enabled}: expected true or false")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in ZERO_STAGES:
        where = origins["zero_optimization"]
        raise ValueError(f"{where}: zero_optimization.stage={stage}: expected 0, 1, 2 or 3")
    if stage == 0 and enabled:
        where = origins.get("zero_optimization", origins["bf16"])
        raise ValueError(
            f"{where}: zero_optimization.stage=0 with bf16 keeps no fp32 master weights; use stage "
            "1, or bf16.enabled=false"
        )
