"""Recipes (YAML) and `key=value` arguments into a run's settings, strictly.

Later layers win: field defaults < system < preset sizes < start model < recipe < arguments. Every
mistake is a ValueError of one line that names the file or argument, the dotted key and what was
expected.
YAML here is the JSON-like core of YAML 1.2: only `true` and `false` are booleans (`on` is a word),
`1e-4` is a number, and a key written twice is an error.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import pydantic
import yaml

from kdcmae_fast.config import PRESETS, SYSTEMS, RunConfig
from kdcmae_fast.finetune_config import CLASSIFIERS, FinetuneRunConfig

Settings = dict[str, Any]  # nested: section -> key -> value
AnyRunConfig = RunConfig | FinetuneRunConfig
Config = TypeVar("Config", RunConfig, FinetuneRunConfig)

# The recipes and DeepSpeed JSONs that come with the project: in a wheel they lie in the package.
_installed = Path(__file__).with_name("configs")
CONFIGS = _installed if _installed.is_dir() else Path(__file__).resolve().parents[1] / "configs"

# Setting one of these drops the other from the layers below.
EXCLUSIVE = {"steps": "epochs", "epochs": "steps"}

# What people call a setting that belongs to DeepSpeed's JSON.
DEEPSPEED_OWNS = {
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu"),
        "train_micro_batch_size_per_gpu",
    ),
    **dict.fromkeys(
        ("accumulation", "accumulation_steps", "gradient_accumulation_steps"),
        "gradient_accumulation_steps",
    ),
    **dict.fromkeys(
        ("clip_grad", "grad_clip", "gradient_clipping", "max_grad_norm"), "gradient_clipping"
    ),
    **dict.fromkeys(("bf16", "dtype", "precision", "fp32"), "bf16.enabled"),
    **dict.fromkeys(("zero", "zero_stage", "zero_optimization"), "zero_optimization.stage"),
    "train_batch_size": "train_micro_batch_size_per_gpu",
}

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (quote it)",
    "tuple_type": "a list",
    "dataclass_type": "a group of settings",
    "missing": "one more value",
    "too_long": "fewer values",
}


def load_config(
    recipe: str | Path | Mapping[str, Any], arguments: Sequence[str] = (), *, origin: str = "recipe"
) -> RunConfig:
    """Read a pretraining run's settings.

    Args:
        recipe: a YAML file, or the mapping it would hold.
        arguments: `section.key=value`, each on top of the recipe; values are YAML, except for
            settings that are text, which are taken as they stand.
        origin: where a mapping came from, for errors.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value, with where it came from.
        FileNotFoundError: no such recipe.
    """
    return load_settings(RunConfig, recipe, arguments, origin=origin)


def load_settings(
    kind: type[Config],
    recipe: str | Path | Mapping[str, Any],
    arguments: Sequence[str] = (),
    *,
    origin: str = "recipe",
    start_model: Mapping[str, Any] | None = None,
) -> Config:
    """`load_config` for any kind of run.

    start_model: `model` settings of the model that the run starts from, beneath the recipe's.
    """
    if isinstance(recipe, Mapping):
        settings = merge({}, recipe, exclusive=False)
    else:
        origin, settings = str(recipe), read_yaml(recipe)
    origins = dict.fromkeys(_dotted_keys(settings), origin)
    overrides: Settings = {}
    for argument in arguments:
        key, value = parse_argument(argument, kind)
        merge(overrides, _nested(key, value), exclusive=False)
        origins[key] = f"argument {argument}"
    merge(settings, overrides)
    defaults = _defaults(settings, origins, kind)
    if start_model:
        merge(defaults, {"model": start_model})
    return _validate(merge(defaults, settings), origins, origin, kind)


def settings_of(config: AnyRunConfig) -> Settings:
    """The nested plain-data form of `config`, which `load_settings` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def with_defaults(
    kind: type[RunConfig] | type[FinetuneRunConfig], settings: Settings, origin: str
) -> Settings:
    """`settings_of` an older run, with what its recipe would give settings that came since.

    kind: of run. origin: where `settings` came from, for errors. Settings that are no longer there
    stay. Raises ValueError for a system or preset that is not known.
    """
    below = _defaults(settings, dict.fromkeys(_dotted_keys(settings), origin), kind)
    return merge(merge(settings_of(kind()), below, exclusive=False), settings, exclusive=False)


def find_config(path: str | Path) -> Path:
    """`path`; a `configs/NAME` that is not there is the project's own, wherever one calls from."""
    path = Path(path)
    own = CONFIGS / path.name
    return own if path.parts[:-1] == ("configs",) and not path.exists() and own.exists() else path


def read_yaml(path: str | Path) -> Settings:
    """A YAML file's mapping; ValueError with file and line if it is not one."""
    try:
        settings = yaml.load(find_config(path).read_text(encoding="utf-8"), _CoreLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ValueError(f"{path}, line {line}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML text file ({type(error).__name__})") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found {type(settings).__name__}")
    return settings


def parse_argument(argument: str, kind: type = RunConfig) -> tuple[str, Any]:
    """`section.key=value` -> its dotted key and value."""
    key, equals, text = argument.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ValueError(f"argument {argument}: expected key=value, as in train.steps=100")
    if _is_text(_annotation(key, kind)):
        return key, text
    return key, parse_value(text, argument)


def parse_value(text: str, argument: str) -> Any:
    """One YAML value, as it stands after `key=`."""
    try:
        return yaml.load(text, _CoreLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"argument {argument}: {text!r} is not a YAML value") from error


def merge(below: Settings, above: Mapping[str, Any], exclusive: bool = True) -> Settings:
    """Lay `above` over `below`, in place, section by section; returns `below`."""
    for key, value in above.items():
        rival = EXCLUSIVE.get(key)
        if exclusive and rival in below and rival not in above and value is not None:
            del below[rival]
        if isinstance(value, Mapping):
            group = below.get(key)
            below[key] = merge(group if isinstance(group, dict) else {}, value, exclusive)
        else:
            below[key] = value
    return below


def did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean x?`, or nothing when nothing is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _defaults(settings: Settings, origins: Mapping[str, str], kind: type) -> Settings:
    """What the system and the preset named in `settings` put under `model`."""
    model: Settings = {}
    for field, table in (("name", _systems(kind)), ("preset", PRESETS)):
        default = next(f.default for f in dataclasses.fields(kind) if f.name == field)
        value = settings.get(field, default)
        if not isinstance(value, str) or value not in table:
            raise ValueError(
                f"{origins.get(field, 'default')}: {field}={value}: "
                f"expected one of {', '.join(table)}"
            )
        for key, setting in table[value].items():
            if dataclasses.is_dataclass(setting) and not isinstance(setting, type):
                setting = dataclasses.asdict(setting)
            model[key] = setting
    return {"model": model}


def _systems(kind: type) -> Mapping[str, Mapping[str, object]]:
    """The names a run of this kind may have, and what each sets."""
    if kind is RunConfig:
        return SYSTEMS
    return {name: SYSTEMS[name.removesuffix("_classifier")] for name in CLASSIFIERS}


@functools.cache
def _adapter(kind: type) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _validate(
    settings: Settings, origins: Mapping[str, str], recipe: str, kind: type[Config]
) -> Config:
    try:
        # Through JSON, pydantic's strict mode still reads a list as a tuple and 1 as a float.
        config: Config = _adapter(cast(type, kind)).validate_json(json.dumps(settings, default=str))
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(_explain(problems[0], origins, recipe, kind) + more) from None
    if config.train.steps is None and config.train.epochs is None:
        raise ValueError(f"{recipe}: train.steps or train.epochs must say how long to train")
    return config


def _explain(
    problem: Mapping[str, Any], origins: Mapping[str, str], recipe: str, kind: type
) -> str:
    """One line for one of pydantic's error records."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "value_error":  # from __post_init__; starts with the field's name
        text = str(problem["ctx"]["error"])
        key = ".".join([*path, re.split(r"[= ]", text)[0]])
        text = ".".join([*path, text])
    elif problem["type"] == "unexpected_keyword_argument":
        text = f"unknown setting {key}{_unknown_hint(path, kind)}"
    else:
        expected = _EXPECTED.get(problem["type"]) or problem["msg"]
        if problem["type"] == "literal_error":
            expected = f"one of {problem['ctx']['expected']}"
        text = f"{key}={json.dumps(problem['input'])}: expected {expected}"
    return f"{_origin(key, origins, recipe)}: {text}"


def _unknown_hint(path: Sequence[str], kind: type) -> str:
    *parents, word = path
    owner = DEEPSPEED_OWNS.get(word)
    if owner:
        return f": DeepSpeed's JSON owns it; set it there or pass ds.{owner}=..."
    group = _annotation(".".join(parents), kind) if parents else kind
    here = did_you_mean(word, list(_fields(group)), "".join(f"{p}." for p in parents))
    if here:
        return here
    homes = [key for key in _schema_keys(kind) if key.rsplit(".", 1)[-1] == word]
    return f"; did you mean {homes[0]}?" if homes else ""


def _origin(key: str, origins: Mapping[str, str], recipe: str) -> str:
    """Where `key` was set: itself, the nearest group above it, or something inside it."""
    parts = key.split(".")
    for stop in range(len(parts), 0, -1):
        prefix = ".".join(parts[:stop])
        if prefix in origins:
            return origins[prefix]
    inside = (where for name, where in origins.items() if name.startswith(f"{key}."))
    return next(inside, recipe)


def _nested(key: str, value: Any) -> Settings:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _dotted_keys(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _fields(group: Any) -> dict[str, Any]:
    """Settings of a dataclass and their types; empty for anything else."""
    if not dataclasses.is_dataclass(group) or not isinstance(group, type):
        return {}
    hints = get_type_hints(group)
    return {field.name: hints[field.name] for field in dataclasses.fields(group)}


def _schema_keys(group: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in _fields(group).items():
        yield f"{prefix}{name}"
        yield from _schema_keys(kind, f"{prefix}{name}.")


def _annotation(key: str, kind: Any) -> Any:
    """The type of a dotted key of a settings class; None if there is no such setting."""
    for part in key.split("."):
        kind = _fields(kind).get(part)
    return kind


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str))


class _CoreLoader(yaml.SafeLoader):
    """YAML's safe loader without the surprises of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is set twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )
