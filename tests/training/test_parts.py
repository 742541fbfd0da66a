"""Parts of the engine on their own: logs, stopping, starting weights, errors as one line."""

import json
import os
import signal
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from kdcmae_fast.config_file import load_config
from kdcmae_fast.convert import export_published
from kdcmae_fast.models import build_model
from kdcmae_fast.training import tracking
from kdcmae_fast.training.stopping import StopRequest
from kdcmae_fast.training.weights import initial_model

RECORD = {"step": 3, "total": 1.5, "clips_per_second": 9.0, "seconds_left": 61.0}


def test_log_goes_on_where_the_checkpoint_was(tmp_path):
    """Later records and a half-written line of a killed run are dropped."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = tracking.JsonLines(path, 2)
    log.write(RECORD)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_lines_and_bar(caplog, capsys):
    caplog.set_level("INFO")
    tracking.Lines(10).write(RECORD)
    assert caplog.messages == ["step 3/10  total 1.5  9.0 clips/s  1:01 left"]
    tracking.Lines(10).write({**RECORD, "seconds_left": 90_061.0})
    assert caplog.messages[1].endswith("  25:01:01 left")
    bar = tracking.Bar(2, 10)
    bar.write(RECORD)
    bar.close()
    assert "3/10" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_absent():
    with pytest.raises(ValueError, match="train.wandb=True: wandb is not installed"):
        tracking.require_wandb()


def test_a_resumed_run_goes_on_in_its_wandb_run(monkeypatch, tmp_path):
    runs = []
    stand_in = SimpleNamespace(init=lambda **options: runs.append(options))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for start_step in (0, 4, 0):
        tracking.WeightsAndBiases(tmp_path, start_step, {})
    first, resumed, anew = (run["id"] for run in runs)
    assert first == resumed != anew


@pytest.fixture
def interruptible():
    """Python's own SIGINT handler; a shell's background jobs start with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_stop_request(interruptible):
    """SIGTERM any number of times and SIGINT once are requests; a second SIGINT interrupts."""
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def tiny(*arguments):
    return load_config(
        {
            "name": "cav_mae",
            "preset": "tiny",
            "model": {
                "audio_length": 64, "num_mel_bins": 64, "img_size": 32, "embed_dim": 48,
                "modality_depth": 1, "num_heads": 4, "decoder_embed_dim": 32,
                "decoder_depth": 1, "decoder_num_heads": 4,
            },
            "train": {"steps": 1},
        },
        arguments,
    )  # fmt: skip


def test_start_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = initial_model(tiny(), resumed=False).state_dict()
    torch.manual_seed(2)
    again = initial_model(tiny(), resumed=False).state_dict()
    other = initial_model(tiny("train.seed=1"), resumed=False).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("form", ["folder", "published.pth"])
def test_start_from_other_weights(tmp_path, form):
    """A model folder, or a published file on another system's trunk."""
    torch.manual_seed(5)
    config = tiny()
    source = build_model(config.name, config.preset, **vars(config.model))
    path = tmp_path / form
    if form == "folder":
        source.save_pretrained(path)
    else:
        export_published(source, path)
    arguments = ["name=kdc_mae", f"train.init_from={path}"]
    model = initial_model(tiny(*arguments), resumed=False)
    assert model.config.num_views == 2
    for name, value in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"{form} does not fit the model; missing: "):
        initial_model(tiny(*arguments, "model.modality_depth=2"), resumed=False)
