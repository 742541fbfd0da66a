"""The `kdcmae` command: help, one-line errors, exit codes, and each subcommand end to end."""

import dataclasses
import json
import subprocess
import sys

import pytest

import kdcmae_fast
from kdcmae_fast.cli import COMMANDS, SCRIPTS, main
from kdcmae_fast.config import RunConfig
from kdcmae_fast.models import build_model

SIZES = {
    "img_size": 32, "audio_length": 64, "num_mel_bins": 32, "embed_dim": 64, "modality_depth": 1,
    "num_heads": 1, "decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    build_model("kdc_mae", "tiny", **SIZES).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def kdcmae(capsys):
    """kdcmae(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # --help, --version
            code = leaving.code
        return (code, *capsys.readouterr())

    return call


def test_help_lists_every_command(kdcmae):
    code, out, _ = kdcmae("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert kdcmae("--version")[:2] == (0, f"kdcmae {kdcmae_fast.__version__}\n")


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(SCRIPTS)))
def test_every_command_has_help(kdcmae, command):
    code, out, _ = kdcmae(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: kdcmae {command}")
    assert "--debug" in out
    assert "default: None" not in out


@pytest.mark.parametrize("command", sorted(SCRIPTS))
def test_scripts_have_help_under_the_name_they_are_called_by(kdcmae, command):
    pytest.importorskip(SCRIPTS[command])
    code, out, _ = kdcmae(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: kdcmae {command}")
    assert f"default runs/{command}" in out
    assert f"(see kdcmae {command} --help)" in kdcmae(command, "--bogus")[2]


def test_help_states_defaults(kdcmae):
    out = " ".join(kdcmae("retrieve", "--help")[1].split())
    for text in (
        "(default: heldout)",
        "(default: 32)",
        "(default: auto)",
        "(default: average)",
        "(default: all)",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see kdcmae --help)"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["retrieve"], "required: --checkpoint (see kdcmae retrieve --help)"),
        (["retrieve", "--checkpoint", "nowhere"], "--checkpoint nowhere is no folder"),
        (["retrieve", "--checkpoint", ".", "--num-clips", "0"], "'0' is not a whole number above"),
        (["retrieve", "--checkpoint", ".", "--ties", "x"], "invalid choice: 'x'"),
        (["reconstruct", "--checkpoint", "."], "required: --output"),
        (["retrieve", "--checkpoint", ".", "--device", "cpu"], "has no model.safetensors; give"),
        (["convert", "nowhere.pth", "out"], "nowhere.pth is not a file"),
        (["convert", "nowhere.pth", "out", "num_heads"], "expected key=value"),
        (["convert", "nowhere.pth", "out", "name=x"], "argument name=x: no setting of a model"),
        (["settings", "model.embed_dims"], "no setting model.embed_dims; did you mean model.embed"),
        (["settings", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(kdcmae, arguments, message):
    code, out, err = kdcmae(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_settings_in_the_wrong_place_are_named(kdcmae, model_folder):
    common = ["retrieve", "--checkpoint", model_folder]
    assert "argument img_size=3: only data.key" in kdcmae(*common, "img_size=3")[2]
    assert "data.num_clip" in kdcmae(*common, "data.num_clip=3")[2]
    assert "data.source=folder needs data.path" in kdcmae(*common, "data.source=folder")[2]
    assert "num_clips=2000: the dataset has 1000" in kdcmae(*common, "--num-clips", "2000")[2]


def test_a_file_that_is_not_there_is_named_first(kdcmae, model_folder):
    code, _, err = kdcmae("retrieve", "--checkpoint", model_folder, "--recipe", "no.yaml")
    assert (code, err) == (1, "error: no.yaml: No such file or directory\n")


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "kdcmae_fast", "settings", "nothing", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    done = subprocess.run(command[:-1], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_an_unexpected_error_tells_its_type(kdcmae, monkeypatch):
    def broken(*_):
        raise KeyError("total")

    monkeypatch.setattr("kdcmae_fast.config_help.settings_help", broken)
    assert "KeyError: 'total' (--debug shows where)" in kdcmae("settings")[2]


def test_retrieve(kdcmae, model_folder, tmp_path):
    out = tmp_path / "out"
    code, text, err = kdcmae(
        "retrieve", "--checkpoint", model_folder, "--num-clips", 9, "data.num_workers=0",
        "--output", out, "--ties", "optimistic", "--device", "cpu",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "chance" in text
    assert "R@1 is" in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ties"] == "optimistic"
    assert metrics["chance"]["R@1"] == pytest.approx(1 / 9)


def test_reconstruct(kdcmae, model_folder, tmp_path):
    pytest.importorskip("matplotlib")
    code, text, err = kdcmae(
        "reconstruct", "--checkpoint", model_folder, "--num-clips", 2, "--output", tmp_path
    )
    assert (code, err) == (0, "")
    assert "wrote 2 pictures" in text
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_convert_there_and_back(kdcmae, model_folder, tmp_path):
    published, folder = tmp_path / "published.pth", tmp_path / "folder"
    assert kdcmae("convert", model_folder, published)[0] == 0
    code, out, err = kdcmae("convert", published, folder, "--name", "kdc_mae", "distill.on=off")
    assert (code, out) == (0, f"wrote {folder}\n")
    assert "norms that no output depends on" in err
    before = (tmp_path.parent / model_folder / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == before
    assert json.loads((folder / "config.json").read_text())["config"]["distill"]["on"] == "off"
    assert kdcmae("convert", model_folder, published, "--name", "cav_mae")[0] == 1
    code, out, err = kdcmae("convert", published, published)
    assert (code, out) == (1, "")
    assert err == f"error: OUT {published}: {published} is a file; give a folder\n"


def test_backends_names_every_op(kdcmae):
    code, out, _ = kdcmae("backends", "--device", "cpu")
    assert code == 0
    ops = [line.split()[0] for line in out.splitlines()]
    assert {"info_nce", "complementary_masks", "attention"} <= set(ops)
    assert all(len(line.split()) > 2 for line in out.splitlines())


def test_backends_that_cannot_run_are_in_the_table_and_the_exit_code(kdcmae, monkeypatch):
    monkeypatch.setenv("KDCMAE_IMPL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = kdcmae("backends", "--device", "cpu")
    lines = {line.split()[0]: line.split()[1] for line in out.splitlines()}
    assert code == 1 and (lines["info_nce"], lines["mlp"]) == ("none", "torch")
    unusable = sum(impl == "none" for impl in lines.values())
    assert err.startswith(f"error: KDCMAE_IMPL=triton: {unusable} of {len(lines)} ops cannot run")
    assert err.count("\n") == 1


def leaves(group, prefix=""):
    """(dotted key, field) of every setting."""
    for field in dataclasses.fields(group):
        if dataclasses.is_dataclass(field.default_factory):
            yield from leaves(field.default_factory, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


SHARED = {"pretrain", "finetune", "classify", "retrieve", "features", "localize", "probe"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("inpaint", "--checkpoint", "m", "--output", "out"),
        ("score", "--checkpoint", "m", "a.mp4"),
        ("reconstruct", "--checkpoint", "m", "--output", "out"),
        ("report", "run"),
        ("average", "out", "a", "b"),
        ("convert", "a", "b"),
    ],
)
def test_what_one_process_does_is_not_done_by_two(kdcmae, monkeypatch, arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "launcher" not in kdcmae(*arguments)[2]  # of a batch script that starts the launcher
    for rank, where in (("0", ""), ("1", " on rank 1")):
        monkeypatch.setenv("RANK", rank)
        code, out, err = kdcmae(*arguments)
        assert (code, out) == (1, "")
        assert err == (
            f"error{where}: kdcmae {arguments[0]} works in one process, and a launcher started 2 "
            "(WORLD_SIZE); run it without the launcher\n"
        )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "launcher" not in kdcmae(*arguments)[2]


def test_which_commands_share_their_work():
    assert {name for name, command in COMMANDS.items() if command.shared} == SHARED - set(SCRIPTS)


def test_settings_shows_every_field_and_its_comment(kdcmae):
    code, out, _ = kdcmae("settings")
    assert code == 0
    shown = {line.split(" = ")[0] for line in out.splitlines() if " = " in line}
    assert {key for key, _ in leaves(RunConfig)} <= shown
    assert "model.audio_length = 1024" in out
    assert "fbank frames of 10 ms" in out
    assert "model.distill.on = off" in out
    assert "name = kdc_mae" in out and "model.num_views=2" in out
    only = kdcmae("settings", "model.distill")[1]
    assert all(line.startswith("model.distill.") for line in only.splitlines())


@pytest.mark.parametrize("command", sorted(SCRIPTS))
def test_scripts_are_handed_their_arguments(kdcmae, monkeypatch, command):
    script = pytest.importorskip(SCRIPTS[command])
    seen = []
    monkeypatch.setattr(script, "main", lambda arguments: seen.append(arguments) or 3)
    assert kdcmae(command, "--resume", "train.steps=1", "--debug")[0] == 3
    assert seen == [["--resume", "train.steps=1", "--debug"]]


def test_only_the_process_s_own_pretraining_leaves_at_once(kdcmae, monkeypatch):
    """As the script does; a call from Python, and other commands, return."""
    pretrain = pytest.importorskip("kdcmae_fast.pretrain")
    left = []
    monkeypatch.setattr(pretrain, "main", lambda arguments: 0)
    monkeypatch.setattr("kdcmae_fast.training.distributed.leave", left.append)
    kdcmae("pretrain")
    monkeypatch.setattr(sys, "argv", ["kdcmae", "settings", "name"])
    assert (main(), left) == (0, [])
    monkeypatch.setattr(sys, "argv", ["kdcmae", "pretrain", "--resume"])
    main()
    assert left == [0]
