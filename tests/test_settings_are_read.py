"""No dead settings: every field of the configuration is read somewhere outside of its schema."""

import ast
import dataclasses
from pathlib import Path

import pytest

from kdcmae_fast import config, finetune_config

PACKAGE = Path(config.__file__).parent
GROUPS = (
    "DistillConfig", "ModelConfig", "DataConfig", "OptimConfig", "TrainConfig", "RunConfig",
    "FinetuneConfig", "FinetuneDataConfig", "FinetuneTrainConfig", "FinetuneRunConfig",
)  # fmt: skip


@pytest.fixture(scope="module")
def read():
    """Names that some code of the package reads as an attribute."""
    names: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name.startswith("config") or file.name == "finetune_config.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_is_read(read, group):
    owner = finetune_config if group.startswith("Finetune") else config
    fields = {field.name for field in dataclasses.fields(getattr(owner, group))}
    assert fields - read == set()
