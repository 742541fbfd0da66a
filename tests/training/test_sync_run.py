"""CAV-MAE Sync through the engine: its tokens under ZeRO 3, its contrast over processes."""

import json

import pytest

from kdcmae_fast.models import from_pretrained

SYNC = (
    "name=cav_mae_sync", "model.num_registers=2", "model.audio_length=48",
    "model.contrast_head_depth=1", "model.global_local=true",
    "train.steps=2", "optim.schedule=constant", "optim.warmup=0",
)  # fmt: skip


def totals(output):
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["total"] for line in lines]


def test_sync_trains_alike_everywhere(launch, tmp_path):
    launch.run(tmp_path / "one", *SYNC, fp32=True)
    expected = totals(tmp_path / "one")
    assert len(expected) == 2 and expected[0] != expected[1]
    model = from_pretrained(tmp_path / "one" / "model")
    assert model.name == "cav_mae_sync" and model.config.num_registers == 2
    for name, options in {"two": {"processes": 2}, "sharded": {"zero": 3}}.items():
        launch.run(tmp_path / name, *SYNC, fp32=True, **options)
        assert totals(tmp_path / name) == pytest.approx(expected, rel=1e-5), name
