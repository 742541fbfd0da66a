"""Synthetic clips in which something else sounds every half second or so, with the truth known."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.data.clip import SAMPLE_RATE, SCENE_STREAM, keyed_rng
from kdcmae_fast.data.synthetic import Scene, SyntheticClips, scene_of

EVENT_SECONDS = (0.3, 0.8)  # shortest and longest event
FADE_SECONDS = 0.005  # at both ends of an event's sound
PLACES = (0.15, 0.7)  # of the middle of an event's path: lowest share of the side, and beyond


class Event(NamedTuple):
    """What a clip shows and plays from `start` to `end`, seconds."""

    start: float
    end: float
    scene: Scene


class EventClips(SyntheticClips):
    """Synthetic clips of events: a frame goes with the sound around it and with no other.

    At moments EVENT_SECONDS apart another shape takes the place of the one before, always of
    another kind, with its own size, colour and path, and so do timbre, pitch and level. Backdrop
    and silent shapes are the clip's and stay. There is no tremolo: it would take longer than an
    event. Arguments as SyntheticClips; a clip's label is the kind of its first event and `classes`
    has those of all, in their order.
    """

    def events(self, index: int) -> tuple[Event, ...]:
        """The events of clip `index`, in their order; together they last as long as the clip."""
        rng = keyed_rng(self.seed, SCENE_STREAM, self._number(index), 3)
        events: list[Event] = []
        start, label = 0.0, None
        while start < self.clip_seconds:
            end = start + float(rng.uniform(*EVENT_SECONDS))
            if self.clip_seconds - end < EVENT_SECONDS[0]:
                end = self.clip_seconds  # the last one takes what is left
            scene = scene_of(rng.random(11), other_than=label, places=PLACES)
            events.append(Event(start, end, scene))
            start, label = end, scene.label
        return tuple(events)

    def truth(self, index: int) -> Scene:
        """The first event of clip `index`."""
        return self.events(index)[0].scene

    def classes(self, index: int) -> tuple[int, ...]:
        """Kinds of all events of clip `index`, each once."""
        return tuple(dict.fromkeys(event.scene.label for event in self.events(index)))

    def scenes_at(self, index: int, times: list[float]) -> list[Scene]:
        """What is shown at each of `times`."""
        events = self.events(index)
        starts = [event.start for event in events]
        return [events[max(0, int(np.searchsorted(starts, t, "right")) - 1)].scene for t in times]

    def _sound(self, index: int) -> NDArray[np.float32]:
        sound = np.zeros(self.num_samples, dtype=np.float32)
        turns = keyed_rng(self.seed, SCENE_STREAM, self._number(index), 4)
        fade = round(FADE_SECONDS * SAMPLE_RATE)
        slope = (np.arange(fade, dtype=np.float32) + 0.5) / fade
        for event in self.events(index):
            first, last = (round(t * SAMPLE_RATE) for t in (event.start, event.end))
            last = min(last, self.num_samples)
            part = self._play(
                event.scene, turns.random(), last - first, first / SAMPLE_RATE, tremolo=False
            )
            part[:fade] *= slope
            part[-fade:] *= slope[::-1]
            sound[first:last] = part
        return sound
