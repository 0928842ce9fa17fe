"""Time: the rate that the metadata state, the rate of the videos, and the clocks of the streams."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from worldmodel.data.checks.finding import Fault, Sample, Survey
from worldmodel.data.media import opened_video

RATE_TOLERANCE = 0.02
"""Relative. Clocks are off by parts in a million, and 29.97 against 30 by 0.001; more is a wrong number."""
SYNC_TOLERANCE = 0.5
"""In periods. Past half a period a sample belongs to the neighbouring step."""


def check_clocks(sample: Sample) -> Iterator[Fault]:
    """Every stream's times go forward at the stated rate, without a gap or a repetition."""
    period = 1 / float(sample.episode.meta["fps"])
    for stream, times in sample.episode.times.items():
        name = f"times.{stream}"
        gaps = np.diff(times.astype(np.float64))
        if not len(gaps):
            continue
        worst = int(np.abs(gaps - period).argmax())
        typical = float(np.median(gaps))  # a dropped sample is another fault
        if (gaps <= 0).any():
            step = int((gaps <= 0).argmax()) + 1
            yield sample.fault(name, f"time does not go forward at step {step}", "sort or drop the samples")
        elif abs(typical - period) > RATE_TOLERANCE * period:
            message = f"the samples come at {1 / typical:.4g} Hz, meta.json says fps {1 / period:g}"
            yield sample.fault(name, message, "state the true rate, or resample")
        elif abs(gaps[worst] - period) > SYNC_TOLERANCE * period:
            message = f"{gaps[worst] * 1e3:.1f} ms before step {worst + 1}, the period is {period * 1e3:.1f} ms"
            yield sample.fault(name, message, "a sample was dropped or late: resample to a regular grid", "warning")


def check_sync(sample: Sample) -> Iterator[Fault]:
    """At each step the streams were sampled within half a period of the first stream."""
    streams = list(sample.episode.times.items())
    period = 1 / float(sample.episode.meta["fps"])
    for stream, times in streams[1:]:
        reference, clock = streams[0]
        if times.shape != clock.shape:
            continue
        offset = np.abs(times.astype(np.float64) - clock)
        step = int(offset.argmax())
        if offset[step] > SYNC_TOLERANCE * period:
            message = (
                f"{offset[step] * 1e3:.1f} ms away from {reference!r} at step {step}, "
                f"more than half a period of {period * 1e3:.1f} ms"
            )
            yield sample.fault(f"times.{stream}", message, "align the streams by their times before writing")


def check_video_rate(sample: Sample) -> Iterator[Fault]:
    """Stored videos run at the stated rate."""
    fps = float(sample.episode.meta["fps"])
    for camera in sample.episode.rgb:
        name = f"rgb.{camera}.mp4"
        if name not in sample.members:
            continue
        with opened_video(sample.members[name], name) as (_, stream):
            rate = float(stream.average_rate or Fraction(0))
        if abs(rate - fps) > RATE_TOLERANCE * fps:
            message = f"the video runs at {rate:.4g} frames/s, meta.json says fps {fps:g}"
            yield sample.fault(name, message, "state the true rate, or encode the video at the control rate")


def check_one_rate(survey: Survey) -> Iterator[Fault]:
    """All episodes of an embodiment have one rate; a reader with a fixed rate refuses the others."""
    rates: dict[str, dict[float, int]] = {}
    for summary in survey.summaries:
        counts = rates.setdefault(summary.entry.embodiment, {})
        counts[summary.fps] = counts.get(summary.fps, 0) + 1
    usual = {embodiment: max(counts, key=lambda fps, c=counts: c[fps]) for embodiment, counts in rates.items()}
    for summary in survey.summaries:
        entry, common = summary.entry, usual[summary.entry.embodiment]
        if summary.fps != common:
            message = f"{summary.fps:g}, most episodes of {entry.embodiment!r} have {common:g}"
            fix = "resample, or keep rates in datasets of their own"
            yield Fault(entry.shard, entry.key, "meta.json fps", message, fix, "warning")
