"""Recipes, arguments and DeepSpeed's JSON: what is accepted, and the message for what is not."""

import json
from pathlib import Path

import pytest

from kdcmae_fast.config import PRESETS, RunConfig
from kdcmae_fast.config_file import load_config, load_settings, settings_of
from kdcmae_fast.finetune_config import FinetuneRunConfig
from kdcmae_fast.training.deepspeed_config import for_engine, load_deepspeed_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MINIMAL = {"train": {"steps": 5}}


def error_of(recipe, *arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(recipe, arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_layers_in_order(tmp_path):
    """System and preset lie under the recipe, arguments on top."""
    plain = load_config(MINIMAL)
    assert (plain.model.num_views, plain.model.distill.on) == (2, "joint")
    assert load_config({**MINIMAL, "name": "cav_mae"}).model.num_views == 1
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "preset: tiny\n"
        "model: {num_heads: 6, distill: {on: off, temperature: 2}}\n"
        "optim: {lr: 1e-4, betas: [0.8, 0.9]}\n"
        "train: {steps: 5}\n"
    )
    config = load_config(path, ["model.num_heads=4", "optim.betas=[0.7, 0.9]", "train.epochs=3"])
    assert config.model.embed_dim == PRESETS["tiny"]["embed_dim"]
    assert config.model.num_heads == 4
    assert (config.model.distill.on, config.model.distill.temperature) == ("off", 2.0)
    assert (config.optim.lr, config.optim.betas) == (1e-4, (0.7, 0.9))
    assert (config.train.steps, config.train.epochs) == (None, 3)


def test_text_is_taken_as_it_stands():
    config = load_config(MINIMAL, ["data.path=12: a #b", "model.distill.on=off"])
    assert config.data.path == "12: a #b"
    assert config.model.distill.on == "off"


def test_settings_round_trip():
    config = load_config(MINIMAL, ["preset=small", "model.audio_mask_ratio=0.8"])
    assert load_config(settings_of(config)) == config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.embed_dmi=3", "unknown setting model.embed_dmi; did you mean model.embed_dim?"),
        ("modle.embed_dim=3", "unknown setting modle; did you mean model?"),
        ("lr=3", "unknown setting lr; did you mean optim.lr?"),
        ("model.distill.onn=joint", "did you mean model.distill.on?"),
        ("model.embed_dim=wide", 'model.embed_dim="wide": expected a whole number'),
        ("train.steps=1.5", "train.steps=1.5: expected a whole number"),
        ("train.steps=true", "train.steps=true: expected a whole number"),
        ("optim.lr=fast", 'optim.lr="fast": expected a number'),
        ("model.symmetric=yes", 'model.symmetric="yes": expected true or false'),
        ("optim.betas=0.9", "optim.betas=0.9: expected a list"),
        ("optim.name=sgd", "optim.name=\"sgd\": expected one of 'adam', 'adamw'"),
        ("model=3", "model=3: expected a group of settings"),
        ("name=mae", "name=mae: expected one of cav_mae, kdc_mae, cav_mae_sync"),
        ("preset=huge", "preset=huge: expected one of tiny, small, base, large"),
    ],
)
def test_unknown_keys_and_wrong_types(argument, message):
    text = error_of(MINIMAL, argument)
    assert text.startswith(f"argument {argument}: ")
    assert message in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.embed_dim=100", "model.embed_dim=100: expected a multiple of num_heads=12"),
        ("model.img_size=100", "model.img_size=100: expected a multiple of patch_size=16"),
        ("model.num_views=5", "5 complementary views of 128 audio tokens do not fit into 512"),
        ("model.num_views=1", "distill.on=joint needs two views"),
        ("model.mask_ratio=1.5", "model.mask_ratio=1.5: expected a value from 0 to 1"),
        ("model.mask_ratio=1.0", "leaves none of 512 audio tokens"),
        ("model.temperature=0", "model.temperature=0.0: expected a value above 0"),
        ("optim.lr=.nan", "optim.lr=nan: expected a value above 0"),
        ("optim.betas=[0.9, 1.0]", "optim.betas=[0.9, 1.0]: expected two values in [0, 1)"),
        ("data.source=folder", "data.source=folder needs data.path"),
        ("train.log_every=0", "train.log_every=0: expected a value above 0"),
    ],
)
def test_impossible_values(argument, message):
    assert message in error_of(MINIMAL, argument)


@pytest.mark.parametrize(
    ("argument", "owner"),
    [
        ("train.batch_size=4", "ds.train_micro_batch_size_per_gpu=..."),
        ("optim.gradient_clipping=1", "ds.gradient_clipping=..."),
        ("train.precision=bf16", "ds.bf16.enabled=..."),
        ("gradient_accumulation_steps=2", "ds.gradient_accumulation_steps=..."),
    ],
)
def test_what_deepspeed_owns(argument, owner):
    text = error_of(MINIMAL, argument)
    assert "DeepSpeed's JSON owns it" in text and owner in text


def test_length_must_be_given_once():
    assert "must say how long to train" in error_of({})
    assert "epochs=3 is set too" in error_of({"train": {"steps": 5, "epochs": 3}})
    assert "epochs=3 is set too" in error_of({}, "train.steps=5", "train.epochs=3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\n", ", line 2: "),
        ("train: {steps: 5}\ntrain: {steps: 6}\n", ", line 2: train is set twice"),
        ("- 1\n", "expected `key: value` lines, found list"),
        ("train: !!python/object:os.system {}\n", "could not determine a constructor"),
    ],
)
def test_broken_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message in error_of(path)
    assert str(path) in error_of(path)


def test_the_projects_own_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/kdc_mae.yaml", ["data.path=a.json"]).name == "kdc_mae"
    with pytest.raises(FileNotFoundError):
        load_config("kdc_mae.yaml")
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "configs" / "kdc_mae.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/kdc_mae.yaml").write_text("name: cav_mae\ntrain: {steps: 1}\n")
    assert load_config("configs/kdc_mae.yaml").name == "cav_mae"


def test_malformed_argument():
    assert "expected key=value" in error_of(MINIMAL, "train.steps")
    assert "is not a YAML value" in error_of(MINIMAL, "train.steps=[1")


FINETUNING = sorted(CONFIGS.glob("finetune_*.yaml"))
PRETRAINING = sorted(set(CONFIGS.glob("*.yaml")) - set(FINETUNING))


@pytest.mark.parametrize("recipe", FINETUNING, ids=lambda path: path.stem)
def test_committed_fine_tuning_recipes(recipe):
    """Rates, epochs and batches of the table in the CAV-MAE scripts."""
    demo = recipe.stem == "finetune_demo"
    data = [] if demo else ["data.path=train.json", "data.label_csv=labels.csv"]
    config = load_settings(FinetuneRunConfig, recipe, data)
    if not demo:
        found = (
            config.optim.lr, config.finetune.head_lr, config.train.epochs,
            config.optim.halving_start, config.train.average, config.data.sampling,
            config.finetune.loss,
        )  # fmt: skip
        assert (
            found
            == {
                "finetune_audioset20k": (5e-5, 100, 15, 5, (3, 15), "uniform", "bce"),
                "finetune_audioset2m": (1e-5, 50, 10, 2, (1, 10), "balanced", "bce"),
                "finetune_vggsound": (1e-4, 10, 10, 2, (3, 10), "balanced", "cross_entropy"),
                "finetune_sync_audioset20k": (2e-4, 100, 25, 10, (13, 25), "uniform", "bce"),
            }[recipe.stem]
        )
        assert config.optim.betas == (0.95, 0.999) and config.optim.weight_decay == 5e-7
        assert config.finetune.label_smoothing == 0.1
    if not demo and not config.pairs_frames:
        augmented = (config.data.mixup, config.data.freq_mask, config.data.time_mask)
        assert (*augmented, config.data.noise) == (0.5, 48, 192, True)


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda path: path.stem)
def test_committed_recipes(recipe):
    config = load_config(recipe, ["data.path=clips.json"])
    assert isinstance(config, RunConfig)
    if config.data.source != "synthetic" and recipe.stem != "fsdd":  # a published training
        assert config.optim.betas == (0.95, 0.999)
        assert (config.optim.weight_decay, config.train.epochs) == (5e-7, 25)
        rates = {"cav_mae_scale": 1e-4, "cav_mae_sync": 2e-4}
        assert config.optim.lr == rates.get(recipe.stem, 5e-5)


def test_cav_mae_sync_recipe():
    """The system alone gives what the recipe spells out."""
    recipe = load_config(CONFIGS / "cav_mae_sync.yaml", ["data.path=clips.json"])
    assert recipe.model == load_config({**MINIMAL, "name": "cav_mae_sync"}).model
    assert (recipe.model.audio_length, recipe.data.num_frames) == (416, 16)
    assert (recipe.optim.schedule, recipe.optim.warmup) == ("cosine", 0.1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_committed_deepspeed_configs(stage):
    config = load_deepspeed_config(CONFIGS / f"zero{stage}.json", ["ds.gradient_clipping=0.5"])
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is True
    assert for_engine(config, load_universal=True)["checkpoint"] == {"load_universal": True}
    assert "checkpoint" not in config
    assert for_engine(config, load_universal=False)["gradient_clipping"] == 0.5


def test_gradients_are_clipped_only_on_request():
    """DeepSpeed itself takes 1.0 where its JSON says nothing."""
    ours = for_engine({"train_micro_batch_size_per_gpu": 1}, load_universal=False)
    assert ours["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer does not belong in DeepSpeed's JSON; use opt"),
        ({"scheduler": {}}, "scheduler does not belong in DeepSpeed's JSON; use optim.schedule"),
        ({"train_batch_size": 8}, "train_batch_size does not belong"),
        ({"gradient_cliping": 1}, "unknown DeepSpeed setting gradient_cliping; did you mean gradi"),
        ({"fp16": {"enabled": True}}, "use bf16.enabled=true, or fp32"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "expected a whole number of 1 or more"),
        ({"zero_optimization": {"stage": 4}}, "expected 0, 1, 2 or 3"),
        ({"bf16": {"enabled": True}}, "stage=0 with bf16 keeps no fp32 master weights"),
        ({"gradient_clipping": "hard"}, "gradient_clipping=hard: expected a number of 0 or more"),
    ],
)
def test_deepspeed_errors(tmp_path, change, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, **change}))
    with pytest.raises(ValueError) as caught:
        load_deepspeed_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_deepspeed_argument_errors(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu is missing"):
        load_deepspeed_config(path)
    with pytest.raises(ValueError, match="^argument ds.optimizer.lr=1: optimizer does not belong"):
        load_deepspeed_config(path, ["ds.optimizer.lr=1"])
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        load_deepspeed_config(path)
