"""The ImageNet MAE as a starting point."""

import logging

import pytest
import torch

from kdcmae_fast.convert import init_model, load_published
from kdcmae_fast.convert.published import published_state
from kdcmae_fast.models.positions import sincos_positions

DIM, DEPTH, DECODER_DIM, PIXELS = 24, 3, 16, 3 * 64
SETTINGS = {"num_heads": 3, "decoder_num_heads": 2, "num_mel_bins": 32, "audio_length": 64}


def block(name, dim):
    shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    shapes |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    state = {f"{name}.{key}.weight": torch.randn(shape) for key, shape in shapes.items()}
    state |= {f"{name}.{key}.bias": torch.randn(shape[0]) for key, shape in shapes.items()}
    return state | norm(f"{name}.norm1", dim) | norm(f"{name}.norm2", dim)


def norm(name, dim):
    return {f"{name}.weight": torch.randn(dim), f"{name}.bias": torch.randn(dim)}


def with_cls(dim):
    return torch.cat([torch.zeros(1, dim), sincos_positions(dim, (4, 4)).float()])[None]


def mae(decoder=True):
    """Tensors under the names of the published MAE."""
    state = {"cls_token": torch.randn(1, 1, DIM), "pos_embed": with_cls(DIM)}
    state["patch_embed.proj.weight"] = torch.randn(DIM, 3, 8, 8)
    state["patch_embed.proj.bias"] = torch.randn(DIM)
    for index in range(DEPTH):
        state |= block(f"blocks.{index}", DIM)
    state |= norm("norm", DIM)
    if decoder:
        state["mask_token"] = torch.randn(1, 1, DECODER_DIM)
        state["decoder_pos_embed"] = with_cls(DECODER_DIM)
        state["decoder_embed.weight"] = torch.randn(DECODER_DIM, DIM)
        state["decoder_embed.bias"] = torch.randn(DECODER_DIM)
        state["decoder_pred.weight"] = torch.randn(PIXELS, DECODER_DIM)
        state["decoder_pred.bias"] = torch.randn(PIXELS)
        state |= norm("decoder_norm", DECODER_DIM)
        state |= block("decoder_blocks.0", DECODER_DIM)
    return state


@pytest.fixture
def saved(tmp_path):
    def save(state):
        torch.save({"model": state}, tmp_path / "mae.pth")
        return tmp_path / "mae.pth"

    return save


def test_whole_mae(saved, caplog):
    source = mae()
    with caplog.at_level(logging.INFO, "kdcmae_fast.convert"):
        model = load_published(saved(source), **SETTINGS)
    assert model.name == "cav_mae" and model.config.modality_depth == 2
    assert model.config.decoder_depth == 1 and model.config.img_size == 32
    result = published_state(model)

    def equal(name, tensor):
        assert torch.equal(result[name], tensor), name

    for m in "av":
        for index in (0, 1):
            equal(f"blocks_{m}.{index}.attn.qkv.weight", source[f"blocks.{index}.attn.qkv.weight"])
            equal(f"blocks_{m}.{index}.norm2.bias", source[f"blocks.{index}.norm2.bias"])
        equal(f"patch_embed_{m}.proj.bias", source["patch_embed.proj.bias"])
    equal("blocks_u.0.mlp.fc1.weight", source["blocks.2.mlp.fc1.weight"])
    for suffix in ("", "_a", "_v"):
        equal(f"blocks_u.0.norm1{suffix}.weight", source["blocks.2.norm1.weight"])
        equal(f"norm{suffix}.bias", source["norm.bias"])
    colour = source["patch_embed.proj.weight"]
    equal("patch_embed_v.proj.weight", colour)
    equal("patch_embed_a.proj.weight", colour.sum(1, keepdim=True))
    equal("pos_embed_v", source["pos_embed"][:, 1:])
    equal("decoder_pos_embed_v", source["decoder_pos_embed"][:, 1:])
    equal("pos_embed_a", sincos_positions(DIM, (4, 8)).float()[None])
    for key in ("mask_token", "decoder_embed.weight", "decoder_norm.bias"):
        equal(key, source[key])
    equal("decoder_blocks.0.mlp.fc2.bias", source["decoder_blocks.0.mlp.fc2.bias"])
    equal("decoder_pred_v.weight", source["decoder_pred.weight"])
    equal("decoder_pred_a.weight", source["decoder_pred.weight"][:64])
    equal("decoder_pred_a.bias", source["decoder_pred.bias"][:64])
    assert 0 < result["modality_a"].abs().max() < 0.2  # fresh
    assert "no use for cls_token" in caplog.text
    assert "encoder.audio.patch_embed.modality" in caplog.text


def test_encoder_only(saved, caplog):
    source = mae(decoder=False)
    sizes = {"decoder_embed_dim": 32, "decoder_depth": 1}
    with caplog.at_level(logging.INFO, "kdcmae_fast.convert"):
        model = load_published(saved(source), "kdc_mae", **SETTINGS, **sizes)
    assert torch.equal(model.encoder.shared.norm["audio"].weight, source["norm.weight"])
    assert model.config.num_views == 2
    assert "decoder.audio_head.weight" in caplog.text
    assert (model.decoder.norm.weight == 1).all()


def test_into_a_classifier(saved):
    source = mae()
    model = load_published(saved(source), "cav_mae_classifier", num_classes=3, **SETTINGS)
    assert torch.equal(model.encoder.shared.norm["joint"].weight, source["norm.weight"])
    assert (model.head.norm.weight == 1).all()


def test_under_cav_mae_names(saved):
    """As CAV-MAE distributes it: renamed, with MAE's CLS token, without what MAE lacks."""
    first = load_published(saved(mae()), **SETTINGS)
    state = published_state(first)
    for key in [k for k in state if k.startswith(("modality", "decoder_modality"))]:
        del state[key]
    del state["pos_embed_a"], state["decoder_pos_embed_a"]
    state |= {"cls_token_a": torch.zeros(1, 1, DIM), "cls_token_v": torch.zeros(1, 1, DIM)}
    second = load_published(saved(state), **SETTINGS)
    assert second.name == "cav_mae" and first.state_dict().keys() == second.state_dict().keys()
    state["cls_token_a"] += 1
    sync = load_published(saved(state), "cav_mae_sync", **SETTINGS)
    assert (sync.encoder.audio.tokens.cls == 1).all()
    assert not sync.encoder.video.tokens.cls.any()
    for key, tensor in first.state_dict().items():
        if "modality" not in key:
            assert torch.equal(tensor, second.state_dict()[key]), key


def test_init_model_and_depths(saved):
    source = mae()
    model = load_published(saved(source), shared_depth=2, **SETTINGS)
    assert model.config.modality_depth == 1
    fc1 = model.encoder.shared.blocks[0].mlp.fc1.weight
    assert torch.equal(fc1, source["blocks.1.mlp.fc1.weight"])
    with torch.no_grad():
        fc1.zero_()
    init_model(model, saved(source))
    assert torch.equal(fc1, source["blocks.1.mlp.fc1.weight"])


def test_strict(saved):
    source = mae()
    source["fc_norm.weight"] = source.pop("norm.weight")
    with pytest.raises(ValueError) as caught:
        load_published(saved(source), **SETTINGS)
    message = str(caught.value)
    assert "missing: " in message and "norm_a.weight" in message
    assert "unknown: fc_norm.weight" in message
