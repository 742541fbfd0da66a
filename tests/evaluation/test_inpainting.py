"""Inpainting: hidden parts have no influence, errors and baselines are right, files are written."""

import json
import wave

import pytest
import torch

from kdcmae_fast.batch import Batch
from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import FrontEnd
from kdcmae_fast.data.loader import collate
from kdcmae_fast.evaluation import EvaluationSource, Hiding, hide_patches, inpaint
from kdcmae_fast.evaluation.inpainting import LABELS, Inpainting, inpainting_table, other_clips
from kdcmae_fast.evaluation.mean_clip import MeanClip
from kdcmae_fast.evaluation.reconstruction import reconstruct
from kdcmae_fast.evaluation.source import Opened
from kdcmae_fast.evaluation.views import reconstruct_batch
from kdcmae_fast.kernels.tokens import patchify

SYSTEMS = {
    "cav_mae": {},
    "kdc_mae": {"norm_pix_loss": False},
    "kdc_mae, independent": {"views": "independent"},
    "kdc_mae, table": {"mask_token_table": True, "packed_shared": False},
    "cav_mae_sync": {},
}


@pytest.fixture
def system(make_model):
    def make(name):
        return make_model(name.split(",")[0], **SYSTEMS[name])

    return make


@pytest.fixture
def batch(clips, data, model):
    return FrontEnd(data, model.config)(collate([clips().read(index, 0) for index in range(3)]))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("hide", ["audio", "video"])
def test_a_hidden_modality_has_no_influence(system, batch, name, hide):
    model = system(name)
    plans, _ = hide_patches(Hiding(hide=hide), model.config, batch.sample_ids)
    with torch.inference_mode():
        first = model.reconstruct(batch, plans)
        other = batch._replace(fbank=torch.randn_like(batch.fbank))
        if hide == "video":
            other = batch._replace(frames=255 - batch.frames)
        second = model.reconstruct(other, plans)
        third = model.reconstruct(other_clips(batch, hide, None), plans)
    assert first.audio.shape == (3, 8, 256) and first.video.shape == (3, 4, 768)
    assert first.audio.isfinite().all() and first.video.isfinite().all()
    assert torch.equal(first.audio, second.audio) and torch.equal(first.video, second.video)
    told = {"audio": (first.audio, third.audio), "video": (first.video, third.video)}[hide]
    assert torch.equal(told[0][0], told[1][0])
    assert not torch.allclose(told[0][1], told[1][1])


def test_a_hidden_span_has_no_influence(model, batch):
    hiding = Hiding(seconds=[(0.16, 0.32)], boxes=[(0, 0, 0.5, 0.5)])
    plans, _ = hide_patches(hiding, model.config, batch.sample_ids)
    fbank, frames = batch.fbank.clone(), batch.frames.clone()
    fbank[:, 16:32] = 5.0
    frames[:, :, :16, :16] = 17
    with torch.inference_mode():
        first = model.reconstruct(batch, plans)
        second = model.reconstruct(batch._replace(fbank=fbank, frames=frames), plans)
    assert torch.equal(first.audio, second.audio) and torch.equal(first.video, second.video)


def test_one_view_of_a_model_of_two_is_the_first_of_its_views(model, batch):
    """The same visible patches give the same predictions, however many views there are."""
    one, _ = hide_patches(Hiding(mask_ratio=0.5), model.config, batch.sample_ids)
    two, _ = hide_patches(Hiding(mask_ratio=0.5, views=2), model.config, batch.sample_ids)
    with torch.inference_mode():
        alone, both = (model.reconstruct(batch, plans) for plans in (one, two))
    assert both.audio.shape[0] == 6
    torch.testing.assert_close(both.audio[:3], alone.audio)
    torch.testing.assert_close(both.video[:3], alone.video)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_errors_equal_loops_over_patches(make_model, batch, data, norm_pix):
    model = make_model(norm_pix_loss=norm_pix)
    plans, _ = hide_patches(Hiding(mask_ratio=0.5, views=2), model.config, batch.sample_ids)
    frames, fbanks = reconstruct_batch(model, batch, plans, data=data)
    with torch.inference_mode():
        result = model.reconstruct(batch, plans)
    mean = torch.tensor(model.config.pixel_mean).reshape(3, 1, 1)
    std = torch.tensor(model.config.pixel_std).reshape(3, 1, 1)
    pixels, colours = (batch.frames / 255 - mean) / std, std.flatten().repeat(256)
    for modality, views, picture, step in (
        ("video", frames, pixels, colours),
        ("audio", fbanks, batch.fbank.mT[:, None], data.dataset_std),
    ):
        normal = patchify(picture, 16).double()
        for view in (0, 1):
            for clip in (0, 2):
                hidden = plans[modality].mask(view)[clip].bool()
                row = getattr(result, modality)[view * 3 + clip].double()
                expected = _by_hand(normal[clip], row, hidden, norm_pix, step)
                found = {
                    name: (errors.loss[view, clip].item(), errors.shown[view, clip].item())
                    for name, errors in views.errors.items()
                }
                assert found.keys() == expected.keys()
                for name in expected:
                    assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-7)


def _by_hand(normal, predicted, hidden, norm_pix, step):
    """{name: (error in units of the loss, error of the picture)} of one row, patch by patch.

    step: what 1 of each normalised value is in the picture.
    """

    def target(patch):
        if not norm_pix:
            return patch
        return (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()

    visible = [target(patch) for patch, gone in zip(normal, hidden, strict=True) if not gone]
    sums: dict[str, list] = {"model": [], "patch_mean": [], "visible_mean": []}
    for place in hidden.nonzero().flatten().tolist():
        patch = normal[place]
        guesses = {
            "model": predicted[place],
            "patch_mean": target(patch).mean().expand_as(patch),
            "visible_mean": torch.stack(visible).mean(0),
        }
        for name, guess in guesses.items():
            wrong = guess - target(patch)
            scale = (patch.var() + 1e-6).sqrt() if norm_pix else 1
            sums[name].append((wrong.square().mean(), (wrong * scale * step).square().mean()))
    return {
        name: tuple(float(sum(column) / len(column)) for column in zip(*parts, strict=True))
        for name, parts in sums.items()
    }


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_mean_of_the_other_clips_leaves_out_one_after_the_other(make_model, clips, norm_pix):
    """In whatever batches they come; the hidden patches differ from clip to clip."""
    model, data = make_model(norm_pix_loss=norm_pix), DataConfig(dataset_std=3.0)
    batch = FrontEnd(data, model.config)(collate([clips().read(index, 0) for index in range(5)]))
    plans, _ = hide_patches(Hiding(mask_ratio=0.5), model.config, batch.sample_ids)
    together = MeanClip()
    for views in reconstruct_batch(model, batch, plans, data=data)[1:]:
        together.add(views)
    apart = MeanClip()
    for part in (slice(0, 2), slice(2, 5)):
        some = Batch(*(values[part] for values in batch))
        those, _ = hide_patches(Hiding(mask_ratio=0.5), model.config, some.sample_ids)
        apart.add(reconstruct_batch(model, some, those, data=data)[1])
    loss, shown = [], []
    patches = patchify(batch.fbank.mT[:, None], 16).double()
    spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt() if norm_pix else torch.ones(5, 8, 1)
    target = (patches - patches.mean(-1, keepdim=True)) / spread if norm_pix else patches
    for clip in range(5):
        others = [other for other in range(5) if other != clip]
        for place in plans["audio"].mask(0)[clip].nonzero().flatten().tolist():
            wrong = target[others, place].mean(0) - target[clip, place]
            loss.append(wrong.square().mean())
            shown.append((3.0 * spread[clip, place] * wrong).square().mean())
    expected = {"loss": float(sum(loss) / 20), "shown": float(sum(shown) / 20)}
    assert together.errors() == pytest.approx(expected, rel=1e-5)
    assert apart.errors() == pytest.approx(expected, rel=1e-5)


def test_a_clip_alone_and_what_is_not_hidden_have_no_mean_of_others(model, batch, data):
    plans, _ = hide_patches(Hiding(hide="audio"), model.config, batch.sample_ids)
    frames, fbanks = reconstruct_batch(model, batch, plans, data=data)
    whole = MeanClip()
    whole.add(frames)
    assert whole.errors() is None
    one = Batch(*(values[:1] for values in batch))
    plans, _ = hide_patches(Hiding(hide="audio"), model.config, one.sample_ids)
    alone = MeanClip()
    alone.add(reconstruct_batch(model, one, plans, data=data)[1])
    assert alone.errors() is None
    alone.add(fbanks)
    assert alone.errors() is not None


def test_the_error_is_the_loss_of_training(model, batch, data):
    """Under the masks of training, one view after the other."""
    with torch.inference_mode():
        losses = model(batch)
    frames, fbanks = reconstruct_batch(model, batch, data=data)
    for views, name in ((frames, "mae_video"), (fbanks, "mae_audio")):
        torch.testing.assert_close(views.error.mean(1).sum(), losses[name])


def test_a_clip_s_files_and_figures(model_folder, tmp_path):
    source = EvaluationSource(checkpoint=str(model_folder), num_clips=5, batch_size=2)
    metrics = inpaint(source, tmp_path, num_pictures=2)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["command"] == "inpaint"
    assert (metrics["num_clips"], len(metrics["clips"])) == (5, 5)
    assert metrics["hidden"]["audio"]["text"] == "4 of 8 patches (unstructured)"
    kinds = ["original", "original_inverted", "masked", "reconstructed"]
    names = [f"{i:03d}_synthetic_heldout_{i:06d}" for i in range(2)]
    assert [p["file"] for p in metrics["pictures"]] == [f"{name}.png" for name in names]
    files = [f"{name}_{kind}.wav" for name in names for kind in kinds]
    assert [s["file"] for s in metrics["sounds"]] == files
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == sorted(files)
    assert "true loudness given" in metrics["sounds"][3]["title"]
    for file in files:
        with wave.open(str(tmp_path / file)) as sound:
            assert sound.getparams()[:3] == (1, 2, 16_000)
            assert sound.getnframes() == 400 + 160 * 61  # 0.64 s: 62 rows of 25 ms fit
    errors = metrics["errors"]
    guessers = {"model", "patch_mean", "visible_mean", "mean_clip"}
    assert set(errors["audio"]) == set(errors["video"]) == guessers
    per_clip = [clip["error_per_view"]["audio"][0] for clip in metrics["clips"]]
    assert errors["audio"]["model"]["loss"] == pytest.approx(sum(per_clip) / 5)
    assert metrics["headline"]["audio error"] == errors["audio"]["model"]["loss"]
    guesses = [errors["audio"][kind]["loss"] for kind in guessers - {"model"}]
    assert list(metrics["headline"].values())[1] == min(guesses)
    assert metrics["mean_error"]["video"] == errors["video"]["model"]["loss"]
    table = inpainting_table(metrics)
    assert "of 5 clips" in table and "given each masked patch's true mean" in table
    assert [line.split("  ")[0] for line in table.splitlines()[2:6]] == [
        "model", "mean of the other clips", "mean visible patch", "true mean of each patch",
    ]  # fmt: skip


def test_a_hidden_modality_is_told_from_the_other_and_from_another_clip_s(model_folder, tmp_path):
    def run(batch_size):
        source = EvaluationSource(
            checkpoint=str(model_folder), num_clips=5, batch_size=batch_size, device="cpu"
        )
        return inpaint(source, tmp_path, hiding=Hiding(hide="audio"), num_pictures=1, sounds=False)

    metrics = run(2)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["mean_error"]["video"] is None
    assert metrics["clips"][0]["error_per_view"]["video"] == [None]
    assert set(metrics["errors"]["audio"]) == {
        "model", "patch_mean", "other_clip", "mean_clip",
    }  # fmt: skip
    losses = {kind: error["loss"] for kind, error in metrics["errors"]["audio"].items()}
    hardest = min(("mean_clip", "patch_mean"), key=losses.get)
    assert metrics["headline"] == {
        "audio error": losses["model"],
        "audio error, told from another clip": losses["other_clip"],
        f"audio error, {LABELS[hardest]}": losses[hardest],
    }
    assert "told from another clip" in inpainting_table(metrics)
    assert metrics["sounds"] == [] and not list(tmp_path.glob("*.wav"))
    assert metrics["errors"]["audio"]["other_clip"]["loss"] == pytest.approx(
        run(5)["errors"]["audio"]["other_clip"]["loss"], rel=1e-5
    )


def test_one_clip_has_no_other_to_be_told_from(model_folder, tmp_path):
    source = EvaluationSource(checkpoint=str(model_folder), num_clips=1, device="cpu")
    metrics = inpaint(source, tmp_path, hiding=Hiding(hide="audio"), num_pictures=0)
    assert metrics["errors"]["audio"]["other_clip"] == {"loss": None, "shown": None}
    assert list(metrics["headline"]) == [
        "audio error", "audio error, true mean of each patch",
    ]  # fmt: skip
    table = inpainting_table(metrics)
    assert "true mean of each patch" in table and "other" not in table and "another" not in table


def test_several_views_and_a_model_without_norm_pix(make_model, tmp_path):
    make_model(norm_pix_loss=False).save_pretrained(tmp_path / "model")
    source = EvaluationSource(checkpoint=str(tmp_path / "model"), num_clips=1)
    metrics = inpaint(source, tmp_path / "out", hiding=Hiding(views=2, audio_mask="freq"))
    assert metrics["given"] is None
    files = [sound["file"].partition("000000_")[2] for sound in metrics["sounds"]]
    assert files[2:] == [
        f"view{view}_{kind}.wav" for view in (1, 2) for kind in ("masked", "reconstructed")
    ]
    assert not any("given" in sound["title"] for sound in metrics["sounds"])
    assert len(metrics["clips"][0]["error_per_view"]["audio"]) == 2


def test_bad_clips_are_left_out_and_named(model, clips, data, tmp_path):
    opened = Opened(model, clips(bad=(0, 3)), data, 0, {})
    run = Inpainting(opened, tmp_path, Hiding(hide="video"), num_pictures=0, sounds=True)
    source = EvaluationSource(checkpoint="", num_clips=40, batch_size=7)
    bad = run.run(source)
    assert [clip.video_id[-1] for clip in bad.rows()] == ["0", "3"]
    metrics = run.metrics()
    assert metrics["num_clips"] == 38 and not list(tmp_path.iterdir())
    assert metrics["errors"]["video"]["model"]["loss"] == pytest.approx(
        sum(clip["error_per_view"]["video"][0] for clip in metrics["clips"]) / 38
    )


def test_plans_that_differ_in_their_views_are_refused(model, batch):
    one, _ = hide_patches(Hiding(), model.config, batch.sample_ids)
    two, _ = hide_patches(Hiding(views=2), model.config, batch.sample_ids)
    with pytest.raises(
        ValueError, match=r"plans\['video'\] has .* = \(2, 3, 4\), this model needs"
    ):
        model.reconstruct(batch, {"audio": one["audio"], "video": two["video"]})
    with pytest.raises(ValueError, match="plans must have the keys audio and video"):
        model.reconstruct(batch, {"audio": one["audio"]})


def test_the_quick_form_shows_the_views_of_training(model_folder, tmp_path):
    source = EvaluationSource(checkpoint=str(model_folder), num_clips=2)
    metrics = reconstruct(source, tmp_path)
    assert metrics["command"] == "reconstruct"
    assert [len(clip["error_per_view"]["video"]) for clip in metrics["clips"]] == [2, 2]
    assert len(metrics["pictures"]) == 2 and metrics["sounds"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hide-seconds", "0.5-0.9"], "0.5 to 0.9 is not within the clip, which has 0 to 0.64 s"),
        (["--hide-seconds", "soon"], "'soon' is not 2 numbers joined by '-'"),
        (["--hide-box", "0,0,1"], "'0,0,1' is not 4 numbers joined by ','"),
        (["--mask-ratio", "1"], "no patch of sound or picture is left"),
        (["--hide", "audio", "--audio-mask", "time"], "hide=audio and audio_mask=time both say"),
        (["--views", "0"], "'0' is not a whole number above 0"),
    ],
)  # fmt: skip
def test_the_command_s_mistakes_are_one_line(model_folder, tmp_path, capsys, arguments, message):
    from kdcmae_fast.cli import main

    where = ["--checkpoint", str(model_folder), "--output", str(tmp_path / "out")]
    assert main(["inpaint", *where, *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_the_command_and_a_classifier(make_model, model_folder, tmp_path, capsys):
    from kdcmae_fast.cli import main

    arguments = ["--hide-seconds", "0.1-0.2", "--hide-hz", "500-1000", "--hide-box", "0,0,.5,.5"]
    where = ["--checkpoint", str(model_folder), "--num-clips", "2", "--output", str(tmp_path)]
    assert main(["inpaint", *where, *arguments, "--pictures", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "hidden of the audio: 2 of 8 patches (0.00 to 0.32 s; 0 to" in out
    assert "hidden of the video: 1 of 4 patches (box 0.00,0.00,0.50,0.50)" in out
    assert "wrote 1 pictures, 4 sounds and metrics.json" in out
    make_model("cav_mae_classifier", num_classes=3).save_pretrained(tmp_path / "classifier")
    where[1] = str(tmp_path / "classifier")
    assert main(["inpaint", *where]) == 1
    assert "holds a cav_mae_classifier; give a pretrained model" in capsys.readouterr().err
