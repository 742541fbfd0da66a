"""Pieces of kdcmae doctor by themselves."""

import math

import pytest

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data.doctor import Diagnosis
from kdcmae_fast.data.doctor.diagnosis import write_diagnosis
from kdcmae_fast.data.doctor.media_checks import bad_interval, kind_of
from kdcmae_fast.data.doctor.probe import ClipFacts, FbankSums, Properties


def test_the_interval_is_wilsons():
    low, high = bad_interval(5, 100)
    assert (low, high) == pytest.approx((0.02154, 0.11175), abs=1e-5)  # tabulated
    assert bad_interval(0, 10)[0] == 0 and bad_interval(10, 10)[1] == pytest.approx(1)


def test_reasons_of_the_readers_have_a_kind():
    assert kind_of("x.wav: cannot decode the sound: Error") == "damaged"
    assert kind_of("no audio stream") == "no audio stream"
    assert kind_of("sound is 0.20 s long, less than 0.4 s") == "too short"
    assert kind_of("something new") == "other"


def test_facts_without_a_value_do_not_break_the_plots(tmp_path):
    pytest.importorskip("matplotlib")
    facts = [ClipFacts(0, "x", "", Properties(), 0.0, 0.0, 0, FbankSums(1, 0.0, 0.0))]
    bad = ClipFacts(1, "y", "damaged", Properties(seconds=math.nan))
    diagnosis = Diagnosis(
        "p", DataConfig(), ModelConfig(), [], 2, [*facts, bad], {f"{i}": i for i in range(50)}
    )
    assert write_diagnosis(diagnosis, tmp_path, plots=True)[2:] == ["levels.png", "classes.png"]
    diagnosis.histogram, diagnosis.names = {"a": 1, "b": 2}, {"a": "$x^$ & same", "b": "$"}
    assert "classes.png" in write_diagnosis(diagnosis, tmp_path, plots=True)
