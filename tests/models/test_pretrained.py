"""`save_pretrained` and `from_pretrained`."""

import json

import pytest
import torch

from kdcmae_fast import __version__
from kdcmae_fast.models import from_pretrained


@pytest.mark.parametrize(
    "name, options",
    [
        ("cav_mae", {}),
        ("kdc_mae", {"loss_weighting": "uncertainty", "distill": {"divergence": "js"}}),
        ("cav_mae_classifier", {"num_classes": 4}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_save_then_load_is_the_identity(small, tmp_path, name, options, dtype):
    model = small(name, **options).to(dtype)
    model.save_pretrained(tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)
    assert loaded.name == name and loaded.config == model.config
    assert getattr(loaded, "num_classes", None) == options.get("num_classes")
    state, other = model.state_dict(), loaded.state_dict()
    assert list(state) == list(other)
    for key in state:
        assert torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype
    assert json.loads((tmp_path / "model/config.json").read_text())["version"] == __version__
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json", "model.safetensors"
    ]  # fmt: skip


def test_given_weights_are_written_instead(small, tmp_path):
    model = small()
    state = {key: torch.full_like(tensor, 2.0) for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert all((p == 2).all() for p in from_pretrained(tmp_path).parameters())
    del state["encoder.shared.norm.joint.bias"]
    with pytest.raises(ValueError, match="state_dict does not fit .* missing: encoder.shared"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a_failed_save_leaves_the_old_model(small, tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def interrupted(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("kdcmae_fast.models.pretrained.save_file", interrupted)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_errors_name_the_file(small, tmp_path):
    with pytest.raises(ValueError, match="is not a model folder: it has no config.json"):
        from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    record = json.loads(config.read_text())

    def rewritten(**changes):
        config.write_text(json.dumps(record | {"config": record["config"] | changes}))
        return tmp_path

    with pytest.raises(ValueError, match="does not fit the model; wrong sizes: decoder.mask_token"):
        from_pretrained(rewritten(decoder_embed_dim=32))
    with pytest.raises(ValueError, match="missing: encoder.audio.blocks.2.norm1"):
        from_pretrained(rewritten(modality_depth=3))
    with pytest.raises(ValueError, match="colour: unknown setting"):
        from_pretrained(rewritten(colour="red"))
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        from_pretrained(tmp_path)
    config.write_text("[]")
    with pytest.raises(ValueError, match="must have the keys name and config"):
        from_pretrained(tmp_path)
    rewritten()
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no model.safetensors"):
        from_pretrained(tmp_path)
