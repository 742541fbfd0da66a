"""Published CAV-MAE and KDC-MAE files: identity, strictness, inference of the settings."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcmae_fast.convert import (
    convert_checkpoint,
    export_published,
    init_model,
    load_published,
)
from kdcmae_fast.convert.infer import infer_settings
from kdcmae_fast.convert.keys import is_dead
from kdcmae_fast.convert.published import published_state
from kdcmae_fast.models import build_model, from_pretrained


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "name, options", [("cav_mae", {}), ("kdc_mae", {}), ("cav_mae_classifier", {"num_classes": 7})]
)
def test_export_then_load_is_the_identity(
    small, same_state, hints, tmp_path, name, options, suffix
):
    model, path = small(name, **options), tmp_path / f"weights.{suffix}"
    export_published(model, path)
    loaded = load_published(path, None if name != "kdc_mae" else name, **hints)
    assert loaded.name == name and type(loaded) is type(model)
    assert loaded.config.embed_dim == 24 and loaded.config.audio_length == 64
    same_state(loaded, model)


@pytest.mark.parametrize("file", ["cav_mae", "cav_mae_ft"])
def test_load_then_export_keeps_every_live_tensor(golden_folder, tmp_path, file):
    source, target = golden_folder / f"{file}.state.safetensors", tmp_path / "out.safetensors"
    export_published(load_published(source, num_heads=3, decoder_num_heads=2), target)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    for key in before:
        if not is_dead(key):
            assert torch.equal(before[key], after[key]), key
        else:
            value = 1.0 if key.endswith("weight") else 0.0
            assert (after[key] == value).all() and after[key].shape == before[key].shape


def test_pth_carries_the_published_prefix(small, tmp_path):
    model = small()
    export_published(model, tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert all(key.startswith("module.") for key in state)
    assert {key.removeprefix("module.") for key in state} == published_state(model).keys()
    with pytest.raises(ValueError, match="must end in .safetensors or one of .pth"):
        export_published(model, tmp_path / "a.npz")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_wrappers_and_prefixes(small, same_state, hints, tmp_path, wrapper, prefix):
    model = small()
    state = {prefix + key: tensor for key, tensor in published_state(model).items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    same_state(load_published(tmp_path / "w.pth", **hints), model)


def test_the_base_model_is_recognised_by_its_shapes():
    with torch.device("meta"):
        model = build_model("cav_mae", "base")
    fixed, guessed = infer_settings(published_state(model), {})
    found = fixed | guessed
    assert found == {name: getattr(model.config, name) for name in found}
    assert {"num_heads", "decoder_num_heads", "audio_length", "img_size"} <= found.keys()


def test_kdc_mae_leftovers_are_named_and_dropped(small, same_state, hints, tmp_path, caplog):
    model = small()
    unused = [
        "latent_projection.weight",
        "kld_mlp.0.bias",
        "multi_noise_loss_module.noise_params",
        "probability_network.get_token_probs.0.weight",
        "get_token_probs.1.weight",
        "dw_fc1.weight",
        "dw_fc4.bias",
        "fc.weight",
    ]
    state = published_state(model) | {key: torch.ones(3) for key in unused}
    save_file(state, tmp_path / "kdc.safetensors")
    with caplog.at_level(logging.INFO, "kdcmae_fast.convert"):
        loaded = load_published(tmp_path / "kdc.safetensors", **hints)
    assert loaded.name == "kdc_mae" and loaded.config.distill.on == "joint"
    same_state(loaded, model)
    assert all(key in caplog.text for key in unused)


def test_another_system_on_the_same_trunk(small, hints, tmp_path, caplog):
    model = small()
    export_published(model, tmp_path / "w.pth")
    kdc = load_published(
        tmp_path / "w.pth", "kdc_mae", loss_weighting="uncertainty", mask_ratio=0.8, **hints
    )
    assert kdc.name == "kdc_mae" and kdc.config.mask_ratio == 0.8
    assert torch.equal(kdc.decoder.mask_token, model.decoder.mask_token)
    assert not kdc.objective.weighting.log_variance.any()

    with caplog.at_level(logging.INFO, "kdcmae_fast.convert"):
        tuned = load_published(tmp_path / "w.pth", "cav_mae_classifier", num_classes=5, **hints)
    assert tuned.num_classes == 5 and (tuned.head.norm.weight == 1).all()
    assert "decoder_embed.weight" in caplog.text and "head.linear.weight" in caplog.text
    positions = model.encoder.audio.patch_embed.pos_embed
    assert torch.equal(tuned.encoder.audio.patch_embed.pos_embed, positions)
    with pytest.raises(ValueError, match="num_classes is missing"):
        load_published(tmp_path / "w.pth", "cav_mae_classifier", **hints)


def test_a_classifier_file_has_no_decoder(small, hints, tmp_path):
    export_published(small("cav_mae_classifier", num_classes=7), tmp_path / "ft.pth")
    assert load_published(tmp_path / "ft.pth", **hints).num_classes == 7
    with pytest.raises(ValueError, match="does not fit the model; missing: mask_token, decoder_"):
        load_published(tmp_path / "ft.pth", "cav_mae", **hints)
    with pytest.raises(ValueError, match=r"wrong sizes: mlp_head.1.weight \(7, 24\)"):
        load_published(tmp_path / "ft.pth", num_classes=9, **hints)


def test_unknown_and_missing_keys_are_listed(small, hints, tmp_path):
    state = published_state(small())
    del state["blocks_a.1.mlp.fc2.bias"], state["norm_v.weight"]
    state |= {"fc_norm.weight": torch.zeros(2), "cls_token": torch.zeros(2)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as caught:
        load_published(tmp_path / "w.safetensors", **hints)
    message = str(caught.value)
    assert "missing: blocks_a.1.mlp.fc2.bias, norm_v.weight; " in message
    assert "unknown: " in message and "fc_norm.weight" in message and "\n" not in message


def test_settings_the_weights_cannot_tell(small, tmp_path):
    path = tmp_path / "w.safetensors"
    export_published(small(), path)
    with pytest.raises(ValueError, match="num_heads is not in the weights, and a width of 24"):
        load_published(path, num_mel_bins=32)
    with pytest.raises(ValueError, match="embed_dim=48 contradicts .* which has 24"):
        load_published(path, num_mel_bins=32, num_heads=3, decoder_num_heads=2, embed_dim=48)
    with pytest.raises(ValueError, match="img_size=64 contradicts .* which has 32"):
        load_published(path, num_mel_bins=32, num_heads=3, decoder_num_heads=2, img_size=64)
    with pytest.raises(ValueError, match="name='sync' is not one of"):
        load_published(path, "sync")


def test_other_position_tables_are_kept_with_a_warning(small, same_state, hints, tmp_path, caplog):
    model = small()
    model.encoder.audio.patch_embed.pos_embed.mul_(1.01)
    export_published(model, tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING, "kdcmae_fast.convert"):
        same_state(load_published(tmp_path / "w.pth", **hints), model)
    assert "pos_embed_a is not the sine-cosine table" in caplog.text
    assert "pos_embed_v" not in caplog.text


def test_half_precision_files_keep_their_dtype(small, same_state, hints, tmp_path):
    model = small().bfloat16()
    export_published(model, tmp_path / "w.safetensors")
    same_state(load_published(tmp_path / "w.safetensors", **hints), model)


class Dangerous:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_unreadable_files(tmp_path, capsys):
    with pytest.raises(ValueError, match="missing.pth is not a file"):
        load_published(tmp_path / "missing.pth")
    torch.save({"a": Dangerous()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth does not load as plain tensors"):
        load_published(tmp_path / "evil.pth")
    assert "code from the file ran" not in capsys.readouterr().out
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match="half.pth does not load as plain tensors"):
        load_published(tmp_path / "half.pth")
    (tmp_path / "half.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="half.safetensors is damaged"):
        load_published(tmp_path / "half.safetensors")
    torch.save({"epoch": 3, "w": torch.ones(1)}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match="entries that are no tensors: epoch"):
        load_published(tmp_path / "mixed.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds no weights"):
        load_published(tmp_path / "list.pth")
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="neither CAV-MAE, KDC-MAE nor MAE.*conv1.weight"):
        load_published(tmp_path / "resnet.pth")
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match="must end in"):
        load_published(tmp_path / "weights.npz")


def test_init_model_keeps_what_only_the_model_has(small, tmp_path):
    source = small()
    export_published(source, tmp_path / "w.pth")
    source.save_pretrained(tmp_path / "folder")
    for start in ("w.pth", "folder"):
        model = small("kdc_mae", loss_weighting="uncertainty").double()
        learned = model.objective.weighting.log_variance.clone()
        init_model(model, tmp_path / start)
        assert torch.equal(model.objective.weighting.log_variance, learned)
        assert model.decoder.norm.weight.dtype == torch.float64
        assert torch.equal(model.decoder.norm.weight, source.decoder.norm.weight.double())


def test_convert_both_ways(small, same_state, hints, tmp_path):
    model = small()
    export_published(model, tmp_path / "w.pth")
    convert_checkpoint(tmp_path / "w.pth", tmp_path / "folder", **hints)
    same_state(from_pretrained(tmp_path / "folder"), model)
    convert_checkpoint(tmp_path / "folder", tmp_path / "back.safetensors")
    same_state(load_published(tmp_path / "back.safetensors", **hints), model)
    with pytest.raises(ValueError, match="its own settings; drop name, num_heads"):
        convert_checkpoint(tmp_path / "folder", tmp_path / "x.pth", "kdc_mae", num_heads=3)


def test_uncertainty_weights_are_left_out_and_named(small, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "kdcmae_fast.convert"):
        export_published(small(loss_weighting="uncertainty"), tmp_path / "w.safetensors")
    assert "left out: objective.weighting.log_variance" in caplog.text
    assert not any("log_variance" in key for key in load_file(tmp_path / "w.safetensors"))
