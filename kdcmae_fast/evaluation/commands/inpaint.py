"""The command line of `kdcmae inpaint`."""

import argparse
from typing import TYPE_CHECKING

from kdcmae_fast.evaluation.commands.options import add_source, positive, say_bad, source_of

if TYPE_CHECKING:
    from kdcmae_fast.evaluation.hiding import Hiding

DESCRIPTION = """\
Hide parts of clips and let the model fill them in.

Without a choice one view at random at the ratio of training. Of each modality one thing is hidden:
all of it (--hide), the spans named, or patches at random; what --hide or spans do not name is whole
unless --mask-ratio is given. A patch is hidden if any part of it is in a span.
"""
EPILOG = """\
examples:
  kdcmae inpaint --checkpoint runs/mine --output out
  kdcmae inpaint --checkpoint runs/mine --output out --audio-mask time --mask-ratio 0.5
  kdcmae inpaint --checkpoint runs/mine --output out --hide audio
  kdcmae inpaint --checkpoint runs/mine --output out --hide-seconds 1.0-2.5 --hide-hz 1000-4000
  kdcmae inpaint --checkpoint runs/mine --output out --hide-box 0.25,0.25,0.75,0.75
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_source(parser, default_clips="all")
    hiding = parser.add_argument_group("what is hidden")
    hiding.add_argument(
        "--mask-ratio",
        type=float,
        metavar="R",
        help="share of the patches hidden at random, 0 to 1 (default: as in training)",
    )
    hiding.add_argument(
        "--audio-mask",
        choices=("unstructured", "time", "freq", "tf", "block"),
        help="patches of the sound: any, whole columns, whole rows, both, or rectangles "
        "(default: as in training)",
    )
    hiding.add_argument(
        "--video-mask",
        choices=("unstructured", "block"),
        help="patches of the frame: any, or rectangles (default: unstructured)",
    )
    hiding.add_argument(
        "--hide", choices=("audio", "video"), help="all of it: told from the other one alone"
    )
    for option, metavar, text in (
        ("seconds", "A-B", "of the sound, from its start, as in 1.0-2.5"),
        ("hz", "A-B", "of the sound, as in 1000-4000; with --hide-seconds: where they meet"),
        (
            "box",
            "X0,Y0,X1,Y1",
            "of the frame, shares of its sides from the left top",
        ),
    ):
        hiding.add_argument(
            f"--hide-{option}",
            action="append",
            default=[],
            type=_box if option == "box" else _span,
            metavar=metavar,
            help=f"{text} (may be repeated)",
        )
    hiding.add_argument(
        "--views", type=positive, default=1, metavar="K", help="complementary random masks per clip"
    )
    hiding.add_argument("--mask-seed", type=int, default=0, metavar="N", help="of random masks")
    parser.add_argument(
        "--pictures",
        type=_amount,
        default=8,
        metavar="N",
        help="the first N clips get a picture and sounds",
    )
    parser.add_argument("--no-sounds", action="store_true", help="write no WAVE files")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="write DIR/metrics.json, DIR/<clip>.png and DIR/<clip>_*.wav",
    )


def run(options: argparse.Namespace) -> None:
    """Inpaint, print the errors, write."""
    from kdcmae_fast.evaluation.inpainting import inpaint, inpainting_table

    metrics = inpaint(
        source_of(options),
        options.output,
        hiding=_hiding(options),
        num_pictures=options.pictures,
        sounds=not options.no_sounds,
    )
    say_bad(metrics)
    print(inpainting_table(metrics))
    for modality in ("audio", "video"):
        print(f"hidden of the {modality}: {metrics['hidden'][modality]['text']}")
    print(
        f"wrote {len(metrics['pictures'])} pictures, {len(metrics['sounds'])} sounds and "
        f"metrics.json to {options.output}"
    )


def _hiding(options: argparse.Namespace) -> "Hiding":
    from kdcmae_fast.evaluation.hiding import Hiding

    return Hiding(
        hide=options.hide,
        mask_ratio=options.mask_ratio,
        audio_mask=options.audio_mask,
        video_mask=options.video_mask,
        seconds=tuple(options.hide_seconds),
        hz=tuple(options.hide_hz),
        boxes=tuple(options.hide_box),
        views=options.views,
        seed=options.mask_seed,
    )


def _amount(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _span(text: str) -> tuple[float, ...]:
    return _numbers(text, "-", 2)


def _box(text: str) -> tuple[float, ...]:
    return _numbers(text, ",", 4)


def _numbers(text: str, separator: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(separator))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers joined by {separator!r}")
    return numbers
