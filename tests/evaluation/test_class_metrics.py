"""Metrics of classification against scikit-learn's, and the mean of weights against the mean."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from sklearn import metrics as sk

from kdcmae_fast.data.classes import Classes
from kdcmae_fast.evaluation.class_metrics import MultiLabel, SingleLabel, d_prime
from kdcmae_fast.evaluation.classification import ClassifySource
from kdcmae_fast.evaluation.classification import _settings as settings_of
from kdcmae_fast.evaluation.classifier_record import ClassifierRecord, read_record
from kdcmae_fast.evaluation.commands import average
from kdcmae_fast.evaluation.confusion import plot_confusion
from kdcmae_fast.evaluation.weight_average import average_weights
from kdcmae_fast.messages import Parser

N, C = 203, 11  # in batches of 8 the last has 3
CPU = torch.device("cpu")


def in_batches(metrics, scores, classes, size=8, order=None):
    order = np.arange(len(scores)) if order is None else order
    for start in range(0, len(scores), size):
        rows = torch.from_numpy(order[start : start + size].copy())
        metrics.update(rows, scores[rows], classes[rows])
    return metrics.compute()


@pytest.fixture
def scores():
    """Probabilities with many ties."""
    return (torch.rand(N, C) * 50).round() / 50


def test_single_label_equals_scikit_learn():
    probabilities = torch.rand(N, C).softmax(1)
    labels = torch.randint(0, C - 1, (N,))  # the last class has no clip
    found = in_batches(SingleLabel(C, CPU), probabilities, labels[:, None])
    truth, guess = labels.numpy(), probabilities.argmax(1).numpy()
    assert found["top1"] == sk.accuracy_score(truth, guess)
    assert found["top5"] == sk.top_k_accuracy_score(truth, probabilities, k=5, labels=range(C))
    expected = np.mean([sk.accuracy_score(truth[truth == c], guess[truth == c]) for c in range(10)])
    assert found["mean_class_accuracy"] == pytest.approx(expected, rel=1e-15)
    assert found["confusion"] == sk.confusion_matrix(truth, guess, labels=range(C)).tolist()
    assert (found["classes_with_clips"], found["class_accuracy"][-1]) == (C - 1, None)
    assert found["chance"] == 1 / C


def test_few_classes_have_no_top_5():
    found = in_batches(SingleLabel(2, CPU), torch.rand(9, 2), torch.zeros(9, 1, dtype=torch.long))
    assert "top5" not in found


def test_many_labels_equal_scikit_learn(scores):
    """In any order of the clips: ties are ranked alike."""
    has = torch.rand(N, C) < 0.2
    has[:, 3] = False  # a class without a clip
    rows = [row.nonzero().flatten() for row in has]
    classes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    found = in_batches(MultiLabel(C), scores, classes)
    some = [c for c in range(C) if c != 3]
    truth, score = has.numpy()[:, some], scores.double().numpy()[:, some]
    precision = sk.average_precision_score(truth, score, average="macro")
    area = sk.roc_auc_score(truth, score, average="macro")
    assert found["mAP"] == pytest.approx(precision, rel=1e-14)
    assert found["AUC"] == pytest.approx(area, rel=1e-14)
    assert found["d_prime"] == pytest.approx(math.sqrt(2) * norm.ppf(area), rel=1e-12)
    assert found["classes_with_clips"] == C - 1
    assert found["class_AP"][3] is None and found["class_AUC"][3] is None
    order = np.random.default_rng(0).permutation(N)
    assert in_batches(MultiLabel(C), scores, classes, 7, order) == found


def test_nothing_to_rank():
    with pytest.raises(ValueError, match="no clip has a label"):
        in_batches(MultiLabel(C), torch.rand(4, C), torch.full((4, 1), -1))
    assert d_prime(1.0) is None and d_prime(0.5) == 0


def test_confusion_picture(tmp_path):
    path = plot_confusion([[3, 1], [0, 0]], ["dog", "cat"], tmp_path / "c.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def three_models(make_model, tmp_path):
    """Model folders under RUN/epochs with weights of their own."""
    folders = []
    for epoch in (1, 2, 3):
        model = make_model("cav_mae_classifier", num_classes=2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * epoch * torch.randn_like(parameter)
        folders.append(tmp_path / "run" / "epochs" / str(epoch))
        model.save_pretrained(folders[-1])
        record = ClassifierRecord("multimodal", "bce", Classes(("a", "b"), ("A", "B")))
        record.write(folders[-1])
    return folders


def run_average(*arguments):
    parser = Parser()
    average.add_arguments(parser)
    average.run(parser.parse_args([str(argument) for argument in arguments]))


def test_average_is_the_mean_of_the_files(three_models, tmp_path, capsys):
    run_average(tmp_path / "mean", tmp_path / "run", "--epochs", "1-3")
    assert "mean of 3 models" in capsys.readouterr().out
    states = [load_file(folder / "model.safetensors") for folder in three_models]
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    for key, tensor in mean.items():
        exact = sum(state[key].double() for state in states) / 3
        assert torch.equal(tensor, exact.float())
    assert read_record(tmp_path / "mean") == read_record(three_models[0])
    one = load_file(average_weights(three_models[:1], tmp_path / "one") / "model.safetensors")
    assert all(torch.equal(one[key], value) for key, value in states[0].items())


def test_a_model_is_not_overwritten_by_a_mean(three_models):
    """Who forgets OUT names the first of the models as it."""
    before = (three_models[0] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"OUT .*/epochs/1 is a model folder already, and stays"):
        run_average(*three_models)
    assert (three_models[0] / "model.safetensors").read_bytes() == before


def test_clips_to_classify_need_none_to_train_on(three_models):
    given = ("data.source=manifest", "data.eval_path=test.json", "data.label_csv=x.csv")
    for more, path in (((), "test.json"), (("data.path=own.json",), "own.json")):
        source = ClassifySource(checkpoint=str(three_models[0]), overrides=(*given, *more))
        data = settings_of(three_models[0], source)[0].data
        assert (data.path, data.eval_path) == (path, "test.json")


def test_what_cannot_be_averaged(three_models, make_model, tmp_path):
    other = tmp_path / "other"
    make_model("cav_mae_classifier", num_classes=3).save_pretrained(other)
    with pytest.raises(ValueError, match=r"other is not of the same model .*: num_classes in"):
        average_weights([three_models[0], other], tmp_path / "mean")
    record = json.loads((three_models[1] / "classifier.json").read_text())
    record["classes"]["mids"] = ["b", "a"]
    (three_models[1] / "classifier.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="2 is not of the same model .*: classifier.json differs"):
        average_weights(three_models, tmp_path / "mean")
    with pytest.raises(FileNotFoundError, match=r"epochs/4 is no model folder; train.keep_epochs"):
        run_average(tmp_path / "mean", tmp_path / "run", "--epochs", "3-4")
    with pytest.raises(ValueError, match="--epochs 3: expected two epochs"):
        run_average(tmp_path / "mean", tmp_path / "run", "--epochs", "3")
    assert not (tmp_path / "mean").exists()
