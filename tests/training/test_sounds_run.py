"""Pretraining on sound alone through the engine: own losses only, on one process and on two."""

import json

import numpy as np
import pytest
import soundfile

from kdcmae_fast.config import ModelConfig
from kdcmae_fast.config_file import load_config
from kdcmae_fast.models import from_pretrained
from kdcmae_fast.training.run import check_modalities

SOUND = ("model.modalities=audio", "data.source=sounds", "train.steps=2", "optim.schedule=constant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for number in range(20):
        soundfile.write(path / f"{number:02d}.wav", 0.1 * rng.normal(size=5000), 16_000)
    return path


def test_sound_alone_trains_alike_on_one_process_and_two(launch, folder, tmp_path):
    totals = {}
    for name, options in {"one": {"zero": 2}, "two": {"processes": 2, "zero": 3}}.items():
        launch.run(tmp_path / name, *SOUND, f"data.path={folder}", fp32=True, **options)
        records = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert {"mae_audio", "kd"} <= set(records[0])
        assert not {"mae_video", "contrastive"} & set(records[0])
        totals[name] = [record["total"] for record in records]
    assert totals["two"] == pytest.approx(totals["one"], rel=1e-5)
    assert totals["one"][0] != totals["one"][1]
    model = from_pretrained(tmp_path / "one" / "model")
    assert isinstance(model.config, ModelConfig) and model.config.modalities == "audio"
    assert not any("video" in name for name in model.state_dict())


def test_a_model_of_both_is_refused_sounds():
    config = load_config({"train": {"steps": 1}}, ["data.source=sounds", "data.path=sounds"])
    with pytest.raises(ValueError, match="data.source=sounds has no pictures.*modalities=audio"):
        check_modalities(config)
