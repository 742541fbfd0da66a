"""What the README shows must run as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_op_example_runs():
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "kernels.complementary_masks(" in block
    )
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["visible"].shape == (16, 49, 768)
    assert scope["tokens"].shape == (16, 196, 512)
    assert scope["loss"].dim() == scope["match"].dim() == 0


@pytest.mark.parametrize("name", sorted(set(re.findall(r"configs/\w+\.(?:yaml|json)", README))))
def test_files_named_exist(name):
    assert (ROOT / name).is_file()


def test_make_targets_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= targets
