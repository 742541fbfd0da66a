"""What the README shows must run as it stands there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from kdcmae_fast import kernels
from kdcmae_fast.cli import COMMANDS, build_parser
from kdcmae_fast.kernels.common.dispatch import implementations

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


def test_results_files_named_exist_and_hold_the_figures():
    files = set(re.findall(r"[\w-]+-\d{4}-\d\d-\d\d\.jsonl?", README))
    assert len(files) > 1
    assert all((ROOT / "benchmarks/results" / name).is_file() for name in files)
    prose = " ".join(README.split())
    demo = json.loads((ROOT / "benchmarks/results/demo-cpu-2026-11-20.json").read_text())
    losses = re.search(r"\((\d+) steps, the total loss falls from ([\d.]+) to ([\d.]+)\)", prose)
    first, last = (demo[f"{when}_losses"]["total"] for when in ("start", "final"))
    assert losses and losses.groups() == (str(demo["steps"]), f"{first:.1f}", f"{last:.1f}")
    found = demo["retrieval_of_100_heldout_clips"]
    shares = re.search(r"came first for (\d+) % and (\d+) % of them", prose)
    ways = ("audio_to_video", "video_to_audio")
    assert shares and [int(n) for n in shares.groups()] == [
        round(100 * found[way]["R@1"]) for way in ways
    ]


def test_commands_named_are_what_their_parsers_take():
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    commands = [words for words in lines if words[:1] == ["kdcmae"]]
    assert len(commands) >= 3
    for _, command, *words in commands:
        build_parser(command).parse_intermixed_args(words)  # exits where it does not
    named = set(re.findall(r"`kdcmae ([a-z]+)", README))
    assert named <= set(COMMANDS)
    evaluations = README.split("## Evaluate")[1].split("## ")[0]
    elsewhere = {"pretrain", "prepare", "doctor", "datasets", "convert", "backends", "bench"}
    for name in set(COMMANDS) - {"settings"}:
        assert f"`{name}" in evaluations or f"kdcmae {name}" in evaluations or name in elsewhere


def test_every_op_is_in_the_table_with_its_implementations():
    table = README.split("| op | shapes | implementations |")[1].split("\n\n")[0]
    rows = {}
    for line in table.splitlines()[2:]:
        names, _, impls = (cell.strip() for cell in line.strip("|").split(" | "))
        names = re.findall(r"`(\w+)`", names)
        groups = impls.split("; ") if len(names) > 1 else [impls]
        rows |= dict(zip(names, groups, strict=True))
    assert set(rows) == set(kernels.__all__) - {"MaskPlan", "backends"}
    words = {"torch": "torch", "cpp": "C++", "triton": "Triton"}
    for op in set(rows) - {"attention"}:
        assert set(rows[op].split(", ")) == {words[impl] for impl in implementations(op)}, op


def test_make_targets_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= targets
