"""The command line on one process: what it writes, what it repeats, what it refuses."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kdcmae_fast.config import OptimConfig, RunConfig
from kdcmae_fast.config_file import load_config, load_settings, settings_of
from kdcmae_fast.finetune_config import FinetuneRunConfig
from kdcmae_fast.models import from_pretrained
from kdcmae_fast.training import run_folder
from kdcmae_fast.training.checkpoint import read_progress
from kdcmae_fast.training.deepspeed_config import check_zero_settings
from kdcmae_fast.training.optimizers import build_optimizer
from kdcmae_fast.training.schedule import RunLength


def test_run_folder(launch, reference):
    written = {path.name for path in reference.iterdir()}
    assert {"config.json", "log.jsonl", "metrics.json", "tensorboard", "checkpoints"} <= written
    assert list((reference / "tensorboard").iterdir())
    metrics = json.loads((reference / "metrics.json").read_text())
    assert (metrics["steps"], metrics["samples"], metrics["world_size"]) == (6, 48, 1)
    assert metrics["final_losses"]["total"] < metrics["start_losses"]["total"]
    assert metrics["clips_per_second"] > 0
    assert metrics["bad_clips"] == []
    assert metrics["versions"]["torch"] == torch.__version__
    config = json.loads((reference / "config.json").read_text())
    assert config["config"]["model"]["embed_dim"] == 48
    assert config["deepspeed"]["zero_optimization"]["stage"] == 2
    assert [path.name for path in (reference / "checkpoints").glob("step_*")] == ["step_6"]
    assert (reference / "checkpoints" / "latest").read_text() == "step_6"


def test_final_weights_are_the_fp32_masters(reference):
    model = from_pretrained(reference / "model")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    weights = load_file(reference / "model" / "model.safetensors")
    rounded = [torch.equal(w, w.bfloat16().float()) for w in weights.values() if w.ndim > 1]
    assert not any(rounded)


def test_same_seed_same_bits_and_exact_resume(launch, reference, losses_of, tmp_path):
    """A second run, then its last two steps again from a checkpoint (bf16, ZeRO 2)."""
    output = tmp_path / "run"
    launch.run(output, "train.checkpoint_every=2", "train.keep_checkpoints=3")
    assert losses_of(output) == losses_of(reference)
    for lost in ("checkpoints/step_6", "model", "metrics.json"):
        (output / lost).rename(tmp_path / lost.replace("/", "_"))
    text = launch.run(output, "--resume")
    assert "step_4" in text and "step 5/6" in text and "step 4/6" not in text
    assert losses_of(output) == losses_of(reference)
    expected = load_file(reference / "model" / "model.safetensors")
    weights = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_zero_stages_agree(launch, reference, assert_close, tmp_path):
    for stage in (1, 3):
        launch.run(tmp_path / f"zero{stage}", zero=stage)
        assert_close(tmp_path / f"zero{stage}", reference, 2e-2)


def test_accumulation_sees_the_same_clips_under_the_same_masks(
    launch, reference, losses_of, tmp_path
):
    """Two micro steps of four equal one of eight, but for the number of negatives."""
    launch.run(tmp_path / "run", "ds.gradient_accumulation_steps=2", "train.steps=1", batch=4)
    first, whole = losses_of(tmp_path / "run")[1], losses_of(reference)[1]
    for name in ("mae_audio", "mae_video", "kd"):
        assert first[name] == pytest.approx(whole[name], rel=1e-2)
    assert first["contrastive"] < whole["contrastive"]


def test_finished_run_says_so(launch, reference):
    assert "the run is finished, nothing to do" in launch.run(reference, "--resume")


def test_mistakes_show_before_any_work(launch, tmp_path):
    """One line on stderr, exit code 1, nothing written."""
    text = launch.run(tmp_path / "run", "model.embed_dmi=3", code=1)
    assert text == (
        "error: argument model.embed_dmi=3: unknown setting model.embed_dmi; "
        "did you mean model.embed_dim?\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_back_end_that_cannot_run_shows_before_any_work(launch, tmp_path):
    text = launch.run(tmp_path / "run", "model.attention_impl=flash_attn", code=1)
    assert (
        text.strip()
        .splitlines()[-1]
        .startswith("error: model.attention_impl=flash_attn: not available for this run: ")
    )
    assert not (tmp_path / "run").exists()


def test_a_lost_config_is_named(launch, reference, tmp_path):
    """Nothing stands in for it: --resume would go on with the demo's settings."""
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    (output / "config.json").unlink()
    text = launch.run(output, "--resume", "train.steps=8", code=1)
    assert text.strip().splitlines()[-1] == (
        f"error: {output}/config.json is missing, but {output} holds a run that reached step_6; "
        f"restore it from settings in {output}/checkpoints/step_6/state.json"
    )
    assert not (output / "config.json").exists()


def test_a_run_is_neither_overwritten_nor_bent(reference):
    with pytest.raises(ValueError, match="holds a run that reached step_6; pass --resume"):
        run_folder.find_checkpoint(reference, resume=False)
    checkpoint = run_folder.find_checkpoint(reference, resume=True)
    saved = json.loads((reference / "config.json").read_text())["config"]
    with pytest.raises(ValueError, match=r"optim.lr was 0.001, now 0.0001;"):
        run_folder.check_same_run(reference, load_config(saved, ["optim.lr=1e-4"]))
    free = ["train.steps=8", "data.max_bad_share=0.5", "model.activation_checkpointing=true"]
    run_folder.check_same_run(reference, load_config(saved, free))
    progress = read_progress(checkpoint)
    run_folder.check_layout(progress, RunLength(8, 8, 1, 8), zero_stage=1)
    with pytest.raises(ValueError, match="took 8 clips a step on 1 processes, .* would take 4;"):
        run_folder.check_layout(progress, RunLength(8, 8, 1, 4), zero_stage=2)
    with pytest.raises(ValueError, match=r"pass ds.zero_optimization.stage=2"):
        run_folder.check_layout(progress, RunLength(8, 8, 1, 8), zero_stage=3)
    with pytest.raises(ValueError, match="has done 6 steps, more than the 4 asked for"):
        run_folder.check_layout(progress, RunLength(4, 8, 1, 8), zero_stage=2)


@pytest.mark.parametrize(
    ("kind", "name", "gone", "changed"),
    [
        (RunConfig, "kdc_mae", ["model.norm_pix_loss", "data.events"], "data.events=true"),
        # Groups, and what the system rather than the field says: two views, 416 rows.
        (RunConfig, "kdc_mae", ["model.distill", "model.num_views"], "model.num_views=3"),
        (RunConfig, "cav_mae_sync", ["model.audio_length"], "model.audio_length=1024"),
        (FinetuneRunConfig, "cav_mae_classifier", ["finetune.layer_decay", "train.average"],
         "finetune.layer_decay=0.5"),
    ],
)  # fmt: skip
def test_a_run_older_than_a_setting_goes_on(tmp_path, kind, name, gone, changed):
    recipe = {"name": name, "preset": "tiny", "train": {"steps": 4}}
    saved = settings_of(load_settings(kind, recipe))
    for key in gone:
        *groups, last = key.split(".")
        del functools.reduce(dict.__getitem__, groups, saved)[last]
    record = {"config": saved, "deepspeed": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    run_folder.check_same_run(tmp_path, load_settings(kind, recipe))
    run_folder.check_same_run(tmp_path, load_settings(kind, saved))  # as --resume alone reads it
    key, _, value = changed.partition("=")
    with pytest.raises(ValueError, match=rf"settings, but {key} was \S+, now {value.title()};"):
        run_folder.check_same_run(tmp_path, load_settings(kind, recipe, [changed]))
    saved["model"]["gone_since"] = 3
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"but model.gone_since was 3, now None;"):
        run_folder.check_same_run(tmp_path, load_settings(kind, recipe))


@pytest.mark.parametrize(("text", "problem"), [("{", "is not JSON"), ("{}", "is not a run's")])
def test_a_spoilt_config_is_named(tmp_path, text, problem):
    assert run_folder.saved_settings(tmp_path) is None
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json {problem}"):
        run_folder.saved_settings(tmp_path)


@pytest.mark.parametrize(
    ("group", "key", "value", "problem"),
    [
        ("zero_optimization", "stagee", 2, "unknown DeepSpeed setting; did you mean stage"),
        ("zero_optimization", "reduce_bucket_size", -3, "Input should be greater than"),
        ("bf16", "enable", 1, "unknown DeepSpeed setting; did you mean enabled"),
    ],
)
def test_zero_settings_are_checked(group, key, value, problem):
    check_zero_settings({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    with pytest.raises(ValueError, match=f"ds.{group}.{key}={value}: {problem}"):
        check_zero_settings({group: {key: value}})


def test_a_damaged_checkpoint_is_named(launch, reference, tmp_path):
    """Damage that keeps the sizes; what kills leave behind is passed over instead."""
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    (output / "metrics.json").unlink()
    (states,) = (output / "checkpoints" / "step_6").glob("*optim_states.pt")
    states.write_bytes(bytes(states.stat().st_size))
    text = launch.run(output, "--resume", "train.steps=8", code=1)
    line = text.strip().splitlines()[-1]
    assert line.startswith(f"error: {output}/checkpoints/step_6: damaged (")


@pytest.mark.parametrize("name", ["lamb", "apex_fused_lamb"])
def test_absent_optimizers_are_named(name):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ds.zero_optimization.stage=0"):
        build_optimizer(model, OptimConfig(name=name), zero_stage=2, bf16=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=f"optim.name={name}: runs on CUDA only"):
            build_optimizer(model, OptimConfig(name=name), zero_stage=0, bf16=False)


def test_decay_groups():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model.token = torch.nn.Parameter(torch.zeros(1, 1, 2))
    optim = OptimConfig(name="adamw", weight_decay=0.1)
    groups = build_optimizer(model, optim, zero_stage=1, bf16=True).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (4, 0.0)]
    optim = OptimConfig(name="adam", weight_decay=0.1)
    groups = build_optimizer(model, optim, zero_stage=1, bf16=True).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(5, 0.1)]


def test_published_adam_and_start_weights(launch, reference, losses_of, tmp_path):
    """CAV-MAE with Adam and L2, starting from another run's model folder; with a profile."""
    text = launch.run(
        tmp_path / "run", "optim.name=adam", "optim.weight_decay=5e-7",
        "optim.schedule=halving", "optim.warmup=0", f"train.init_from={reference / 'model'}",
        "train.epochs=1", "--profile",
    )  # fmt: skip
    assert "error" not in text
    losses = losses_of(tmp_path / "run")
    assert losses[1]["total"] < losses_of(reference)[3]["total"]
    assert len(losses) == 8
    trace = json.loads((tmp_path / "run" / "profile" / "rank_0.json").read_text())
    assert {"forward", "backward"} <= {event.get("name") for event in trace["traceEvents"]}


def test_non_finite_loss_stops_the_run(launch, tmp_path):
    text = launch.run(
        tmp_path / "run", "optim.lr=1e38", "optim.schedule=constant", "optim.warmup=0", code=1
    )
    line = text.strip().splitlines()[-1]
    assert line.startswith("error: step ")
    assert "the loss term mae_audio is" in line
    assert not (tmp_path / "run" / "model").exists()
