"""Findings about the media of the clips that were read."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data.bad import SHARE_BASE, BadClip, BadClips, TooManyBadClips
from kdcmae_fast.data.clip import SAMPLE_RATE
from kdcmae_fast.data.doctor.checks import Check, Result, first_lines, share
from kdcmae_fast.data.doctor.lists import Source
from kdcmae_fast.data.doctor.probe import ClipFacts
from kdcmae_fast.data.media import SILENCE_PEAK, MediaOptions

REASONS = (  # what a run says of a bad clip -> what kind of trouble that is
    ("missing file", r"No such file"),
    ("empty file", r"empty file"),
    ("no audio stream", r"no audio stream"),
    ("no video stream", r"no video stream"),
    ("digital silence", r"digital silence"),
    ("too short", r"less than [\d.]+ s"),
    ("unknown label", r"not in the label CSV"),
    ("damaged", r"decode|truncated|damaged|not numbers|cannot read"),
)
OTHER = "other"
QUIET = -60.0  # dBFS, mean level; quieter clips have hardly any sound
CONFIDENCE = 1.96  # standard deviations: 95 %
MEAN_TOLERANCE = 0.25  # of the configured standard deviation
STD_TOLERANCE = 0.2  # of the configured standard deviation, either way
SHORT_SHARE = 0.5  # of a clip's seconds; shorter clips are mostly padding


def kind_of(reason: str) -> str:
    """The kind of trouble a run's reason for a bad clip is."""
    return next((kind for kind, pattern in REASONS if re.search(pattern, reason)), OTHER)


def check_media(facts: Sequence[ClipFacts], num_clips: int, max_share: float) -> list[Check]:
    """Clips a run would leave out: whether their share stops it, then each kind of trouble."""
    bad = [fact for fact in facts if fact.reason]
    checks = [_bad_share(bad, len(facts), num_clips, max_share)]
    kinds: dict[str, list[ClipFacts]] = {}
    for fact in bad:
        kinds.setdefault(kind_of(fact.reason), []).append(fact)
    for kind, clips in sorted(kinds.items(), key=lambda item: -len(item[1])):
        examples = first_lines(f"{fact.video_id}: {fact.reason}" for fact in clips)
        detail = f"of {len(facts)} clips read"
        checks.append(Check(kind, "warning", len(clips), detail, examples))
    return checks


def bad_interval(bad: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of bad clips in a whole dataset."""
    p, z = bad / total, CONFIDENCE**2 / total
    middle = (p + z / 2) / (1 + z)
    reach = CONFIDENCE * math.sqrt(p * (1 - p) / total + z / (4 * total)) / (1 + z)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _bad_share(bad: list[ClipFacts], read: int, num_clips: int, max_share: float) -> Check:
    """The rule of a run (`BadClips`) at the end of its first epoch, on what was read.

    The rule holds all the way: a share close to the limit may pass it early, by chance.
    """
    clips = BadClips(num_clips, max_share)
    clips.add(BadClip(fact.video_id, fact.reason) for fact in bad)
    part = len(clips) / read
    low, high = (part, part) if read == num_clips else bad_interval(len(clips), read)
    detail = f"{share(len(clips), read)} of {read:,} read cannot be used"
    if read < num_clips:
        detail += f" (of all {num_clips:,}: {low:.1%} to {high:.1%}, 95 % sure)"
    detail += f"; a run allows data.max_bad_share={max_share:g}"
    result: Result = "warning" if clips else "ok"
    advice = "a run leaves them out" if clips else ""
    if read == num_clips:
        try:
            clips.check(num_clips - len(clips))
            stops = False
        except TooManyBadClips:
            stops = True
    else:
        stops = part > max_share
    chance = CONFIDENCE * math.sqrt(part * (1 - part) / max(1, min(num_clips, SHARE_BASE)))
    if stops or len(clips) == read:
        result = "error"
        advice = "repair or remove them, prepare the dataset again, or raise data.max_bad_share"
    elif read < num_clips and high > max_share:
        advice = "perhaps too many: --all reads every clip"
    elif read > SHARE_BASE and part + chance > max_share:
        advice = "close to the limit: a run may pass it early, by chance"
    return Check("bad clips", result, len(clips), detail, advice=advice)


def check_properties(
    facts: Sequence[ClipFacts], source: Source, data: DataConfig, model: ModelConfig
) -> list[Check]:
    """Frames, pictures, rates, channels, lengths and levels."""
    seconds = MediaOptions.of(data, model).seconds
    # Shards bring their own frame times; a run that reads them does not look at num_frames.
    expected = {"manifest": data.num_frames, "shards": None}
    checks = [_frames(facts, expected[source])] if source in expected else []
    if source == "sounds":
        checks.append(_no_pictures(len(facts), model))
    else:
        checks.append(_pictures(facts, model.img_size))
    checks += [
        _rates(facts, source),
        _channels(facts, data.channel),
        _durations(facts, seconds),
        _levels(facts, data.reject_silence),
    ]
    return checks


def _frames(facts: Sequence[ClipFacts], expected: int | None) -> Check:
    """Frames of each clip against `expected`; None: against what most clips have."""
    found = {f.video_id: f.properties.frames for f in facts if f.properties.frames is not None}
    times = Counter(found.values())
    common = times.most_common(1)[0][0] if times else 0
    detail = ", ".join(f"{n} frames: {count:,} clips" for n, count in sorted(times.items()))
    expected = common if expected is None else expected
    odd = {name: n for name, n in found.items() if n != expected}
    advice = ""
    if odd and common != expected and common:
        advice = f"set data.num_frames={common} (it is {expected})"
    elif odd:
        advice = f"prepare these clips again with {expected} frames"
    examples = first_lines(f"{name}: {n} frames" for name, n in odd.items())
    return Check("frames", "warning" if odd else "ok", len(odd), detail, examples, advice)


def _pictures(facts: Sequence[ClipFacts], img_size: int) -> Check:
    sizes = [(f.video_id, f.properties.size) for f in facts if f.properties.size is not None]
    small = [(name, size) for name, size in sizes if min(size) < img_size]
    times = Counter(size for _, size in sizes).most_common()
    detail = ", ".join(f"{w} x {h}: {count:,}" for (w, h), count in times[:3])
    detail += f" and {len(times) - 3} more sizes" if len(times) > 3 else ""
    return Check(
        "pictures",
        "warning" if small else "ok",
        len(small),
        (f"smaller than model.img_size={img_size}; " if small else "") + detail,
        first_lines(f"{name}: {w} x {h}" for name, (w, h) in small),
        "they are enlarged; prepare them larger, or train smaller" if small else "",
    )


def _no_pictures(count: int, model: ModelConfig) -> Check:
    """Sounds against the model: a run of one that has a video branch does not start."""
    if model.modalities == "audio":
        return Check("pictures", "ok", 0, "none, and model.modalities=audio needs none")
    return Check(
        "pictures",
        "error",
        count,
        f"sounds without pictures, and model.modalities={model.modalities} needs them",
        advice="set model.modalities=audio, or give clips with pictures",
    )


def _rates(facts: Sequence[ClipFacts], source: Source) -> Check:
    rates = [(f.video_id, f.properties.rate) for f in facts if f.properties.rate]
    other = [(name, rate) for name, rate in rates if rate != SAMPLE_RATE]
    times = Counter(rate for _, rate in rates)
    once = "convert the files once" if source == "sounds" else "`kdcmae prepare` does it once"
    return Check(
        "sample rates",
        "warning" if other else "ok",
        len(other),
        ", ".join(f"{rate} Hz: {count:,}" for rate, count in sorted(times.items())),
        first_lines(f"{name}: {rate} Hz" for name, rate in other),
        f"the loader resamples them to {SAMPLE_RATE} Hz each time; {once}" if other else "",
    )


def _channels(facts: Sequence[ClipFacts], channel: str) -> Check:
    several = [f for f in facts if (f.properties.channels or 1) > 1]
    times = Counter(f.properties.channels for f in facts if f.properties.channels)
    taken = "takes the first" if channel == "first" else "takes their mean"
    return Check(
        "channels",
        "ok",
        len(several),
        ", ".join(f"{n}: {count:,}" for n, count in sorted(times.items()))
        + (f"; data.channel={channel} {taken}" if several else ""),
        first_lines(f"{f.video_id}: {f.properties.channels} channels" for f in several),
    )


def _durations(facts: Sequence[ClipFacts], clip_seconds: float) -> Check:
    known = [(f.video_id, f.properties.seconds) for f in facts if f.properties.seconds is not None]
    short = [(name, s) for name, s in known if s < SHORT_SHARE * clip_seconds]
    long = sum(s > clip_seconds for _, s in known)
    values = sorted(s for _, s in known)
    detail = "unknown"
    if values:
        middle = values[len(values) // 2]
        detail = f"{values[0]:.2f} to {values[-1]:.2f} s, median {middle:.2f} s"
    if long:
        detail += f"; {long:,} longer than a clip of {clip_seconds:.2f} s: read in windows"
    if short:
        detail = f"less than half a clip of {clip_seconds:.2f} s; " + detail
    return Check(
        "durations",
        "warning" if short else "ok",
        len(short),
        detail,
        first_lines(f"{name}: {s:.2f} s" for name, s in short),
        "the rest is padding; a smaller model.audio_length (10 ms each) fits them better"
        if short
        else "",
    )


def _levels(facts: Sequence[ClipFacts], reject_silence: bool) -> Check:
    good = [fact for fact in facts if not fact.reason]
    silent = [fact for fact in good if fact.peak <= SILENCE_PEAK]
    quiet = [fact for fact in good if decibel(fact.rms) < QUIET]
    levels = sorted(decibel(fact.rms) for fact in good)
    detail = "no clip could be read"
    if levels:
        detail = f"mean level {levels[0]:.0f} to {levels[-1]:.0f} dBFS"
        detail += f", median {levels[len(levels) // 2]:.0f}"
    if quiet:
        detail = f"quieter than {QUIET:g} dBFS, {len(silent)} of them silent; " + detail
    advice = ""
    if quiet:
        advice = "hardly any sound: look whether they are recorded or decoded wrongly"
    if silent and not reject_silence:
        advice = "data.reject_silence=true leaves silent clips out"
    return Check(
        "levels",
        "warning" if quiet else "ok",
        len(quiet),
        detail,
        first_lines(f"{fact.video_id}: {decibel(fact.rms):.0f} dBFS" for fact in quiet),
        advice,
    )


def decibel(amplitude: float) -> float:
    """dBFS; -120 for silence."""
    return 20 * math.log10(max(amplitude, 1e-6))


def fbank_statistics(
    facts: Iterable[ClipFacts], *, padding: bool = True
) -> tuple[float, float] | None:
    """Mean and standard deviation of all fbank values; None without a clip.

    padding: of all that the model gets, which the normalisation is to centre; False: of the sound
    alone.
    """
    found = (fact.fbank if padding else fact.sound for fact in facts)
    sums = [part for part in found if part is not None]
    count = sum(part.values for part in sums)
    if not count:
        return None
    mean = math.fsum(part.total for part in sums) / count
    return mean, math.sqrt(max(0.0, math.fsum(part.squares for part in sums) / count - mean**2))


def check_normalisation(facts: Sequence[ClipFacts], data: DataConfig) -> Check:
    """The fbank's mean and standard deviation, padding counted, against the configured ones."""
    measured = fbank_statistics(facts)
    if measured is None:
        return Check("normalisation", "warning", 0, "no clip to measure it on")
    mean, std = measured
    off_mean = abs(mean - data.dataset_mean) / data.dataset_std
    off_std = abs(std / data.dataset_std - 1)
    off = off_mean > MEAN_TOLERANCE or off_std > STD_TOLERANCE
    sound = fbank_statistics(facts, padding=False)
    alone = ""
    if sound is not None and sound != measured:
        alone = f" with the padding ({sound[0]:.4f}, {sound[1]:.4f} without)"
    return Check(
        "normalisation",
        "warning" if off else "ok",
        sum(fact.fbank is not None for fact in facts),
        f"clips: mean {mean:.4f}, std {std:.4f}{alone}; configured {data.dataset_mean:g}, "
        f"{data.dataset_std:g} (tolerance {MEAN_TOLERANCE:g} std and {STD_TOLERANCE:.0%})",
        advice=f"set data.dataset_mean={mean:.4f} data.dataset_std={std:.4f} (but keep the values "
        "a checkpoint was trained with)"
        if off
        else "",
    )


Getter = Callable[[ClipFacts], Any]


def values_of(facts: Iterable[ClipFacts], get: Getter) -> list[float]:
    """What `get` knows of the clips, in order."""
    return [value for value in map(get, facts) if value is not None and math.isfinite(value)]
