"""From a model folder to metrics: where the clips' settings come from, what is written."""

import json

import pytest

from kdcmae_fast.evaluation.reconstruction import reconstruct
from kdcmae_fast.evaluation.retrieval import retrieval_table, retrieve
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    data_settings,
    model_folder,
    pick_device,
)

RUN = {"config": {"data": {"dataset_mean": -4.0}, "train": {"seed": 7}}, "deepspeed": {}}


def test_retrieve_writes_what_it_returns(model_folder, tmp_path):
    source = EvaluationSource(checkpoint=str(model_folder), num_clips=13, batch_size=5)
    metrics = retrieve(source, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert metrics["num_clips"] == 13
    assert metrics["chance"]["R@1"] == 1 / 13
    assert metrics["clips_of"] == "synthetic, heldout"
    table = retrieval_table(metrics)
    assert "times chance (1 of 13 clips: synthetic, heldout; ties: average)" in table
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["audio", "video", "chance"]
    assert retrieve(source)["audio_to_video"] == metrics["audio_to_video"]


def test_reconstruct_draws_a_picture_per_clip(model_folder, tmp_path):
    source = EvaluationSource(checkpoint=str(model_folder.parent), num_clips=3, batch_size=2)
    metrics = reconstruct(source, tmp_path / "out")
    names = [clip["picture"] for clip in metrics["clips"]]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == names
    assert len(set(names)) == 3
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert set(metrics["mean_error"]) == {"audio", "video"}


def test_settings_come_from_the_run_then_recipe_then_arguments(tmp_path):
    folder = tmp_path / "model"
    assert data_settings(folder, None)[1:] == (0, "defaults")
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    data, seed, origin = data_settings(folder, None)
    assert (data.dataset_mean, seed, origin) == (-4.0, 7, str(tmp_path / "config.json"))
    data, seed, _ = data_settings(folder, None, ["data.num_clips=3", "train.seed=9"])
    assert (data.dataset_mean, data.num_clips, seed) == (-4.0, 3, 9)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: tiny\ndata: {dataset_std: 2.0}\ntrain: {epochs: 3}\n")
    data, seed, origin = data_settings(folder, str(recipe))
    assert (data.dataset_mean, data.dataset_std, seed, origin) == (-5.081, 2.0, 0, str(recipe))


def test_a_model_folder_s_neighbour_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "cav_mae", "config": {"img_size": 32}}')
    assert data_settings(tmp_path / "model", None)[2] == "defaults"


@pytest.mark.parametrize("override", ["model.img_size=64", "train.steps=4", "dat.num_clips=3"])
def test_only_clip_settings_are_taken(tmp_path, override):
    with pytest.raises(ValueError, match=f"argument {override}: only data.key=value"):
        data_settings(tmp_path, None, [override])


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        model_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        model_folder(tmp_path)


def test_a_classifier_is_refused(make_model, tmp_path):
    make_model("cav_mae_classifier", num_classes=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a cav_mae_classifier; give a pretrained model"):
        retrieve(EvaluationSource(checkpoint=str(tmp_path)))


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="--device gpu is no device"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="--device cuda:99 is not here"):
        pick_device("cuda:99")


def test_each_process_of_a_launcher_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert str(pick_device("auto")) == "cuda"
    for local_rank, device in (("0", "cuda:0"), ("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert str(pick_device("auto")) == device
