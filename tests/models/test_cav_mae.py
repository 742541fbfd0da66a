"""Behaviour of CAV-MAE and KDC-MAE: exact rearrangements, options, absent terms."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdcmae_fast.kernels import (
    MaskPlan,
    distillation_loss,
    info_nce,
    masked_reconstruction_loss,
)
from kdcmae_fast.models import Batch
from kdcmae_fast.models.objectives import pool

KDC = {"num_views": 2, "distill": {"on": "joint"}}
EVERYTHING = {"num_views": 2, "distill": {"on": "joint+modality"}}


def assert_same(first, second, tolerance=1e-12):
    (losses, grads), (other_losses, other_grads) = first, second
    assert list(losses) == list(other_losses)
    for name in losses:
        torch.testing.assert_close(losses[name], other_losses[name], rtol=tolerance, atol=0)
    assert grads.keys() == other_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], other_grads[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shared_depth, chain", [(1, "composed"), (3, "composed"), (3, "released")])
def test_packed_shared_blocks_equal_three_passes(small, batch, gradients, shared_depth, chain):
    options = {"shared_depth": shared_depth, "shared_chain": chain, **EVERYTHING}
    packed = gradients(small(packed_shared=True, **options), batch)
    assert_same(packed, gradients(small(packed_shared=False, **options), batch))


def test_activation_checkpointing_changes_nothing(small, batch, gradients):
    plain = gradients(small(**EVERYTHING), batch)
    assert_same(plain, gradients(small(activation_checkpointing=True, **EVERYTHING), batch))


SHORTCUTS = ("decoder_masked_only", "mask_token_table")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "num_views, restore", [(1, "corrected"), (2, "released"), (3, "corrected")]
)
@pytest.mark.parametrize("taken", [SHORTCUTS[:1], SHORTCUTS[1:], SHORTCUTS])
def test_decoder_shortcuts_are_exact(
    small, batch, gradients, taken, num_views, restore, recompute, depth
):
    options = {"num_views": num_views, "restore": restore, "decoder_depth": depth}
    options |= dict.fromkeys(SHORTCUTS, False)
    plain = gradients(small(**options), batch)
    options |= dict.fromkeys(taken, True)
    short = gradients(small(activation_checkpointing=recompute, **options), batch)
    assert_same(plain, short)


def test_decoder_shortcuts_leave_reconstructions_alone(small, batch):
    plain = small(**KDC, **dict.fromkeys(SHORTCUTS, False)).reconstruct(batch)
    short = small(**KDC, **dict.fromkeys(SHORTCUTS, True)).reconstruct(batch)
    torch.testing.assert_close(short.audio, plain.audio)
    torch.testing.assert_close(short.video, plain.video)


def test_decoder_shortcuts_do_less(small, batch):
    def flops(**options):
        model = small(**KDC, **options)
        with FlopCounterMode(display=False) as counter:
            model(batch).total.backward()
        return counter.get_total_flops()

    plain = flops(**dict.fromkeys(SHORTCUTS, False))
    for name in SHORTCUTS:
        assert flops(**{**dict.fromkeys(SHORTCUTS, False), name: True}) < plain


def test_activation_checkpointing_keeps_less(small, batch, saved_storages):
    def kept(**options):
        model = small(**options)
        return sum(saved_storages(lambda: model(batch).total).values())

    assert kept(activation_checkpointing=True) < kept() / 2


def test_released_chain_runs_only_the_last_shared_block(small, batch):
    model = small(shared_depth=3, shared_chain="released")
    plans = model.reconstruct(batch).plans
    before = model.encoder(batch.fbank, batch.frames, plans)
    features = model.encode(batch.fbank)
    with torch.no_grad():
        for parameter in model.encoder.shared.blocks[0].parameters():
            parameter.zero_()
    after = model.encoder(batch.fbank, batch.frames, plans)
    torch.testing.assert_close(before.audio, after.audio)
    torch.testing.assert_close(before.video, after.video)
    assert not torch.allclose(before.joint, after.joint)
    # Unmasked features always go through every shared block.
    assert not torch.allclose(features.audio, model.encode(batch.fbank).audio)


def test_heads_on_masked_patches_equal_full_prediction(small, batch):
    model = small(**KDC)
    reconstruction = model.reconstruct(batch, step=4)
    losses = model(batch, step=4)
    for name, pred, pixels in (
        ("mae_audio", reconstruction.audio, batch.fbank),
        ("mae_video", reconstruction.video, batch.frames),
    ):
        plan = reconstruction.plans[name.removeprefix("mae_")]
        rows = masked_reconstruction_loss(pred, pixels, plan, patch_size=8, reduction="none")
        torch.testing.assert_close(losses[name], rows.view(2, -1).mean(1).sum())
    latent = model.encoder(batch.fbank, batch.frames, reconstruction.plans).joint
    audio, video = model.decoder(latent, reconstruction.plans)
    for name, some, every in (
        ("audio", audio, reconstruction.audio),
        ("video", video, reconstruction.video),
    ):
        plan = reconstruction.plans[name]
        for view in (0, 1):
            ids = plan.ids_masked(view)[..., None].expand(-1, -1, every.shape[2])
            torch.testing.assert_close(some.chunk(2)[view], every.chunk(2)[view].gather(1, ids))


@pytest.mark.parametrize("num_views", [1, 2, 3, 4])
def test_views_in_one_batch_equal_views_one_by_one(small, batch, num_views):
    model = small(num_views=num_views)
    losses = model(batch, step=7)
    plans = model.reconstruct(batch, step=7).plans
    single = small(num_views=1)
    assert len(losses.per_view) == num_views
    for view, terms in enumerate(losses.per_view):
        # Rotating the shuffle turns view k into view 0 of a one-view plan.
        one = {
            name: MaskPlan(
                plan.token_of_rank.roll(-view * plan.len_keep, dims=1),
                plan.ids_restore(view).to(torch.int16),
                plan.len_keep,
                1,
                plan.num_tokens,
            )
            for name, plan in plans.items()
        }
        expected = single(batch, one)
        for name in ("mae_audio", "mae_video", "contrastive"):
            torch.testing.assert_close(terms[name], expected[name])
    for name in ("mae_audio", "mae_video", "contrastive"):
        torch.testing.assert_close(losses[name], sum(t[name] for t in losses.per_view))


def test_independent_views_are_drawn_apart(small, batch):
    losses, both = [], small(num_views=2, views="independent", distill={"on": "joint"})
    reconstruction = both.reconstruct(batch, step=3)
    plan = reconstruction.plans["audio"]
    assert plan.num_views == 1 and plan.token_of_rank.shape == (10, 32)
    assert reconstruction.audio.shape == (10, 32, 64)
    first, second = (set(ids.tolist()) for ids in plan.ids_keep(0)[[0, 5]])
    assert first != second
    losses = both(batch, step=3)
    alone = small(num_views=1)
    torch.testing.assert_close(
        losses.per_view[0].mae_audio, alone(batch, step=3).mae_audio, rtol=1e-12, atol=0
    )
    # Three views of half the tokens each would not fit side by side; apart they may overlap.
    small(num_views=3, views="independent", mask_ratio=0.5)(batch).total.backward()


def test_restore_matters_from_the_second_view_on(small, batch):
    corrected = small(**KDC)(batch)
    released = small(restore="released", **KDC)(batch)
    assert released.per_view[0] == corrected.per_view[0]
    assert released.per_view[1].mae_audio != corrected.per_view[1].mae_audio
    assert released.per_view[1].contrastive == corrected.per_view[1].contrastive


@pytest.mark.parametrize("on", ["joint", "joint+modality"])
@pytest.mark.parametrize("num_views", [2, 3])
def test_distillation_is_the_mean_over_pairs(small, batch, on, num_views):
    model = small(num_views=num_views, distill={"on": on, "temperature": 0.7})
    losses = model(batch)
    latents = model.encoder(batch.fbank, batch.frames, model.reconstruct(batch).plans)
    streams = ("joint",) if on == "joint" else ("joint", "audio", "video")
    expected = 0
    for stream in streams:
        views = pool(getattr(latents, stream)).chunk(num_views)
        pairs = [
            distillation_loss(a, b, temperature=0.7) for a, b in itertools.combinations(views, 2)
        ]
        expected += sum(pairs) / len(pairs)
    torch.testing.assert_close(losses.kd, expected)
    parts = losses.mae_audio + losses.mae_video + 0.01 * losses.contrastive + 10 * losses.kd
    torch.testing.assert_close(losses.total, parts)


def test_stop_gradient_keeps_the_teacher_view_out(small, batch):
    options = {"on": "joint", "divergence": "kl_12"}
    weights = {"mae_loss_weight": 0.0, "contrast_loss_weight": 0.0, "num_views": 2}
    free = small(distill=options, **weights)
    fixed = small(distill={**options, "stop_gradient": True}, **weights)
    first, second = free(batch), fixed(batch)
    torch.testing.assert_close(first.kd, second.kd)
    for losses in (first, second):
        losses.total.backward()
    name = "encoder.shared.norm.joint.bias"
    one, other = free.get_parameter(name).grad, fixed.get_parameter(name).grad
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("distribution", ["softmax", "shift", "batch_shift"])
@pytest.mark.parametrize("divergence", ["kl", "kl_12", "js"])
def test_every_distillation_trains(small, batch, distribution, divergence):
    options = {"on": "joint", "divergence": divergence, "distribution": distribution}
    losses = small(num_views=2, distill=options)(batch)
    losses.total.backward()
    assert losses.kd > 0


@pytest.mark.parametrize("mode", ["time", "freq", "tf"])
def test_structured_audio_masks(small, batch, mode):
    model = small(audio_mask_mode=mode, **KDC)
    plan = model.reconstruct(batch).plans["audio"]
    kept = plan.ids_keep(0)[0]
    if mode == "time":  # 8 of 32 tokens, in columns of 4
        assert len(set((kept % 8).tolist())) == 2
    if mode == "freq":  # in rows of 8
        assert len(set((kept // 8).tolist())) == 1
    model(batch).total.backward()


def test_terms_without_weight_are_absent(small, batch):
    losses = small()(batch)
    assert list(losses.named()) == ["total", "mae_audio", "mae_video", "contrastive"]
    with pytest.raises(AttributeError, match="no term 'kd' here; there are: total"):
        losses.kd  # noqa: B018
    assert not hasattr(small(contrast_loss_weight=0.0)(batch), "contrastive")

    model = small(mae_loss_weight=0.0)
    losses = model(batch)
    assert list(losses) == ["total", "contrastive"]
    losses.total.backward()
    assert all(p.grad is None for p in model.decoder.parameters())
    with pytest.raises(ValueError, match="mae_loss_weight=0 and contrast_loss_weight=0"):
        small(mae_loss_weight=0.0, contrast_loss_weight=0.0)


def test_uncertainty_weighting_starts_as_fixed_and_learns(small, batch):
    fixed, learned = small(**KDC), small(loss_weighting="uncertainty", **KDC)
    losses = learned(batch)
    torch.testing.assert_close(losses.total, fixed(batch).total)
    losses.total.backward()
    weights = {"mae_audio": 1.0, "mae_video": 1.0, "contrastive": 0.01, "kd": 10.0}
    parameter = learned.objective.weighting.log_variance
    expected = torch.stack([1 - weight * losses[name] for name, weight in weights.items()])
    torch.testing.assert_close(parameter.grad, expected.detach())
    with torch.no_grad():
        parameter.fill_(math.log(2))
    expected = fixed(batch).total / 2 + 4 * math.log(2)
    torch.testing.assert_close(learned(batch).total, expected)


def test_objective_options_reach_the_ops(small, batch):
    base = small()(batch)
    assert small(norm_pix_loss=False)(batch).mae_audio != base.mae_audio
    assert small(symmetric=True)(batch).contrastive != base.contrastive
    assert small(temperature=0.5)(batch).contrastive != base.contrastive
    assert small(mask_seed=1)(batch).mae_audio != base.mae_audio
    assert small(video_mask_ratio=0.5)(batch).mae_audio != base.mae_audio  # joint tokens


@pytest.mark.parametrize("negatives", ["global", "local"])
def test_only_global_negatives_use_the_group(small, batch, monkeypatch, negatives):
    groups = []

    def record(*args, group, **options):
        groups.append(group)
        return info_nce(*args, **options)

    monkeypatch.setattr("kdcmae_fast.models.objectives.info_nce", record)
    model = small(num_views=2, negatives=negatives)
    model.contrast_group = group = object()
    model(batch)
    assert groups == [group if negatives == "global" else None] * 2


def test_masks_follow_the_step_and_the_sample_not_the_batch(small, batch):
    model = small()
    assert model(batch, step=1).total == model(batch, step=1).total
    assert model(batch, step=1).total != model(batch, step=2).total
    plan = model.reconstruct(batch, step=1).plans["audio"]
    alone = model.reconstruct(Batch(*(tensor[3:4] for tensor in batch)), step=1).plans["audio"]
    assert torch.equal(plan.token_of_rank[3:4], alone.token_of_rank)


def test_uint8_frames_are_normalised(small, batch):
    model = small()
    raw = torch.randint(0, 256, batch.frames.shape, dtype=torch.uint8)
    mean, std = (
        torch.tensor(v).double().view(3, 1, 1)
        for v in (model.config.pixel_mean, model.config.pixel_std)
    )
    floats = (raw.double() / 255 - mean) / std
    for name, value in model(batch._replace(frames=floats)).items():
        torch.testing.assert_close(
            model(batch._replace(frames=raw))[name], value, rtol=1e-6, atol=0
        )


def test_encode_takes_either_modality(small, batch):
    model = small()
    both = model.encode(batch.fbank, batch.frames)
    audio, video = model.encode(fbank=batch.fbank), model.encode(frames=batch.frames)
    torch.testing.assert_close(audio.audio, both.audio)
    torch.testing.assert_close(video.video_tokens, both.video_tokens)
    assert audio.video is None and audio.video_tokens is None and video.audio is None
    assert both.audio.shape == (5, 24) and both.audio_tokens.shape == (5, 32, 24)
    torch.testing.assert_close(both.video, both.video_tokens.mean(dim=1))
    with pytest.raises(ValueError, match="fbank and frames are both None"):
        model.encode()


def test_wrong_inputs_are_named(small, batch):
    model = small()
    with pytest.raises(ValueError, match=r"fbank must have the shape \(B, 64, 32\)"):
        model.encode(fbank=batch.fbank.transpose(1, 2))
    with pytest.raises(ValueError, match=r"frames must have the shape \(B, 3, 32, 32\)"):
        model.encode(frames=batch.frames[:, :1])
    plans = small(num_views=2).reconstruct(batch).plans
    with pytest.raises(ValueError, match=r"plans\['audio'\] has \(views, rows, tokens\)"):
        model(batch, plans)
    with pytest.raises(ValueError, match="keys audio and video"):
        model(batch, {"audio": plans["audio"]})
    with pytest.raises(ValueError, match=r"plans\['audio'\] must be a MaskPlan, got int"):
        model(batch, {"audio": 3, "video": plans["video"]})
    with pytest.raises(ValueError, match=r"sample_ids must be \(B,\) = \(\d+,\), got \(2,\)"):
        model(batch._replace(sample_ids=batch.sample_ids[:2]))
    with pytest.raises(ValueError, match="frames has 2 clips, fbank has"):
        model(batch._replace(frames=batch.frames[:2]))
    with pytest.raises(ValueError, match="batch has 0 clips: the losses are means over clips"):
        model(Batch(*(part[:0] for part in batch)))


def test_encode_takes_an_empty_batch(small, batch):
    features = small().encode(fbank=batch.fbank[:0], frames=batch.frames[:0])
    assert features.audio.shape == features.video.shape == (0, small().config.embed_dim)


def test_bf16_and_autocast(small, batch):
    exact = small(**KDC)(batch)
    fp32 = Batch(batch.fbank.float(), batch.frames.float(), batch.sample_ids)
    mixed, low = small(**KDC).float(), small(**KDC).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        results = [mixed(fp32)]
    results.append(low(fp32))
    for losses in results:
        assert losses.total.dtype == torch.float32
        torch.testing.assert_close(losses.total.double(), exact.total, rtol=0.03, atol=0)
        losses.total.backward()
    assert low.encode(fp32.fbank).audio.dtype == torch.float32


def test_the_same_seed_gives_the_same_bits(small, batch, gradients):
    fp32 = Batch(batch.fbank.float(), batch.frames.float(), batch.sample_ids)
    (one, grads), (two, other) = (gradients(small(**KDC).float(), fp32) for _ in range(2))
    assert one == two
    assert all(torch.equal(grads[key], other[key]) for key in grads)


def test_every_parameter_gets_a_gradient(small, batch, gradients):
    model = small(**KDC)
    _, grads = gradients(model, batch)
    assert grads.keys() == dict(model.named_parameters()).keys()
