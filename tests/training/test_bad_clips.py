"""Clips that cannot be read: trained around, named in the report, too many stop every process."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from kdcmae_fast.training.checkpoint import complete_checkpoints, read_progress
from kdcmae_fast.training.report import read_log

RATE = 16_000


@pytest.fixture
def manifest(tmp_path):
    """Twelve clips of noise, one of them without its sound file and one of digital silence."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(12):
        video_id = f"clip_{number:02d}"
        frame = tmp_path / "frame_0" / f"{video_id}.jpg"
        frame.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(frame)
        wav = tmp_path / f"{video_id}.wav"
        if number != 5:
            wave = 0.1 * rng.standard_normal(RATE) * (number != 9)
            soundfile.write(wav, wave, RATE)
        entries.append(
            {"video_id": video_id, "wav": str(wav), "video_path": str(tmp_path), "labels": ""}
        )
    path = tmp_path / "clips.json"
    path.write_text(json.dumps({"data": entries}))
    return path


def test_bad_clips_are_named_and_limited(launch, manifest, tmp_path):
    output = tmp_path / "run"
    settings = ("data.source=manifest", f"data.path={manifest}", "data.num_frames=1")
    few = ("data.max_bad_share=0.2", "train.epochs=4", "train.log_every=2")
    text = launch.run(output, *settings, *few, processes=2, batch=4)
    rows = [json.loads(line) for line in (output / "bad_clips.jsonl").read_text().splitlines()]
    reasons = {row["video_id"]: row["reason"] for row in rows}
    assert set(reasons) == {"clip_05", "clip_09"}
    assert "clip_05.wav" in reasons["clip_05"] and "silen" in reasons["clip_09"]
    assert json.loads((output / "metrics.json").read_text())["bad_clips"] == rows
    for video_id, reason in reasons.items():
        assert text.count(f"bad clip {video_id}: {reason}") == 1

    strict = tmp_path / "strict"
    text = launch.run(strict, *settings, "data.max_bad_share=0.1", batch=4, code=1)
    assert "error: 2 bad clips among" in text and "data.max_bad_share=0.1 allows" in text
    (saved,) = complete_checkpoints(strict / "checkpoints")
    assert read_progress(saved).step == read_log(strict / "log.jsonl")[-1]["step"]
