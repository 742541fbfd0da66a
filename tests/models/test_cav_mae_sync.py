"""Behaviour of CAV-MAE Sync: tokens, passes, objectives, options, errors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdcmae_fast.data.segments import segment_starts, take_segments
from kdcmae_fast.evaluation.clips import encode_clip
from kdcmae_fast.models import Batch, build_model
from kdcmae_fast.models.masking import draw_plans, removed_share
from kdcmae_fast.models.objectives import contrast_features

SYNC = "cav_mae_sync"
EVERYTHING = {"contrast_head_depth": 1, "keep_registers": True, "global_local": True}
STREAMS = ("joint", "audio", "video")


@pytest.fixture
def sync(small):
    """A tiny fp64 model on the clips of `batch`, with two registers unless told otherwise."""
    return lambda **options: small(SYNC, **({"num_registers": 2} | options))


def assert_same(first, second, tolerance=1e-12):
    (losses, grads), (other_losses, other_grads) = first, second
    assert list(losses) == list(other_losses) and grads.keys() == other_grads.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], other_losses[name], rtol=tolerance, atol=0)
    for name in grads:
        torch.testing.assert_close(grads[name], other_grads[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "large"])
def test_presets(preset):
    with torch.device("meta"):
        config = build_model(SYNC, preset).config
        build_model("cav_mae_sync_classifier", preset, num_classes=309)
    assert (config.audio_length, config.cls_token, config.num_registers) == (416, True, 8)
    assert (config.contrast_loss_weight, config.contrast_head_depth) == (0.1, 0)
    assert not config.keep_registers and not config.global_local


@pytest.mark.parametrize("length", [16, 96, 416, 1024])
def test_any_multiple_of_16_is_a_length(length):
    with torch.device("meta"):
        model = build_model(SYNC, "tiny", audio_length=length)
    assert model.encoder.audio.patch_embed.num_patches == length // 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"audio_length": 100}, "audio_length=100: expected a multiple of patch_size=16"),
        ({"audio_length": 0}, "audio_length=0"),
        ({"num_registers": -1}, "num_registers=-1"),
        ({"cls_token": False, "global_local": True}, "global_local=True: compares the CLS tokens"),
        ({"num_registers": 0, "keep_registers": True}, "keep_registers=True: there are none"),
        ({"multi_ratio_masking": True, "video_mask_ratio": 0.5}, "video_mask_ratio=0.5: multi_ra"),
        ({"multi_ratio_masking": True, "num_views": 3}, "num_views=3: 3 complementary views of"),
        ({"frames_per_clip": 0}, "frames_per_clip=0"),
        ({"within_clip": "ignored"}, "within_clip='ignored'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError) as caught:
        build_model(SYNC, "tiny", **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_kept_counts_of_the_published_configuration():
    """52 and 49 patches are kept; 101 are joined, 53 and 50 with CLS; registers are gone."""
    torch.manual_seed(0)
    model = build_model(SYNC, "tiny", modality_depth=1, decoder_depth=1)
    batch = Batch(torch.randn(1, 416, 128), torch.randn(1, 3, 224, 224), torch.tensor([7]))
    lengths = {}
    shared = model.encoder.shared

    def note(_, arguments):
        lengths.update({stream: x.shape[1] for stream, x in arguments[0].items()})

    shared.register_forward_pre_hook(note)
    plans = model.reconstruct(batch).plans
    assert (plans["audio"].num_tokens, plans["audio"].len_keep) == (208, 52)
    assert (plans["video"].num_tokens, plans["video"].len_keep) == (196, 49)
    model(batch)
    assert lengths == {"joint": 101, "audio": 53, "video": 50}
    model.encode(batch.fbank, batch.frames)
    assert (lengths["audio"], lengths["video"]) == (209, 197)


def test_without_its_tokens_it_is_cav_mae(small, batch):
    plain = small("cav_mae")
    same = small(SYNC, cls_token=False, num_registers=0, contrast_loss_weight=0.01)
    same.load_state_dict(plain.state_dict())
    expected, losses = plain(batch), same(batch)
    assert {name: value.item() for name, value in losses.items()} == expected
    assert torch.equal(same.encode(batch.fbank).audio, plain.encode(batch.fbank).audio)


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"shared_depth": 3}])
def test_three_joint_passes_at_once_equal_one_by_one(sync, batch, gradients, options):
    packed = gradients(sync(packed_shared=True, **options), batch)
    assert_same(packed, gradients(sync(packed_shared=False, **options), batch))


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"num_views": 2}])
def test_heads_on_masked_tokens_equal_all(sync, batch, gradients, options):
    short = gradients(sync(decoder_masked_only=True, **options), batch)
    assert_same(short, gradients(sync(decoder_masked_only=False, **options), batch))


def test_activation_checkpointing_changes_nothing(sync, batch, gradients):
    plain = gradients(sync(**EVERYTHING), batch)
    assert_same(plain, gradients(sync(activation_checkpointing=True, **EVERYTHING), batch))


def test_every_parameter_is_trained(sync, batch, gradients):
    model = sync(contrast_head_depth=2)
    _, found = gradients(model, batch)
    assert found.keys() == dict(model.named_parameters()).keys()


def test_the_contrast_reaches_the_passes_through_cls_alone(sync, batch):
    model = sync()
    plans = draw_plans(model.config, batch.sample_ids, 0)
    latents = model.encoder(batch.fbank, batch.frames, plans)
    audio, video = contrast_features(model.config, latents)
    assert torch.equal(audio, latents.audio_cls) and torch.equal(video, latents.video_cls)
    grads = torch.autograd.grad(
        model(batch, plans).contrastive, model.parameters(), allow_unused=True
    )
    names = [name for name, _ in model.named_parameters()]
    unused = {n for n, g in zip(names, grads, strict=True) if g is None or not g.any()}
    assert {name for name in names if name.startswith("decoder.")} <= unused
    joint = {name for name in names if ".joint." in name}
    assert joint and joint <= unused


def test_the_reconstruction_never_sees_cls_in_the_joint_pass(sync, batch):
    """With no private blocks there is no way for CLS and registers to reach the patches."""
    model = sync(modality_depth=0)
    before = model(batch)
    with torch.no_grad():
        for stream in (model.encoder.audio, model.encoder.video):
            stream.tokens.cls.add_(1)
            stream.tokens.registers.add_(1)
    after = model(batch)
    assert after.mae_audio == before.mae_audio and after.mae_video == before.mae_video
    assert after.contrastive != before.contrastive


def test_keep_registers_is_the_figures_mode(sync, batch):
    """Registers join the single-modality passes; the joint pass and its decoder do not see them."""
    dropped, kept = sync(), sync(keep_registers=True)
    kept.load_state_dict(dropped.state_dict())
    first, second = dropped(batch), kept(batch)
    assert first.mae_audio == second.mae_audio and first.mae_video == second.mae_video
    assert first.contrastive != second.contrastive
    plans = draw_plans(kept.config, batch.sample_ids, 0)
    a, b = (m.encoder(batch.fbank, batch.frames, plans) for m in (dropped, kept))
    assert torch.equal(a.joint, b.joint) and a.audio.shape == b.audio.shape
    assert not torch.equal(a.audio, b.audio)
    features = kept.encode(batch.fbank, batch.frames)
    assert features.audio_tokens.shape == (5, 32, 24) and features.audio.shape == (5, 24)


def test_a_batch_of_one(sync, batch):
    model = sync()
    one = Batch(*(tensor[:1] for tensor in batch))
    model(one).total.backward()
    assert model.encode(*one[:2]).audio.shape == (1, 24)


def test_released_chain_of_a_deeper_joint_stack(sync, batch):
    """Only the last block acts in the single-modality passes, in inference too."""
    released = sync(shared_depth=3, shared_chain="released")
    composed = sync(shared_depth=3)
    composed.load_state_dict(released.state_dict())
    before = released.encode(batch.fbank).audio
    assert not torch.allclose(before, composed.encode(batch.fbank).audio)
    plans = draw_plans(released.config, batch.sample_ids, 0)
    joint = released.encoder(batch.fbank, batch.frames, plans).joint
    with torch.no_grad():
        for parameter in released.encoder.shared.blocks[0].parameters():
            parameter.zero_()
    assert torch.equal(released.encode(batch.fbank).audio, before)
    assert not torch.allclose(released.encoder(batch.fbank, batch.frames, plans).joint, joint)


def test_initial_tokens():
    torch.manual_seed(0)
    tokens = build_model(SYNC, "tiny", num_registers=100).encoder.audio.tokens
    assert 0.95 < tokens.registers.std() < 1.05 and 0.015 < tokens.cls.std() < 0.025
    small = build_model(SYNC, "tiny", num_registers=100, register_std=0.02)
    assert 0.019 < small.encoder.video.tokens.registers.std() < 0.021


def test_multi_ratio_masking(sync, batch):
    model = sync(multi_ratio_masking=True)
    config = model.config
    ratios = {(step, m): removed_share(config, m, step) for step in range(200) for m in (0, 1)}
    assert all(0.6 <= ratio <= 0.9 for ratio in ratios.values())
    assert len(set(ratios.values())) == 400
    assert 0.73 < sum(ratios.values()) / 400 < 0.77
    # Other clips, as another rank has them, keep as many tokens; another seed draws anew.
    ours, theirs = (draw_plans(config, ids, 3) for ids in (torch.arange(4), torch.arange(40, 47)))
    for name, tokens in (("audio", 32), ("video", 16)):
        keep = int(tokens * (1 - ratios[3, ("audio", "video").index(name)]))
        assert ours[name].len_keep == theirs[name].len_keep == keep
    other = sync(multi_ratio_masking=True, mask_seed=1).config
    assert removed_share(other, 0, 3) != ratios[3, 0]
    for step in range(3):
        assert model(batch, step=step).total.isfinite()


@pytest.mark.parametrize("mode", ["time", "freq", "tf"])
def test_structured_masks_on_a_segment(mode):
    with torch.device("meta"):
        config = build_model(SYNC, "tiny", audio_mask_mode=mode).config
    plan = draw_plans(config, torch.arange(3), 0)["audio"]
    removed = plan.mask(0).view(3, 8, 26)
    assert plan.len_keep == 52 and (removed.sum((1, 2)) == 208 - 52).all()
    columns, rows = removed.all(1).sum(1), removed.all(2).sum(1)
    assert (columns >= {"time": 19, "freq": 0, "tf": 13}[mode]).all()
    assert (rows >= {"time": 0, "freq": 6, "tf": 4}[mode]).all()


def test_each_distinct_segment_is_encoded_once(sync):
    model = sync()
    generator = torch.Generator().manual_seed(4)
    fbank = torch.randn(2, 160, 32, generator=generator, dtype=torch.float64)
    frames = torch.randn(2, 16, 3, 32, 32, generator=generator, dtype=torch.float64)
    starts = torch.tensor(segment_starts(16, 64, 160))
    distinct = len(set(starts.tolist()))
    assert distinct < 16
    segments = take_segments(fbank, starts.expand(2, 16), 64).flatten(0, 1)
    full = model.encode(segments, frames.flatten(0, 1))
    rows = []
    model.encoder.audio.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    for size in (64, 5):
        rows.clear()
        features = encode_clip(model, fbank, frames, starts, rows_per_pass=size)
        assert sum(rows) == 2 * distinct and max(rows) <= size
        for found, expected in zip(features, full[:2], strict=True):
            assert found.shape == (2, 16, 24)
            torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-12, atol=1e-12)
    own = starts + torch.tensor([[0], [1]])  # starts of each clip's own
    own[:, -1] = own[:, 0]
    torch.testing.assert_close(
        encode_clip(model, fbank, frames, own.clamp(max=96)).audio[1, 3],
        model.encode(fbank[1:, own[1, 3] : own[1, 3] + 64]).audio[0],
    )
    with pytest.raises(ValueError, match="segments of 64 rows do not fit into an fbank of 160"):
        encode_clip(model, fbank, frames, starts + 1)


def test_deduplication_saves_audio_work(sync):
    model = sync()
    fbank, frames = torch.zeros(1, 160, 32).double(), torch.zeros(1, 16, 3, 32, 32).double()

    def flops(starts):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encode_clip(model, fbank, frames, torch.tensor(starts))
        return counter.get_total_flops()

    assert flops([0] * 16) < flops(segment_starts(16, 64, 160)) < flops(list(range(16)))


def test_bf16_autocast_and_raw_frames(sync, batch):
    model = sync(**EVERYTHING).float()
    frames = (batch.frames * 40 + 128).clamp(0, 255).to(torch.uint8)
    raw = Batch(batch.fbank.float(), frames, batch.sample_ids)
    exact = model(raw)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(raw)
        features = model.encode(raw.fbank, raw.frames)
    assert features.audio.dtype == losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, exact.total, rtol=0.02, atol=0)
    losses.total.backward()


def test_distillation_joins_in(sync, batch, gradients):
    """The parts compose: two views, distilled, with CLS standing for a modality."""
    losses, _ = gradients(sync(num_views=2, distill={"on": "joint+modality"}), batch)
    assert losses.kd > 0 and len(losses.per_view) == 2
