"""Parts of fine-tuning on their own: which weights learn how fast, targets, starts, mistakes."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from kdcmae_fast.config import OptimConfig
from kdcmae_fast.config_file import load_settings, settings_of
from kdcmae_fast.data import FrontEnd, make_loader, open_dataset
from kdcmae_fast.data.classes import Classes, LabelledClips, read_classes
from kdcmae_fast.evaluation.classifier_record import ClassifierRecord
from kdcmae_fast.finetune_config import FinetuneConfig, FinetuneRunConfig
from kdcmae_fast.models import build_model
from kdcmae_fast.training.distributed import World
from kdcmae_fast.training.finetuning import Finetuning, LabelledFrontEnd, class_loss
from kdcmae_fast.training.layers import layer_scale, unread_parameters
from kdcmae_fast.training.optimizers import build_optimizer, set_learning_rate
from kdcmae_fast.training.schedule import RunLength, lr_factor
from kdcmae_fast.training.start_model import with_start_model

SIZES = {
    "audio_length": 64, "num_mel_bins": 64, "img_size": 32, "embed_dim": 48, "modality_depth": 2,
    "num_heads": 4, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip


def settings(*arguments, **groups):
    recipe = {"preset": "tiny", "model": SIZES, "train": {"steps": 1}, **groups}
    return load_settings(FinetuneRunConfig, recipe, arguments)


@pytest.fixture
def pretrained(tmp_path):
    """A pretrained model's folder."""
    torch.manual_seed(7)
    build_model("kdc_mae", "tiny", **SIZES).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_settings_read_back():
    config = settings("train.average=[1, 1]", "finetune.mode=audio", "data.eval_clips=9")
    assert load_settings(FinetuneRunConfig, settings_of(config)) == config
    assert config.train.keeps(1) and not config.train.keeps(2)


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("finetune.head_lrr=2", "unknown setting finetune.head_lrr; did you mean finetune.head_lr"),
        ("finetune.layer_decay=1.2", "finetune.layer_decay=1.2: expected at most 1"),
        ("finetune.label_smoothing=1", "finetune.label_smoothing=1.0: expected a value of"),
        ("train.average=[3,2]", r"train.average=\[3, 2\]: expected two epochs"),
        ("data.source=folder data.path=x", "data.source=folder: a folder of videos has no labels"),
        (
            "data.source=sounds data.path=x",
            "data.source=sounds: a classifier is built on",
        ),
        ("data.source=manifest data.path=x", "data.label_csv='': the classes are named there"),
        ("name=kdc_mae", "name=kdc_mae: expected one of cav_mae_classifier"),
    ],
)
def test_settings_that_cannot_work(argument, problem):
    with pytest.raises(ValueError, match=problem):
        settings(*argument.split())


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("cav_mae_classifier", mode) for mode in ("multimodal", "audio", "video")),
        *(("cav_mae_sync_classifier", mode) for mode in ("multimodal", "audio", "video")),
    ],
)
def test_unread_weights_are_those_without_a_gradient(name, mode):
    """Else weight decay under ZeRO would move them: with Adam's by the full rate."""
    sizes = {**SIZES, "modality_depth": 1}
    if "sync" in name:
        sizes |= {"classifier_input": mode, "classifier_depth": 1}
    model = build_model(name, "tiny", num_classes=3, **sizes)
    if "sync" in name:
        logits = model(torch.randn(1, 2, 64, 64), torch.randn(1, 2, 3, 32, 32))
    else:
        logits = model(torch.randn(1, 64, 64), torch.randn(1, 3, 32, 32), mode)
    logits.square().sum().backward()
    without = {key for key, value in model.named_parameters() if value.grad is None}
    assert unread_parameters(model, mode) == without


def test_every_group_keeps_its_multiple_under_every_schedule():
    config = settings("finetune.head_lr=50", "finetune.layer_decay=0.5")
    model = build_model("cav_mae_classifier", "tiny", num_classes=3, **SIZES)
    task = Finetuning(config)
    for optim in (OptimConfig(name="adam"), OptimConfig(name="adamw")):
        optimizer = build_optimizer(model, optim, zero_stage=1, bf16=True, lr_scale=task.lr_scale)
        listed = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        for schedule in ("cosine", "halving", "constant"):
            optim = OptimConfig(schedule=schedule, warmup=0.1, halving_start=1, halving_every=1)
            for step in (0, 3, 9):
                lr = lr_factor(step, total_steps=10, epoch=step // 3, optim=optim)
                set_learning_rate(optimizer, lr)
                for key, scale in (
                    ("head.linear.weight", 50), ("encoder.shared.norm.joint.bias", 1),
                    ("encoder.shared.blocks.0.attn.qkv.weight", 0.5),
                    ("encoder.video.blocks.1.mlp.fc1.weight", 0.25),
                    ("encoder.audio.blocks.0.norm1.weight", 0.125),
                    ("encoder.audio.patch_embed.pos_embed", 0.0625),
                ):  # fmt: skip
                    assert listed[id(model.get_parameter(key))]["lr"] == pytest.approx(lr * scale)


def test_layer_scale_without_decay_leaves_the_trunk_alone():
    model = build_model("cav_mae_classifier", "tiny", num_classes=3, **SIZES)
    scales = {
        layer_scale(name, model.config, FinetuneConfig(head_lr=10))
        for name, _ in model.named_parameters()
    }
    assert scales == {1.0, 10.0}


def test_epochs_end_once():
    length = RunLength(total_steps=8, batches_per_epoch=5, accumulation=2, global_batch=4)
    assert [length.epoch_ended(done) for done in range(1, 9)] == [0, 0, 1, 0, 2, 0, 0, 3]


def test_targets_are_mixed_as_the_clips_are():
    """The same weight for the frames and for the labels, and the rule of CAV-MAE's smoothing."""
    config = settings(data={"mixup": 1.0, "num_clips": 16, "num_workers": 0})
    dataset = LabelledClips(open_dataset(config.data, config.model, seed=0))
    raw = next(iter(make_loader(dataset, data=config.data, seed=0, micro_batch_size=6)))
    front_end = LabelledFrontEnd(settings("finetune.label_smoothing=0.1"), 8)
    batch = front_end(raw, torch.device("cpu"))
    assert torch.equal(batch.fbank, FrontEnd(config.data, config.model)(raw).fbank)
    mixed = raw.augment.mixed
    assert len(mixed.rows) == 6
    for row, weight in enumerate(mixed.weights.tolist()):
        expected = torch.full((8,), 0.1 / 8)
        expected[raw.labels[row]] += 0.9 * weight
        expected[mixed.classes[row, 0]] += 0.9 * (1 - weight)
        torch.testing.assert_close(batch.targets[row], expected)
        picture = weight * raw.frames[row].double() + (1 - weight) * mixed.frames[row].double()
        assert (batch.frames[row].double() - picture).abs().max() <= 0.501


@pytest.mark.parametrize("mode", ["multimodal", "audio", "video", "missing_video", "missing_audio"])
def test_frames_of_a_clip_are_each_frame_alone(mode):
    """One pass over (B, T) frames, the sound's stream once, in fp64."""
    model = build_model("cav_mae_classifier", "tiny", num_classes=3, **SIZES).double()
    fbank = torch.randn(2, 64, 64, dtype=torch.float64)
    frames = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    found = model(fbank, frames, mode)
    if mode in ("audio", "missing_video"):
        torch.testing.assert_close(found, model(fbank, None, mode), rtol=0, atol=0)
        return
    alone = torch.stack([model(fbank, frames[:, t], mode) for t in range(3)], dim=1)
    assert found.shape == (2, 3, 3)
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def test_sync_sees_all_frames_with_the_sound_around_each():
    """From the loader to the loss and to the evaluation."""
    pytest.importorskip("kdcmae_fast.data.pairs")
    model = {**SIZES, "frames_per_clip": 3, "classifier_heads": 4}
    data = {"num_clips": 8, "num_workers": 0, "num_frames": 3, "clip_seconds": 2.0, "mixup": 0.5,
            "eval_clips": 5, "eval_batch_size": 2}  # fmt: skip
    config = settings(name="cav_mae_sync_classifier", model=model, data=data)
    task = Finetuning(config)
    loader = make_loader(
        task.open_clips(), data=config.data, seed=0, micro_batch_size=4, frames_per_clip=3
    )
    batch = task.front_end()(next(iter(loader)), torch.device("cpu"))
    assert (batch.fbank.shape, batch.frames.shape) == ((4, 3, 64, 64), (4, 3, 3, 32, 32))
    classifier = task.initial_model(resumed=False)
    assert task.forward(classifier, batch).total.isfinite()
    figures = task._evaluate(classifier, World(0, 1, torch.device("cpu")))
    assert (figures["num_clips"], figures["num_frames"]) == (5, 3)
    with pytest.raises(ValueError, match="model.classifier_input=multimodal: finetune.mode=audio"):
        settings("finetune.mode=audio", name="cav_mae_sync_classifier")


def test_losses():
    logits, targets = torch.randn(4, 3, dtype=torch.bfloat16), torch.rand(4, 3)
    exact = logits.double()
    found = class_loss(logits, targets, FinetuneConfig(loss="bce"))
    each = -(targets * exact.sigmoid().log() + (1 - targets) * (-exact).sigmoid().log())
    torch.testing.assert_close(found.double(), each.mean(), rtol=1e-6, atol=0)
    found = class_loss(logits, targets, FinetuneConfig())
    each = -(targets * exact.log_softmax(1)).sum(1)
    torch.testing.assert_close(found.double(), each.mean(), rtol=1e-6, atol=0)


def test_the_trunk_comes_from_the_model_and_the_head_is_new(pretrained, tmp_path):
    """Its settings too: the recipe need not repeat them."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {steps: 1}\n")
    arguments = [f"train.init_from={pretrained}", "finetune.freeze_trunk=true"]
    plain = load_settings(FinetuneRunConfig, recipe, arguments)
    config = with_start_model(plain, recipe, arguments)
    assert config.model.embed_dim == 48 and plain.model.embed_dim == 768
    task = Finetuning(config)
    model = task.initial_model(resumed=False)
    state = load_file(pretrained / "model.safetensors")
    for name, value in model.encoder.state_dict().items():
        torch.testing.assert_close(value, state[f"encoder.{name}"], rtol=0, atol=0)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {f"head.{part}" for part in ("norm.weight", "norm.bias", "linear.weight",
                                                   "linear.bias")}  # fmt: skip
    with pytest.raises(ValueError, match=r"model.num_heads=3: train.init_from=.* has 4; leave it"):
        more = [*arguments, "model.num_heads=3"]
        with_start_model(load_settings(FinetuneRunConfig, recipe, more), recipe, more)


def test_models_to_start_from_that_do_not_fit(pretrained, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {steps: 1}\n")

    def start(folder):
        arguments = [f"train.init_from={folder}"]
        return with_start_model(
            load_settings(FinetuneRunConfig, recipe, arguments), recipe, arguments
        )

    build_model("cav_mae_sync", "tiny", **SIZES).save_pretrained(tmp_path / "sync")
    with pytest.raises(ValueError, match="holds a cav_mae_sync, which cav_mae_classifier cannot"):
        start(tmp_path / "sync")
    head = build_model("cav_mae_classifier", "tiny", num_classes=5, **SIZES)
    head.save_pretrained(tmp_path / "five")
    with pytest.raises(ValueError, match="has a head of 5 classes, data.label_csv has 8;"):
        Finetuning(start(tmp_path / "five"))
    head = build_model("cav_mae_classifier", "tiny", num_classes=8, **SIZES)
    head.save_pretrained(tmp_path / "eight")
    other = Classes(tuple("abcdefgh"), tuple("ABCDEFGH"))
    ClassifierRecord("audio", "bce", other).write(tmp_path / "eight")
    with pytest.raises(ValueError, match="trained with other classes: its class 0 is a, that of"):
        Finetuning(start(tmp_path / "eight"))
    weights = pretrained / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Finetuning(start(pretrained)).initial_model(resumed=False)
    with pytest.raises(ValueError, match="is not a model folder: it has no config.json"):
        Finetuning(start(tmp_path)).initial_model(resumed=False)


def test_average_needs_its_epochs():
    task = Finetuning(settings("train.average=[2, 4]"))
    task.check(RunLength(8, 2, 1, 4))
    with pytest.raises(ValueError, match=r"train.average=\[2, 4\]: the run has 3 epochs"):
        task.check(RunLength(6, 2, 1, 4))


def write_labels(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("index", "mid", "display_name"), *rows])
    return str(path)


def test_classes_of_a_csv(tmp_path):
    path = write_labels(tmp_path / "labels.csv", (1, "/m/b", "Cat, small"), (0, "/m/a", "Dog"))
    assert read_classes(path) == Classes(("/m/a", "/m/b"), ("Dog", "Cat, small"))
    path = write_labels(tmp_path / "gap.csv", (0, "/m/a", "Dog"), (2, "/m/b", "Cat"))
    with pytest.raises(ValueError, match=r"gap.csv: class numbers must be 0 to 1, each once; /m/b"):
        read_classes(path)


def test_labels_that_are_not_the_manifest_s(tmp_path):
    """A label that the CSV lacks, and an evaluation list without labels, before any work."""
    row = {"video_id": "x", "wav": "x.wav", "video_path": "frames", "labels": "/m/a"}
    lists = {}
    for name, labels in (("train", "/m/a"), ("other", "/m/z"), ("none", None)):
        lists[name] = tmp_path / f"{name}.json"
        lists[name].write_text(json.dumps({"data": [{**row, "labels": labels}]}))
    labels = write_labels(tmp_path / "labels.csv", (0, "/m/a", "Dog"))
    data = {"source": "manifest", "path": str(lists["train"]), "label_csv": labels}
    Finetuning(settings(data=data))
    with pytest.raises(ValueError, match="label '/m/z' is not in the label CSV"):
        Finetuning(settings(data={**data, "eval_path": str(lists["other"])}))
    with pytest.raises(ValueError, match="'labels' must be text, got None"):
        Finetuning(settings(data={**data, "path": str(lists["none"])})).open_clips()
