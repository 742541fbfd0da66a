"""Fine-tuning by the command line: what it writes, ranks, resuming, ZeRO stages, the average."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kdcmae_fast import cli
from kdcmae_fast.data import open_dataset
from kdcmae_fast.evaluation.class_evaluation import Evaluation, evaluate_classifier
from kdcmae_fast.evaluation.classification import ClassifySource, classify
from kdcmae_fast.evaluation.retrieval import retrieve
from kdcmae_fast.evaluation.source import EvaluationSource
from kdcmae_fast.finetune_config import FinetuneDataConfig
from kdcmae_fast.models import build_model, from_pretrained

CLIPS = 13  # evaluated, in batches of 2: with two ranks the last round leaves one without a batch

RECIPE = f"""
finetune: {{head_lr: 10, layer_decay: 0.7, label_smoothing: 0.1}}
data:
  num_clips: 24
  num_workers: 0
  sampling: balanced
  mixup: 0.5
  freq_mask: 8
  time_mask: 8
  noise: true
  eval_clips: {CLIPS}
  eval_frames: 3
  eval_batch_size: 2
optim: {{lr: 1e-3, name: adam, schedule: halving, halving_start: 1, halving_every: 1, warmup: 0}}
train: {{epochs: 2, log_every: 1, checkpoint_every: 0, average: [1, 2]}}
"""
FIGURES = ("top1", "top5", "mean_class_accuracy", "confusion", "class_accuracy", "num_clips")


@pytest.fixture(scope="session")
def recipe(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "finetune.yaml"
    path.write_text(tiny_model + RECIPE)
    return path


@pytest.fixture(scope="session")
def tune(launch, recipe):
    """tune(output, *settings, ...): fine-tune as a user would, to the end."""

    def run(*arguments, **options):
        return launch.run(*arguments, script="finetune", recipe=recipe, **options)

    return run


@pytest.fixture(scope="session")
def run(tune, tmp_path_factory):
    """An uninterrupted fp32 run on one process."""
    output = tmp_path_factory.mktemp("finetuned") / "run"
    tune(output, fp32=True)
    return output


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def log_of(folder):
    """The log without what a clock says."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if k not in ("clips_per_second", "seconds_left")}
        for record in records
    ]


def test_run_folder(run):
    metrics = metrics_of(run)
    assert (metrics["command"], metrics["steps"], metrics["num_clips"]) == ("finetune", 6, CLIPS)
    assert sum(map(sum, metrics["confusion"])) == CLIPS
    assert len(metrics["class_names"]) == 8 and metrics["headline"]["chance"] == 1 / 8
    assert [r["step"] for r in log_of(run) if "eval/top1" in r] == [3, 6]
    assert log_of(run)[-1]["eval/top1"] == metrics["headline"]["top-1"]
    assert log_of(run)[-1]["lr"] == 5e-4  # of the trunk, from the second epoch on
    for name in ("model", "epochs/1", "epochs/2", "average"):
        assert from_pretrained(run / name).num_classes == 8
        assert json.loads((run / name / "classifier.json").read_text())["loss"] == "cross_entropy"


def test_average_is_the_mean_of_the_epochs(run):
    files = [load_file(run / "epochs" / str(n) / "model.safetensors") for n in (1, 2)]
    mean = load_file(run / "average" / "model.safetensors")
    last = load_file(run / "model" / "model.safetensors")
    for key, tensor in mean.items():
        exact = (files[0][key].double() + files[1][key].double()) / 2
        assert torch.equal(tensor, exact.float())
        assert torch.equal(files[1][key], last[key])
    assert metrics_of(run)["average"]["epochs"] == [1, 2]
    found = classify(ClassifySource(checkpoint=str(run / "average"), device="cpu"))
    assert found["top1"] == metrics_of(run)["average"]["top1"]


def test_classify_repeats_the_evaluation(run, tmp_path, capsys):
    """And is what the probabilities of every frame alone average to."""
    output = tmp_path / "out"
    arguments = ["classify", "--checkpoint", str(run), "--device", "cpu", "--output", str(output)]
    assert cli.main(arguments) == 0
    assert f"{CLIPS} clips (synthetic, heldout), 3 frames each" in capsys.readouterr().out
    found = metrics_of(output)
    assert {name: found[name] for name in FIGURES} == {n: metrics_of(run)[n] for n in FIGURES}
    assert (output / found["pictures"][0]["file"]).is_file()

    model = from_pretrained(run / "model")
    data = FinetuneDataConfig(eval_clips=CLIPS)
    dataset = open_dataset(data, model.config, seed=0, split="heldout")
    right = 0
    for index in range(CLIPS):
        clip = dataset.read_frames(index, 3)
        fbank = front_end(model, data).fbank(clip.waveform[None])
        each = [model(fbank, clip.frames[k : k + 1]).softmax(-1) for k in range(3)]
        right += int(sum(each).argmax() == clip.label)
    assert found["top1"] == right / CLIPS


def front_end(model, data):
    from kdcmae_fast.data import FrontEnd

    return FrontEnd(data, model.config)


def test_two_processes_equal_one(tune, run, tmp_path):
    """fp32, 1 x 8 clips and 2 x 4: the same training, no clip lost or counted twice."""
    tune(tmp_path / "two", fp32=True, processes=2)
    one, two = metrics_of(run), metrics_of(tmp_path / "two")
    assert {name: two[name] for name in FIGURES} == {name: one[name] for name in FIGURES}
    for left, right in zip(log_of(run), log_of(tmp_path / "two"), strict=True):
        assert right == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_exact_resume_in_bf16(tune, tmp_path, zero):
    """Killed behind a checkpoint in the middle of an epoch: the same bits to the end."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(cut, "train.checkpoint_every=2", "train.keep_checkpoints=3", zero=zero)
    shutil.copytree(cut, whole)
    for lost in ("checkpoints/step_6", "checkpoints/step_4", "model", "metrics.json"):
        (cut / lost).rename(tmp_path / lost.replace("/", "_"))
    for epoch in ("1", "2"):
        shutil.rmtree(cut / "epochs" / epoch)
    assert "resumed from" in tune(cut, "--resume", zero=zero)
    assert log_of(cut) == log_of(whole)
    for name in ("model", "average"):
        expected = load_file(whole / name / "model.safetensors")
        found = load_file(cut / name / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_frozen_trunk_and_unread_weights_stay(tune, run, tmp_path):
    """From another run's trunk, on sound alone; also where weight decay would move them."""
    settings = ("finetune.mode=audio", "optim.weight_decay=0.1", "train.average=null")
    start = f"train.init_from={run / 'model'}"
    before = load_file(run / "model" / "model.safetensors")
    tune(tmp_path / "audio", *settings, start, "train.epochs=1")
    moved = {
        key for key, value in load_file(tmp_path / "audio" / "model" / "model.safetensors").items()
        if not torch.equal(value, before[key])
    }  # fmt: skip
    assert moved and not any(".video." in key or ".joint." in key for key in moved)
    assert all(key.startswith(("encoder.audio.", "encoder.shared.", "head.")) for key in moved)
    with pytest.raises(ValueError, match="was trained on audio alone and can be given nothing"):
        classify(ClassifySource(checkpoint=str(tmp_path / "audio"), mode="video", device="cpu"))


def test_mistakes_show_before_any_work(tune, tmp_path):
    text = tune(tmp_path / "run", "data.eval_clips=1001", code=1)
    assert text == "error: data.eval_clips=1001: there are 1000 clips\n"
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_classify_the_clips(run, tmp_path):
    def mistake(name, **source):
        with pytest.raises(ValueError) as caught:
            classify(ClassifySource(checkpoint=str(tmp_path / name), device="cpu", **source))
        return str(caught.value)

    model = from_pretrained(run / "model")
    sizes = vars(model.config)
    build_model("kdc_mae", "tiny", **{**sizes, "num_views": 2}).save_pretrained(tmp_path / "kdc")
    assert "holds a kdc_mae, which has no classes; fine-tune it" in mistake("kdc")
    build_model("cav_mae_classifier", "tiny", num_classes=5, **sizes).save_pretrained(
        tmp_path / "five"
    )
    assert "has a head of 5 classes, data.label_csv has 8:" in mistake("five")
    shutil.copytree(run / "model", tmp_path / "bare")
    record = json.loads((tmp_path / "bare" / "classifier.json").read_text())
    record["classes"]["mids"][2] = "gong"
    (tmp_path / "bare" / "classifier.json").write_text(json.dumps(record))
    assert "its class 2 is gong, that of data.label_csv is " in mistake("bare")
    (tmp_path / "bare" / "classifier.json").write_text("{")
    assert "classifier.json is damaged" in mistake("bare")
    (tmp_path / "bare" / "classifier.json").unlink()
    assert "has no classifier.json; say --loss bce" in mistake("bare")
    csv = ("data.source=shards", "data.path=nowhere")
    assert "data.label_csv='': nowhere has no labels" in mistake("bare", overrides=csv)
    with pytest.raises(ValueError, match="holds a cav_mae_classifier; give a pretrained model"):
        retrieve(EvaluationSource(checkpoint=str(run)))


class Unlabelled:
    """Clips of which some have no label and one cannot be read."""

    def __init__(self, dataset, without):
        self.dataset, self.without = dataset, without

    def __len__(self):
        return len(self.dataset)

    def read_frames(self, index, num_frames=None, **rest):
        clip = self.dataset.read_frames(index, num_frames, **rest)
        return clip._replace(label=-1) if index in self.without else clip


def test_clips_without_a_label_are_named(run):
    model = from_pretrained(run / "model")
    data = FinetuneDataConfig(eval_clips=9, eval_frames=1, max_bad_share=0.5, num_workers=2)
    dataset = open_dataset(data, model.config, seed=0, split="heldout")

    def evaluate(without):
        return evaluate_classifier(
            lambda fbank, frames: model(fbank, frames),
            Evaluation(
                dataset=Unlabelled(dataset, without),
                data=data,
                model=model.config,
                loss="bce",
                num_classes=8,
                device=torch.device("cpu"),
            ),
        )

    found = evaluate((2, 5))
    assert (found["num_clips"], [clip["reason"] for clip in found["bad_clips"]]) == (
        7, ["it has no label"] * 2
    )  # fmt: skip
    with pytest.raises(ValueError, match="none of the 9 clips can be evaluated; synthetic_heldout"):
        evaluate(range(9))


@pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
def test_probabilities_that_are_not_numbers_are_no_figures(run, loss):
    """The largest of NaNs is class 0: a broken model would get the accuracy of that."""
    model = from_pretrained(run / "model")
    data = FinetuneDataConfig(eval_clips=9, eval_frames=1, eval_batch_size=3, num_workers=0)
    batches = iter([0.0, float("nan"), 0.0])
    evaluation = Evaluation(
        dataset=open_dataset(data, model.config, seed=0, split="heldout"),
        data=data,
        model=model.config,
        loss=loss,
        num_classes=8,
        device=torch.device("cpu"),
    )
    with pytest.raises(ValueError, match=r"of 3 of 9 clips are not finite, .* \w+_heldout_000003;"):
        evaluate_classifier(lambda fbank, frames: model(fbank, frames) + next(batches), evaluation)
