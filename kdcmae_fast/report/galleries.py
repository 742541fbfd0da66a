"""Pictures, sounds, videos and retrieval examples of an evaluation, to look at and to play."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdcmae_fast.report.figures import write_number, write_value
from kdcmae_fast.report.markup import Child, Markup, details, element, join
from kdcmae_fast.report.media import Kind, Media
from kdcmae_fast.report.reading import Unreadable, number
from kdcmae_fast.report.run import Evaluation, Run

OPEN = 4  # pictures of a gallery that are shown at once; the others are to unfold
DIRECTIONS = {
    "audio_to_video": ("Sound → picture", "The query is this sound", "Pictures found for it"),
    "video_to_audio": ("Picture → sound", "The query is this picture", "Sounds found for it"),
}


class Galleries:
    """Makes the galleries of one evaluation.

    problem: told of each file that cannot be shown, in words.
    """

    def __init__(
        self, run: Run, evaluation: Evaluation, media: Media, problem: Callable[[str], None]
    ) -> None:
        self._run = run
        self._evaluation = evaluation
        self._media = media
        self._problem = problem

    def all(self) -> Markup:
        """Every gallery that the metrics name; sounds of a clip that has a picture go below it."""
        metrics = self._evaluation.metrics
        clips = _clips(metrics.get("clips"))
        sounds = _entries(metrics.get("sounds"))
        titles = {file: title for file, title in sounds if isinstance(file, str)}
        below = {
            picture: [(sound, titles.get(sound, sound).removeprefix(f"{name}: ")) for sound in own]
            for picture, (name, own) in clips.items()
        }
        placed = {sound for own in below.values() for sound, _ in own}
        pictures = _entries(metrics.get("pictures"))
        named = {file for file, _ in pictures if isinstance(file, str)}
        pictures += [(file, name) for file, (name, _) in clips.items() if file not in named]
        sounds = [(file, name) for file, name in sounds if not _among(file, placed)]

        def show_picture(name: object, title: str) -> Markup | None:
            return self._picture(name, title, below.get(name, []) if isinstance(name, str) else [])

        return join(
            [
                self._examples(metrics.get("examples")),
                self._gallery(pictures, show_picture, "pictures"),
                self._gallery(_entries(metrics.get("videos")), self._video, "videos"),
                self._gallery(sounds, self._sound, "sounds"),
            ]
        )

    def _gallery(
        self,
        entries: Sequence[tuple[object, str]],
        show: Callable[[object, str], Markup | None],
        kind: str,
    ) -> Markup | None:
        shown = [figure for entry in entries if (figure := show(*entry)) is not None]
        if not shown:
            return None
        first = element("div", shown[:OPEN], class_=f"gallery {kind}")
        if len(shown) <= OPEN:
            return first
        rest = element("div", shown[OPEN:], class_=f"gallery {kind}")
        return join([first, details(f"{len(shown) - OPEN} more {kind}", rest)])

    def _picture(
        self, name: object, title: str, sounds: Sequence[tuple[str, str]]
    ) -> Markup | None:
        address = self._address(name, "picture")
        if address is None:
            return None
        image = element("img", src=address, alt=title, class_="zoom")
        players = [self._sound(*sound) for sound in sounds]
        heard = element("div", players, class_="heard") if players else None
        return element("figure", image, element("figcaption", title), heard)

    def _video(self, name: object, title: str) -> Markup | None:
        address = self._address(name, "video")
        if address is None:
            return None
        video = element("video", src=address, controls=True, preload="metadata", aria_label=title)
        return element("figure", video, element("figcaption", title))

    def _sound(self, name: object, title: str) -> Markup | None:
        address = self._address(name, "sound")
        if address is None:
            return None
        return element("figure", element("figcaption", title), _player(address, title))

    def _address(self, name: object, kind: Kind) -> str | None:
        """The URL of a file; None after telling the problem."""
        try:
            return self._media.address(self._run.folder, self._evaluation.folder, name, kind)
        except Unreadable as error:
            place = self._evaluation.place
            shown = str(name)[:200] if isinstance(name, str) else f"a {kind}"
            self._problem(f"{place}/{shown} {error}".removeprefix("/"))
            return None

    def _examples(self, examples: object) -> Markup | None:
        """Queries with what was found for them, best first."""
        if not isinstance(examples, list):
            return None
        parts = []
        for direction, (title, asked, found) in DIRECTIONS.items():
            rows = [
                self._example(example, asked, found)
                for example in examples
                if isinstance(example, Mapping) and example.get("direction") == direction
            ]
            if rows:
                parts += [element("h4", title), element("div", rows, class_="examples")]
        return join(parts) if parts else None

    def _example(self, example: Mapping[str, Any], asked: str, found: str) -> Markup:
        rank = number(example.get("rank_of_pair"))
        verdict = "Its pair's rank is not told"
        if rank is not None:
            verdict = f"Its pair is found at rank {write_number(rank)}"
        query = example.get("query")
        items = example.get("found")
        cards = [
            self._found(item) for item in (items if isinstance(items, list) else []) if _item(item)
        ]
        return element(
            "article",
            element(
                "div",
                element("h5", asked),
                self._card(query) if _item(query) else None,
                element("p", verdict, class_="right" if rank == 1 else "note"),
                class_="query",
            ),
            element("div", element("h5", found), element("div", cards, class_="found")),
            class_="example",
        )

    def _found(self, item: Mapping[str, Any]) -> Markup:
        similarity = number(item.get("similarity"))
        is_pair = item.get("is_pair") is True
        said = [
            element("b", f"{write_value(item.get('rank'))}."),
            f" similarity {write_number(similarity)}" if similarity is not None else "",
        ]
        pair = element("p", "✓ its pair", class_="right") if is_pair else None
        shown = join([element("p", said), pair])
        return self._card(item, shown, "card pair" if is_pair else "card")

    def _card(self, item: Any, said: Child = None, class_: str = "card") -> Markup:
        name = str(item.get("video_id", "?"))
        frame = sound = None
        if item.get("frame") is not None:
            frame = self._address(item["frame"], "picture")
        if item.get("sound") is not None:
            sound = self._address(item["sound"], "sound")
        return element(
            "div",
            element("img", src=frame, alt=f"Frame of {name}") if frame else None,
            _player(sound, f"Sound of {name}") if sound else None,
            said,
            element("p", name, class_="id"),
            class_=class_,
        )


def _player(address: str, title: str) -> Markup:
    return element("audio", src=address, controls=True, preload="metadata", aria_label=title)


def _item(found: object) -> bool:
    return isinstance(found, Mapping)


def _entries(found: object) -> list[tuple[object, str]]:
    """(file, title) of a list of {"file", "title"}, or of bare file names."""
    entries: list[tuple[object, str]] = []
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, Mapping):
            file = entry.get("file")
            entries.append((file, str(entry.get("title") or file)))
        else:
            entries.append((entry, str(entry)))
    return entries


def _clips(found: object) -> dict[str, tuple[str, list[str]]]:
    """picture -> (clip, its sounds), of a list of clips that names them."""
    clips = {}
    for clip in found if isinstance(found, list) else []:
        if isinstance(clip, Mapping) and isinstance(clip.get("picture"), str):
            sounds = clip.get("sounds")
            own = [s for s in sounds if isinstance(s, str)] if isinstance(sounds, list) else []
            clips[clip["picture"]] = (str(clip.get("clip", clip["picture"])), own)
    return clips


def _among(file: object, files: set[str]) -> bool:
    return isinstance(file, str) and file in files
