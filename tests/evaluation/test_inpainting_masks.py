"""What inpainting hides: whole patches under named spans, random ones otherwise, or a modality."""

import pytest
import torch

from kdcmae_fast.config import ModelConfig
from kdcmae_fast.data.fbank import kaldi_fbank, mel_edges
from kdcmae_fast.evaluation import Hiding, hide_patches

CONFIG = ModelConfig(audio_length=256, num_mel_bins=128, img_size=96, mask_ratio=0.75)  # 8x16, 6x6
IDS = torch.arange(3)


def masks(hiding, config=CONFIG):
    """{modality: (B, rows, columns) bool, hidden} of the first view, and what is said of them."""
    plans, hidden = hide_patches(hiding, config, IDS)
    shapes = {"audio": (8, config.audio_length // 16), "video": (6, 6)}
    found = {name: plans[name].mask(0).bool().unflatten(1, shape) for name, shape in shapes.items()}
    for name, mask in found.items():
        assert mask.flatten(1).sum(1).tolist() == [hidden[name].patches] * 3
        assert hidden[name].of == mask[0].numel() == plans[name].num_tokens
    return found, hidden


@pytest.mark.parametrize("span", [(0.0, 2.56), (0.5, 0.51), (0.16, 0.32), (0.159, 0.321), (1, 2.5)])
def test_seconds_hide_the_patches_they_touch(span):
    found, hidden = masks(Hiding(seconds=[span]))
    touched = torch.tensor([c * 0.16 < span[1] - 1e-9 and (c + 1) * 0.16 > span[0] + 1e-9
                            for c in range(16)])  # fmt: skip
    assert torch.equal(found["audio"], touched.expand(3, 8, 16))
    assert not found["video"].any()
    assert str(hidden["video"]) == "nothing"
    ((low, high),) = hidden["audio"].spans["seconds"]
    assert low <= span[0] + 1e-9 and high >= span[1] - 1e-9
    assert high - low == pytest.approx(0.16 * int(touched.sum()))


def test_spans_of_both_axes_meet_and_spans_of_one_add_up():
    both = masks(Hiding(seconds=[(0, 0.2), (2.0, 2.1)], hz=[(0, 100)]))[0]["audio"][0]
    time = masks(Hiding(seconds=[(0, 0.2), (2.0, 2.1)]))[0]["audio"][0]
    band = masks(Hiding(hz=[(0, 100)]))[0]["audio"][0]
    assert torch.equal(both, time & band)
    assert time.any(0).nonzero().flatten().tolist() == [0, 1, 12, 13]
    assert band.any(1).tolist() == [True] + [False] * 7


def test_mel_edges_lie_between_the_filters():
    """A tone in the middle between a bin's edges is loudest in that bin."""
    edges = mel_edges(128)
    assert (edges[0], edges[-1], len(edges)) == (0, 8000, 129)
    assert edges == sorted(edges)
    time = torch.arange(4000) / 16000
    bins = range(30, 127, 8)
    tones = [torch.sin(2 * torch.pi * (edges[b] + edges[b + 1]) / 2 * time) for b in bins]
    loudest = kaldi_fbank(torch.stack(tones)).mean(1).argmax(1)
    assert loudest.tolist() == list(bins)


def test_boxes_hide_the_patches_they_touch():
    found, hidden = masks(Hiding(boxes=[(0.0, 0.5, 0.17, 1.0), (0.9, 0, 1, 0.1)]))
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[3:, :2] = True
    expected[0, 5] = True
    assert torch.equal(found["video"], expected.expand(3, 6, 6))
    assert hidden["video"].spans["boxes"][0] == pytest.approx((0, 0.5, 1 / 3, 1))
    assert (
        str(hidden["video"]) == "7 of 36 patches (box 0.00,0.50,0.33,1.00; box 0.83,0.00,1.00,0.17)"
    )


@pytest.mark.parametrize("hide", ["audio", "video"])
def test_a_modality_hidden_whole_leaves_the_other_whole(hide):
    found, hidden = masks(Hiding(hide=hide))
    other = {"audio": "video", "video": "audio"}[hide]
    assert found[hide].all() and not found[other].any()
    found, _ = masks(Hiding(hide=hide, mask_ratio=0.5))
    assert found[hide].all()
    assert found[other].float().mean() == 0.5


@pytest.mark.parametrize("mode", ["time", "freq", "tf", "block", "unstructured"])
def test_random_masks_have_their_shape_and_ratio(mode):
    found, _ = masks(Hiding(audio_mask=mode, mask_ratio=0.5))
    audio = found["audio"]
    assert audio.float().mean() == 0.5
    lines = {"time": audio.sum(1), "freq": audio.sum(2)}
    for name, counts in lines.items():
        whole = set(counts.unique().tolist()) <= {0, audio.shape[1 if name == "time" else 2]}
        assert whole == (mode == name)


def test_the_ratio_is_that_of_training_unless_given():
    config = ModelConfig(
        audio_length=256, img_size=96, mask_ratio=0.75, video_mask_ratio=0.5, audio_mask_mode="time"
    )
    _, hidden = masks(Hiding(), config)
    assert (hidden["audio"].how, hidden["audio"].patches) == ("time", 96)
    assert (hidden["video"].how, hidden["video"].patches) == ("unstructured", 18)
    _, hidden = masks(Hiding(mask_ratio=0.25, video_mask="block"), config)
    assert (hidden["audio"].patches, hidden["video"].patches) == (32, 9)
    assert str(hidden["video"]) == "9 of 36 patches (block)"


def test_views_are_complementary_and_masks_depend_on_the_clip_alone():
    plans, _ = hide_patches(Hiding(views=3), CONFIG, IDS)
    for plan in plans.values():
        kept = torch.stack([1 - plan.mask(view) for view in range(3)])
        assert kept.sum(0).max() == 1
    alone, _ = hide_patches(Hiding(views=3), CONFIG, IDS[1:2])
    assert torch.equal(alone["audio"].token_of_rank, plans["audio"].token_of_rank[1:2])
    other, _ = hide_patches(Hiding(views=3, seed=1), CONFIG, IDS)
    assert not torch.equal(other["audio"].token_of_rank, plans["audio"].token_of_rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": [(1.0, 3.0)]}, "seconds: the span 1 to 3 is not within .* 0 to 2.56 s"),
        ({"seconds": [(2.0, 1.0)]}, "seconds: the span 2 to 1 is not"),
        ({"seconds": [(-1.0, 1.0)]}, "seconds: the span -1 to 1 is not"),
        ({"hz": [(1000, 9000)]}, "hz: the span 1000 to 9000 .* 0 to 8000 Hz"),
        ({"boxes": [(0, 0, 32, 32)]}, "boxes: the span 0 to 32 .* 0 to 1 of the picture's side"),
        ({"boxes": [(0, 0, 1)]}, "must be x0, y0, x1, y1"),
        ({"mask_ratio": 1.5}, "mask_ratio=1.5 must be in 0..1"),
        ({"mask_ratio": float("nan")}, "mask_ratio=nan must be in 0..1"),
        ({"mask_ratio": 1.0}, "no patch of sound or picture is left"),
        ({"mask_ratio": 0.99}, "mask_ratio=0.99 keeps none of 36 tokens; lower it"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 hides nothing; raise it"),
        ({"hide": "audio", "boxes": [(0, 0, 1, 1)]}, "no patch of sound or picture is left"),
        ({"hide": "sound"}, "hide='sound' must be audio or video"),
        ({"hide": "audio", "seconds": [(0, 1)]}, "hide=audio and seconds or hz both say what of"),
        ({"hide": "video", "video_mask": "block"}, "hide=video and video_mask=block both say"),
        ({"hz": [(0, 1)], "audio_mask": "time"}, "seconds or hz and audio_mask=time both say"),
        ({"hide": "audio", "views": 2}, "views=2: several views are drawn at random"),
        ({"views": 0}, "views=0 must be at least 1"),
        ({"views": 2, "mask_ratio": 0.25}, "num_views=2 disjoint views .* do not fit"),
        ({"audio_mask": "tube"}, "mode 'tube' needs 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_hidden_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        hide_patches(Hiding(**options), CONFIG, IDS)
