"""What the pages of docs/ show must run as it stands there."""

import io
import json
import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

from kdcmae_fast.cli import COMMANDS, SCRIPTS, build_parser
from kdcmae_fast.config import RunConfig
from kdcmae_fast.convert import export_published
from kdcmae_fast.data.shards import PreparedClip, finish_dataset, write_shard
from kdcmae_fast.evaluation import ClipFeatures, save_features
from kdcmae_fast.finetune_config import FinetuneRunConfig
from kdcmae_fast.models import Batch, build_model
from kdcmae_fast.training.script import _parser

ROOT = Path(__file__).parents[1]
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "benchmarks/README.md"]
PAGES += [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("kernels/*/README.md"))]
SIZES = {
    "img_size": 32, "audio_length": 96, "embed_dim": 64, "modality_depth": 1, "num_heads": 1,
    "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 1,
}  # fmt: skip
SMALLER = (  # what a page does with many clips, with few
    (r"num_clips=1000\)", "num_clips=40), test_clips=40"),
    (r"num_clips=100\)", "num_clips=2)"),
    (r'EvaluationSource\(checkpoint="runs/demo/model"\)',
     'EvaluationSource(checkpoint="runs/demo/model", num_clips=3)'),
    (r"LocalizationSettings\(videos=2\)",
     "LocalizationSettings(videos=1, references=2, pictures=1)"),
)  # fmt: skip


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    found = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [text for language, text in found if language in languages]


def is_program(block: str) -> bool:
    """Whether a Python block is more than lines to compare with one's own."""
    return "kdcmae_fast" in block


PROGRAMS = [page for page in PAGES if any(map(is_program, blocks(page, "python")))]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with the files that the pages speak of; the names they leave out."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build_model("kdc_mae", "tiny", **SIZES)
    model.save_pretrained("runs/demo/model")
    settings = {"data": {"num_workers": 0, "num_clips": 80}, "train": {"steps": 1}}
    Path("runs/demo/config.json").write_text(json.dumps({"config": settings, "deepspeed": {}}))
    export_published(model, "audio_model.25.pth")
    for run in ("first", "second"):
        Path("runs", run).mkdir()
        Path("runs", run, "metrics.json").write_text('{"command": "name"}')
    audio, video = torch.randn(9, 8), torch.randn(9, 8)
    features = ClipFeatures(
        tuple("abcdefghi"), torch.arange(9), torch.zeros(9).long(), audio, video
    )
    save_features(features, "features.npz")
    write_clip(tmp_path / "shards", num_frames=16, seconds=4.0)
    labels = np.arange(40) % 4
    return {
        "model": model, "fbank": torch.randn(2, 96, 128), "frames": torch.randn(2, 3, 32, 32),
        "batch": Batch(torch.randn(2, 96, 128), torch.randn(2, 3, 32, 32), torch.arange(2)),
        "features": torch.randn(40, 8), "labels": torch.from_numpy(labels),
        "train": np.arange(30), "test": np.arange(30, 40),
    }  # fmt: skip


def write_clip(root: Path, *, num_frames: int, seconds: float) -> None:
    """A folder of shards that holds one clip."""
    image, picture = pytest.importorskip("PIL.Image"), io.BytesIO()
    pytest.importorskip("soundfile")
    image.new("RGB", (224, 224), (9, 99, 199)).save(picture, "JPEG")
    times = [k * seconds / num_frames for k in range(num_frames)]
    sound = np.random.uniform(-0.1, 0.1, int(seconds * 16000)).astype(np.float32)
    clip = PreparedClip("a", "a.mp4", 0.0, seconds, [picture.getvalue()] * num_frames, times, sound)
    write_shard(root, 0, [clip], first=0)
    finish_dataset(root, 1, {"preset": "test"})


@pytest.mark.parametrize("page", PROGRAMS, ids=name)
def test_python_runs(page, workplace):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("av")
    for block in filter(is_program, blocks(page, "python")):
        for pattern, smaller in SMALLER:
            block = re.sub(pattern, smaller, block)
        exec(compile(block, name(page), "exec"), workplace)


def commands(page: Path) -> list[list[str]]:
    """The words of each command line on a page."""
    text = "".join(blocks(page, "bash", "sh")).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [[word for word in words if word != "..."] for words in lines if words]


def parse(words: list[str]) -> bool:
    """Have a command parsed that is ours, by any launcher; exits or raises where it does not."""
    script = next((i for i, w in enumerate(words) if w.startswith("kdcmae_fast/")), None)
    if script is not None:
        assert (ROOT / words[script]).is_file()
        _parser("script", "", "", "script").parse_intermixed_args(words[script + 1 :])
        return True
    if "kdcmae_fast" in words:  # -m or --module
        words = ["kdcmae", *words[words.index("kdcmae_fast") + 1 :]]
    if words[0] != "kdcmae":
        return False
    command, *rest = words[1:]
    parser = _parser("script", "", "", "script") if command in SCRIPTS else build_parser(command)
    parser.parse_intermixed_args(rest)
    return True


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_what_their_parsers_take(page):
    taken = sum(parse(words) for words in commands(page))
    assert taken or page not in DOCS
    named = set(re.findall(r"`kdcmae ([a-z]+)", page.read_text(encoding="utf-8")))
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_settings_named_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "configs|benchmarks|csrc|docs|kernels|tests|kdcmae_fast"
    for path in re.findall(
        rf"\b((?:{folders})/[\w/.-]+\.(?:py|yaml|json|jsonl|md|cpp|h|sh))\b", text
    ):
        assert (ROOT / path).is_file(), path
    for setting in re.findall(r"\b((?:model|data|train|finetune)\.[a-z_]+(?:\.[a-z_]+)*)=", text):
        assert any(is_setting(kind, setting) for kind in (RunConfig, FinetuneRunConfig)), setting


def is_setting(kind: type, dotted: str) -> bool:
    """Whether a run of this kind has the setting."""
    first, _, rest = dotted.partition(".")
    inner = get_type_hints(kind).get(first)
    if not rest:
        return inner is not None
    return is_dataclass(inner) and is_setting(inner, rest)


def test_every_page_is_linked():
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for page in DOCS:
        assert any(page.name in text for other, text in texts.items() if other != page)
