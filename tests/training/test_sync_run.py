"""CAV-MAE Sync through the engine, from files: frames and segments alike under every launch."""

import json
from pathlib import Path

import numpy as np
import pytest

from kdcmae_fast.models import from_pretrained

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")

CLIPS, FRAMES = 20, 4  # 8 clips a step: the third step begins another epoch
SYNC = (
    "name=cav_mae_sync", "model.num_registers=2", "model.audio_length=48",
    "model.contrast_head_depth=1", "model.global_local=true", "model.frames_per_clip=2",
    "train.steps=3", "optim.schedule=constant", "optim.warmup=0",
    "data.source=manifest", f"data.num_frames={FRAMES}",
)  # fmt: skip


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    """The list of clips of 1 to 2 s of noise with four frames each, in CAV-MAE's layout."""
    root, rows = tmp_path_factory.mktemp("clips"), []
    for k in range(FRAMES):
        (root / f"frame_{k}").mkdir()
    for clip in range(CLIPS):
        rng = np.random.default_rng(clip)
        sound = rng.normal(size=rng.integers(16_000, 32_000)) * 0.1
        soundfile.write(root / f"{clip}.wav", sound, 16_000)
        for k in range(FRAMES):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"frame_{k}/{clip}.jpg")
        rows.append({"video_id": str(clip), "wav": f"{root}/{clip}.wav", "video_path": str(root)})
    (root / "list.json").write_text(json.dumps({"data": rows}))
    return root / "list.json"


def totals(output: Path) -> list[float]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["total"] for line in lines]


def test_sync_trains_alike_everywhere(launch, listed, tmp_path):
    settings = (*SYNC, f"data.path={listed}")
    launch.run(tmp_path / "one", *settings, fp32=True)
    expected = totals(tmp_path / "one")
    assert len(expected) == 3 and len(set(expected)) == 3
    model = from_pretrained(tmp_path / "one" / "model")
    assert model.name == "cav_mae_sync" and model.config.num_registers == 2
    for name, options in {"two": {"processes": 2}, "sharded": {"zero": 3}}.items():
        launch.run(tmp_path / name, *settings, fp32=True, **options)
        assert totals(tmp_path / name) == pytest.approx(expected, rel=1e-5), name
    launch.run(tmp_path / "legs", *settings, "train.steps=1", fp32=True)
    launch.run(tmp_path / "legs", *settings, "--resume", fp32=True)
    assert totals(tmp_path / "legs") == expected  # to the bit


def test_ten_frames_are_refused_before_anything_is_built(launch, listed, tmp_path):
    settings = (*SYNC, f"data.path={listed}", "data.num_frames=16")
    said = launch.run(tmp_path / "run", *settings, fp32=True, code=1)
    assert "data.num_frames=16: the clips have 4 frames; set data.num_frames=4, or" in said
    assert not (tmp_path / "run" / "log.jsonl").exists()
