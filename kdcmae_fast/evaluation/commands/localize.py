"""The command line of `kdcmae localize`."""

import argparse

from kdcmae_fast.evaluation.commands.options import (
    add_source,
    is_first_process,
    positive,
    say_bad,
    source_of,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_source(parser, default_clips="200 of the synthetic clips, or all that are annotated")
    parser.add_argument(
        "--map",
        choices=("attribution", "cosine"),
        default="attribution",
        help="evidence in each pixel that frame and sound belong together (the other is scored, "
        "too), or only the sound's cosine with each token, which is quick",
    )
    parser.add_argument(
        "--references",
        type=positive,
        default=64,
        metavar="N",
        help="other clips' frames, and blurred copies of the frame, that an attribution starts "
        "from; more are slower and smoother",
    )
    _add_annotations(parser)
    fusion = parser.add_argument_group("fusion with maps that hear nothing")
    fusion.add_argument(
        "--fuse",
        choices=("ezvsl", "avl-flickr", "avl-vggss", "alpha"),
        help="also score the sum of min-max scaled maps: 0.4 + 0.6 of one prior; a third each with "
        "two priors; 1 + 0.4; 1-A + A",
    )
    fusion.add_argument(
        "--alpha", type=float, default=0.4, metavar="A", help="of --fuse alpha, 0 to 1"
    )
    fusion.add_argument(
        "--prior",
        action="append",
        default=[],
        metavar="MAPS",
        help="colour, tokens, or an .npz file with an array (h, w) per clip; once per prior",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="write DIR/metrics.json, pictures, videos and viz/iou_test_*.txt",
    )
    parser.add_argument(
        "--pictures", type=int, default=8, metavar="N", help="clips to draw with --output"
    )
    parser.add_argument(
        "--video",
        type=int,
        default=0,
        metavar="N",
        help="clips to film with --output: all frames, the map of each, the sound (mp4)",
    )
    parser.add_argument(
        "--save-maps", action="store_true", help="write DIR/maps.npz, a map (h, w) per clip"
    )


def run(options: argparse.Namespace) -> None:
    """Localise, print the table with its controls, write."""
    from kdcmae_fast.evaluation.localization import localize
    from kdcmae_fast.evaluation.localization_output import localization_table
    from kdcmae_fast.evaluation.localization_settings import LocalizationSettings

    if options.output is None and (options.video or options.save_maps):
        raise ValueError("--video and --save-maps need --output DIR")
    settings = LocalizationSettings(
        map=options.map,
        references=options.references,
        annotations=options.annotations,
        ids=options.ids,
        frames=options.frames,
        sounds=options.sounds,
        allow_missing=options.allow_missing,
        truth=options.truth,
        fusion=options.fuse,
        alpha=options.alpha,
        priors=tuple(options.prior),
        pictures=options.pictures,
        videos=options.video,
        save_maps=options.save_maps,
    )
    metrics = localize(source_of(options), settings, output=options.output)
    if not is_first_process():
        return
    print(localization_table(metrics))
    say_bad(metrics)
    if options.output:
        print(
            f"wrote {len(metrics['pictures'])} pictures, {len(metrics['videos'])} videos and "
            f"metrics.json to {options.output}"
        )


def _add_annotations(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("boxes (default: those of the synthetic clips)")
    group.add_argument(
        "--annotations", metavar="PATH", help="vggss.json, or a folder of Flickr-SoundNet XML files"
    )
    group.add_argument(
        "--ids", metavar="CSV", help="only the clips in its first column, as flickr_test.csv"
    )
    group.add_argument(
        "--frames",
        metavar="DIR",
        help="pictures <id>.jpg of the annotated clips (default: the clips of data.*, whose frames "
        "must show the whole picture)",
    )
    group.add_argument("--sounds", metavar="DIR", help="with --frames: sounds <id>.wav or .flac")
    group.add_argument(
        "--truth",
        choices=("union", "first", "consensus"),
        help="what boxes mean together (default: union for JSON, consensus for XML)",
    )
    group.add_argument(
        "--allow-missing", action="store_true", help="leave annotated clips out that are not there"
    )
