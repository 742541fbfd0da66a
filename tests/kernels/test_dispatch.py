"""Which implementation runs: explicit, automatic, by environment variable."""

import pytest
import torch

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import dispatch


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv("KDCMAE_IMPL", raising=False)
    dispatch._automatic.cache_clear()
    dispatch._say_once.cache_clear()
    yield
    dispatch._automatic.cache_clear()
    dispatch._say_once.cache_clear()


def test_backends_names_every_public_op_and_says_why():
    chosen = kernels.backends("cpu")
    ops = {name for name in kernels.__all__ if name not in ("MaskPlan", "backends")}
    assert ops <= set(chosen)
    assert all(backend.reason for backend in chosen.values())


def test_backends_of_an_absent_gpu_say_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no CUDA device" in kernels.backends("cuda")["complementary_masks"].reason


@pytest.mark.parametrize("impl", ["banana", "cuda"])
def test_an_explicit_impl_never_falls_back(impl):
    with pytest.raises(ValueError, match=f"impl='{impl}'"):
        kernels.complementary_masks(torch.arange(2), (8, 8), 0.75, impl=impl)


def test_environment_variable_replaces_auto(monkeypatch):
    monkeypatch.setenv("KDCMAE_IMPL", "torch")
    assert kernels.backends("cpu")["complementary_masks"] == ("torch", "KDCMAE_IMPL=torch")


def test_environment_variable_is_ignored_by_ops_without_that_implementation(monkeypatch):
    monkeypatch.setenv("KDCMAE_IMPL", "cuda")
    assert kernels.backends("cpu")["gather_tokens"].impl != "cuda"


def test_what_the_environment_variable_makes_impossible_is_a_line_of_the_table(monkeypatch):
    monkeypatch.setenv("KDCMAE_IMPL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = kernels.backends("cpu")
    assert chosen["gather_tokens"].impl == "none"
    assert chosen["gather_tokens"].reason.startswith(
        "KDCMAE_IMPL=triton, but gather_tokens cannot use it here: "
    )
    assert chosen["mlp"].impl == "torch"  # it has no Triton implementation, and does not ask for it
    with pytest.raises(ValueError, match="KDCMAE_IMPL=triton, but gather_tokens cannot"):
        dispatch.resolve("gather_tokens", "auto", "cpu")


def test_unknown_environment_value_is_an_error(monkeypatch):
    monkeypatch.setenv("KDCMAE_IMPL", "fast")
    with pytest.raises(ValueError, match="KDCMAE_IMPL=fast is not one of"):
        kernels.complementary_masks(torch.arange(2), (8, 8), 0.75)


def test_missing_extension_is_said_once_and_not_fatal(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "extension_problem", lambda: "kdcmae_fast._C is not built")
    with caplog.at_level("WARNING", logger="kdcmae_fast.kernels"):
        for _ in range(2):
            kernels.complementary_masks(torch.arange(2), (8, 8), 0.75)
            kernels.info_nce(torch.rand(2, 4), torch.rand(2, 4))
    assert [record.message for record in caplog.records] == [
        "ops run without cpp: kdcmae_fast._C is not built"
    ]


def test_environment_variable_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv("KDCMAE_IMPL", "cpp")
    monkeypatch.setattr(dispatch, "extension_problem", lambda: "kdcmae_fast._C is not built")
    with pytest.raises(ValueError, match="KDCMAE_IMPL=cpp, but complementary_masks cannot"):
        kernels.complementary_masks(torch.arange(2), (8, 8), 0.75)


def test_auto_never_takes_the_triton_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "extension_problem", lambda: "kdcmae_fast._C is not built")
    assert kernels.backends("cpu")["complementary_masks"].impl == "torch"
