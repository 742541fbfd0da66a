"""Published CAV-MAE Sync files: what they hold, round trips, and starting from other models."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcmae_fast.convert import export_published, init_model, load_published
from kdcmae_fast.convert.infer import infer_settings
from kdcmae_fast.convert.keys import is_dead
from kdcmae_fast.convert.positions import resize_positions
from kdcmae_fast.convert.published import published_state
from kdcmae_fast.models import build_model, from_pretrained
from kdcmae_fast.models.positions import sincos_positions

LENGTHS = {96: 190_456_064, 192: 190_517_504, 304: 190_589_184, 512: 190_722_304, 1024: 191_049_984}


def published_size(name, **options):
    with torch.device("meta"):
        state = published_state(build_model(name, "base", **options))
    return len(state), sum(tensor.numel() for tensor in state.values()), state


def test_published_size():
    tensors, elements, state = published_size("cav_mae_sync")
    assert (tensors, elements) == (650, 190_660_864)
    tables = sum(tensor.numel() for key, tensor in state.items() if "pos_embed" in key)
    assert elements - tables == 190_143_744
    assert state["register_tokens"].shape == (16, 768)
    assert state["pos_embed_a"].shape == (1, 208, 768)
    assert state["cls_token_v"].shape == (1, 1, 768)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"num_registers": 4}, (650, 190_654_720)),
        ({"contrast_head_depth": 2}, (730, 219_036_928)),
        *(({"audio_length": length}, (650, size)) for length, size in LENGTHS.items()),
    ],
)
def test_published_sizes_of_variants(options, expected):
    assert published_size("cav_mae_sync", **options)[:2] == expected


def test_published_size_of_the_fine_tuned_model():
    size = published_size("cav_mae_sync_classifier", num_classes=309)[:2]
    assert size == (522, 221_447_733)


@pytest.mark.parametrize("options", [{}, {"num_registers": 4, "contrast_head_depth": 2}])
def test_the_base_model_is_recognised_by_its_shapes(options):
    with torch.device("meta"):
        model = build_model("cav_mae_sync", **options)
    fixed, guessed = infer_settings(published_state(model), {})
    found = fixed | guessed
    assert found == {name: getattr(model.config, name) for name in found}
    assert {"cls_token", "num_registers", "contrast_head_depth", "audio_length"} <= found.keys()


VARIANTS = [
    {"num_registers": 8},
    {"num_registers": 4, "audio_length": 96},
    {"num_registers": 0, "audio_length": 16},
    {"contrast_head_depth": 2, "shared_depth": 3, "audio_length": 128},
]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])  # with and without `module.`
@pytest.mark.parametrize("options", VARIANTS)
def test_export_then_load_is_the_identity(small, same_state, hints, tmp_path, options, suffix):
    model, path = small("cav_mae_sync", **options), tmp_path / f"sync.{suffix}"
    export_published(model, path)
    loaded = load_published(path, **hints)
    assert loaded.name == "cav_mae_sync" and loaded.config.contrast_loss_weight == 0.1
    for name in ("audio_length", "num_registers", "cls_token", "contrast_head_depth"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert loaded.config.shared_depth == model.config.shared_depth
    same_state(loaded, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"num_registers": 4, "audio_length": 96}, {"contrast_head_depth": 2, "audio_length": 192}],
)
def test_published_shapes_round_trip(tmp_path, options):
    """At full size: about 0.8 GB of weights each."""
    source = published_size("cav_mae_sync", **options)[2]
    state = {key: torch.full(t.shape, 0.5) for key, t in source.items()}
    for suffix, length in (("a", options.get("audio_length", 416) // 16), ("v", 14)):
        for key, width in ((f"pos_embed_{suffix}", 768), (f"decoder_pos_embed_{suffix}", 512)):
            grid = (8 if suffix == "a" else 14, length)
            state[key] = sincos_positions(width, grid).float()[None]
    torch.save({f"module.{key}": t for key, t in state.items()}, tmp_path / "in.pth")
    model = load_published(tmp_path / "in.pth")
    for name, value in ({"audio_length": 416, "num_registers": 8} | options).items():
        assert getattr(model.config, name) == value
    assert (model.config.num_heads, model.config.decoder_num_heads) == (12, 16)
    after = published_state(model)
    assert after.keys() == state.keys()
    for key, tensor in after.items():
        assert tensor.shape == state[key].shape
        assert is_dead(key) or torch.equal(tensor, state[key]), key


def test_load_then_export_keeps_every_live_tensor(small, hints, tmp_path):
    before = {key: torch.randn_like(t) for key, t in published_state(small("cav_mae_sync")).items()}
    save_file(before, tmp_path / "in.safetensors")
    export_published(load_published(tmp_path / "in.safetensors", **hints), tmp_path / "out.pth")
    after = torch.load(tmp_path / "out.pth", weights_only=True)
    assert before.keys() == {key.removeprefix("module.") for key in after}
    for key, tensor in before.items():
        if is_dead(key):
            expected = torch.full_like(tensor, 1.0 if key.endswith("weight") else 0.0)
            assert torch.equal(after[f"module.{key}"], expected), key
        else:
            assert torch.equal(after[f"module.{key}"], tensor), key


def test_registers_are_one_tensor_audio_first(small, hints, tmp_path):
    model = small("cav_mae_sync", num_registers=2)
    export_published(model, tmp_path / "w.safetensors")
    both = load_file(tmp_path / "w.safetensors")["register_tokens"]
    assert torch.equal(both[:2], model.encoder.audio.tokens.registers)
    assert torch.equal(both[2:], model.encoder.video.tokens.registers)


@pytest.mark.parametrize("used", ["multimodal", "audio", "video"])
def test_fine_tuned_files(small, same_state, hints, tmp_path, used):
    options = {"num_classes": 7, "classifier_input": used, "classifier_heads": 4}
    model = small("cav_mae_sync_classifier", **options)
    export_published(model, tmp_path / "ft.pth")
    told = {"classifier_heads": 4} | ({} if used == "multimodal" else {"classifier_input": used})
    loaded = load_published(tmp_path / "ft.pth", **hints, **told)
    assert loaded.num_classes == 7 and loaded.config.classifier_input == used
    same_state(loaded, model)
    if used != "multimodal":
        with pytest.raises(ValueError, match="classifier_input is not in the weights"):
            load_published(tmp_path / "ft.pth", **hints)


def test_pretrained_into_a_classifier(small, hints, tmp_path):
    model = small("cav_mae_sync")
    export_published(model, tmp_path / "w.pth")
    tuned = load_published(
        tmp_path / "w.pth", "cav_mae_sync_classifier", num_classes=3, classifier_heads=4, **hints
    )
    assert torch.equal(tuned.encoder.video.tokens.cls, model.encoder.video.tokens.cls)
    assert (tuned.aggregator.norm.weight == 1).all()


def test_strict(small, hints, tmp_path):
    state = published_state(small("cav_mae_sync"))
    del state["register_tokens"], state["blocks_v.1.attn.proj.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="num_registers=8 contradicts .* which has 0"):
        load_published(tmp_path / "w.safetensors", num_registers=8, **hints)
    with pytest.raises(ValueError, match="missing: blocks_v.1.attn.proj.bias$"):
        load_published(tmp_path / "w.safetensors", **hints)
    with pytest.raises(ValueError, match=r"missing: register_tokens\.a, register_tokens\.v"):
        init_model(small("cav_mae_sync"), tmp_path / "w.safetensors")
    state["register_tokens"] = torch.zeros(3, 24)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"register_tokens must be \(2R, D\), got \(3, 24\)"):
        load_published(tmp_path / "w.safetensors", **hints)


def test_a_sync_file_is_no_cav_mae(small, hints, tmp_path):
    export_published(small("cav_mae_sync"), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="unknown: .*cls_token_a"):
        init_model(small("cav_mae"), tmp_path / "w.pth")


def test_warm_start_from_cav_mae(small, hints, tmp_path, caplog):
    source = small("cav_mae", audio_length=128)
    export_published(source, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "kdcmae_fast.convert"):
        model = load_published(tmp_path / "w.pth", "cav_mae_sync", audio_length=48, **hints)
    assert model.config.audio_length == 48 and model.config.num_registers == 8
    own, shared = model.state_dict(), source.state_dict()
    new = own.keys() - shared.keys()
    assert new == {f"encoder.{m}.tokens.{t}" for m in ("audio", "video") for t in _TOKENS}
    for key, tensor in shared.items():
        if "audio" in key and "pos_embed" in key:
            exact = sincos_positions(tensor.shape[-1], (4, 6)).float()[None]
            assert torch.equal(own[key], exact), key
        else:
            assert torch.equal(own[key], tensor), key
    assert "encoder.audio.tokens.registers" in caplog.text
    assert "made for audio_length=48: pos_embed_a, decoder_pos_embed_a" in caplog.text


_TOKENS = ("cls", "registers")


def test_warm_start_takes_the_length_of_the_system(small, hints, tmp_path):
    export_published(small("cav_mae"), tmp_path / "w.pth")
    model = load_published(tmp_path / "w.pth", "cav_mae_sync", contrast_head_depth=1, **hints)
    assert model.config.audio_length == 416 and len(model.encoder.shared.heads["video"]) == 1


def test_another_length(small, same_state, hints, tmp_path):
    """Up or down and back: the tables of a pretrained model are a formula."""
    model = small("cav_mae_sync", audio_length=96)
    export_published(model, tmp_path / "w.pth")
    for length in (48, 192):
        changed = load_published(tmp_path / "w.pth", audio_length=length, **hints)
        table = changed.encoder.audio.patch_embed.pos_embed
        assert torch.equal(table, sincos_positions(24, (4, length // 8)).float()[None])
        export_published(changed, tmp_path / "changed.pth")
        back = load_published(tmp_path / "changed.pth", audio_length=96, **hints)
        same_state(back, model)


def test_trained_positions_are_cut_and_stretched_along_time():
    table = torch.randn(1, 4 * 6, 8)
    bands = table.view(4, 6, 8)
    cut = resize_positions(table, 4, 5)
    assert torch.equal(cut.view(4, 5, 8), bands[:, :5])
    longer = resize_positions(table, 4, 12).view(4, 12, 8)
    assert torch.equal(longer[:, 0], bands[:, 0]) and torch.equal(longer[:, -1], bands[:, -1])
    torch.testing.assert_close(longer[:, 5], 0.75 * bands[:, 2] + 0.25 * bands[:, 3])
    with pytest.raises(ValueError, match="24 audio positions has no 5 mel bands"):
        resize_positions(table, 5, 4)


def test_trained_positions_in_a_file(small, hints, tmp_path):
    options = {"num_classes": 3, "classifier_heads": 4, "audio_length": 96}
    model = small("cav_mae_sync_classifier", **options)  # its tables are off the formula
    export_published(model, tmp_path / "w.pth")
    loaded = load_published(tmp_path / "w.pth", audio_length=64, classifier_heads=4, **hints)
    before = model.encoder.audio.patch_embed.pos_embed.view(4, 12, 24)
    after = loaded.encoder.audio.patch_embed.pos_embed.view(4, 8, 24)
    assert torch.equal(after, before[:, :8])


def test_start_from_an_image_mae(hints, tmp_path):
    """MAE's CLS token becomes that of both modalities; registers are new."""
    dim, hidden = 24, 96
    state = {
        "cls_token": torch.randn(1, 1, dim),
        "pos_embed": torch.zeros(1, 17, dim),
        "patch_embed.proj.weight": torch.randn(dim, 3, 8, 8),
        "patch_embed.proj.bias": torch.randn(dim),
        "norm.weight": torch.randn(dim),
        "norm.bias": torch.randn(dim),
    }
    state["pos_embed"][:, 1:] = sincos_positions(dim, (4, 4)).float()
    sizes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (hidden, dim)}
    sizes |= {"mlp.fc2": (dim, hidden), "norm1": (dim,), "norm2": (dim,)}
    for index in range(3):
        for name, size in sizes.items():
            state[f"blocks.{index}.{name}.weight"] = torch.randn(size)
            state[f"blocks.{index}.{name}.bias"] = torch.randn(size[0])
    save_file(state, tmp_path / "mae.safetensors")
    options = {"decoder_embed_dim": 16, "decoder_depth": 1, "audio_length": 64}
    model = load_published(tmp_path / "mae.safetensors", "cav_mae_sync", **hints, **options)
    for stream in (model.encoder.audio, model.encoder.video):
        assert torch.equal(stream.tokens.cls, state["cls_token"])
        assert 0.7 < stream.tokens.registers.std() < 1.3
    assert load_published(tmp_path / "mae.safetensors", **hints, **options).name == "cav_mae"


def test_dead_norms_that_are_not_fresh_are_counted(small, hints, tmp_path, caplog):
    state = published_state(small("cav_mae_sync"))
    state["blocks_a.0.norm1_v.bias"] += 1
    save_file(state, tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO, "kdcmae_fast.convert"):
        load_published(tmp_path / "w.safetensors", **hints)
    assert "norms that no output depends on; 1 of them not as initialised" in caplog.text


def test_model_folder(small, same_state, tmp_path):
    model = small("cav_mae_sync", contrast_head_depth=1)
    model.save_pretrained(tmp_path / "folder")
    loaded = from_pretrained(tmp_path / "folder")
    assert loaded.config == model.config and type(loaded) is type(model)
    same_state(loaded, model)
    other = small("cav_mae_sync", contrast_head_depth=1)
    init_model(other, tmp_path / "folder")
    same_state(other, model)
