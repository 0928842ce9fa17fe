"""Sensors and actions: channels that are dead or clipped, and actions that jump, against the dataset's own spread."""

from collections.abc import Iterator

import numpy as np

from worldmodel.data.checks.finding import Channels, Fault, Jumps, Summary, Survey
from worldmodel.data.embodiments import load_embodiments
from worldmodel.data.schema import Episode

DEAD_STEPS = 10
"""Steps that an episode must have before a channel that never changes in it means anything."""
COMPANIONS = 4
"""Episodes that must be there to say what is usual; with fewer, a channel that never moves may be a short recording."""
USUALLY_MOVES = 0.95
"""Share of the other episodes in which a channel changes, before one where it does not is suspicious."""
SILENCE = 0.01
"""Share of steps at exactly zero below which a channel never rests; touch rests at zero between contacts."""
CLIPPED_RUN = 4
"""Steps in a row at exactly the dataset's largest (or smallest) value. A peak is one step, a plateau of equal floats is
the end of a sensor's range."""
SAMPLED_STEPS = 64
"""Steps per episode that a survey keeps for quantiles: its memory does not grow with the length of episodes."""
JUMP_QUANTILE = 0.95
JUMP_FACTOR = 8.0
"""A jump is this many times the 95th percentile of the step-to-step changes. Scripted experts with clipped commands
reach 3 times, a lost sample, an angle's wrap or a change of units many more."""
JUMP_FLOOR = 0.02
"""Of the spread of values: a dimension that hardly ever changes has no usual change to compare with."""
DISCRETE = 8
"""A dimension with no more values than this is a switch, and switches jump."""


def channels(episode: Episode) -> dict[str, Channels]:
    """Extremes, stillness and plateaus of every sensor channel of `episode`."""
    meta, found = episode.meta, {}
    if episode.proprio is not None:
        found["proprio"] = _channels(episode.proprio[:, :, None], meta["proprio_names"])
    if episode.wrench is not None:
        axes = ("fx", "fy", "fz", "tx", "ty", "tz")
        names = [f"{sensor} {axis}" for sensor in meta["sensor_names"] for axis in axes]
        found["wrench"] = _channels(episode.wrench.reshape(len(episode.wrench), -1, 1), names)
    if episode.taxels is not None and episode.taxels.size:
        t, s, c = episode.taxels.shape[:3]
        sensors = meta.get("taxel_sensors", [f"sensor {i}" for i in range(s)])
        kinds = meta.get("taxel_channels", [f"channel {i}" for i in range(c)])
        found["taxels"] = _channels(episode.taxels.reshape(t, s * c, -1), [f"{a} {b}" for a in sensors for b in kinds])
    return found


def _channels(values: np.ndarray, names: list[str]) -> Channels:
    """Summarise (T, C, cells)."""
    low, high = values.min(axis=(0, 2)), values.max(axis=(0, 2))
    return Channels(
        names,
        low,
        high,
        (values == values[:1]).all(axis=(0, 2)),
        (values == 0).all(axis=2).mean(axis=0),
        _longest(values == low[:, None]),
        _longest(values == high[:, None]),
    )


def _longest(mask: np.ndarray) -> np.ndarray:
    """(C,) longest run of True along time of any cell of (T, C, cells)."""
    run = np.zeros(mask.shape[1:], np.int64)
    best = run.copy()
    for step in mask:
        run = (run + 1) * step
        np.maximum(best, run, out=best)
    return best.max(axis=1)


def jumps(episode: Episode) -> Jumps | None:
    """The actions of `episode` in small: some values and changes, and the largest change of each dimension."""
    if episode.action is None or len(episode.action) < 2:
        return None
    changes = np.abs(np.diff(episode.action.astype(np.float64), axis=0))
    stride = -(-len(changes) // SAMPLED_STEPS)
    step = changes.argmax(axis=0)
    names = tuple(episode.meta["action_names"])
    return Jumps(names, episode.action[::stride], changes[::stride], changes.max(axis=0), step + 1)


def check_jumps(survey: Survey) -> Iterator[Fault]:
    """No action changes within one step by many times what is usual for its dimension in this dataset."""
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[Summary, Jumps]]] = {}
    for summary in survey.summaries:
        if summary.jumps is not None:
            groups.setdefault((summary.entry.embodiment, summary.jumps.names), []).append((summary, summary.jumps))
    for (_, names), members in groups.items():
        values = np.concatenate([jumps.values for _, jumps in members])
        changes = np.concatenate([jumps.changes for _, jumps in members])
        usual = np.quantile(changes, JUMP_QUANTILE, axis=0)
        low, high = np.quantile(values, (1 - JUMP_QUANTILE, JUMP_QUANTILE), axis=0)
        limit = JUMP_FACTOR * np.maximum(usual, JUMP_FLOOR * (high - low))
        for d, name in enumerate(names):
            if len(np.unique(values[:, d].round(3))) <= DISCRETE or "gripper" in name or limit[d] <= 0:
                continue
            for summary, jumps in members:
                if jumps.largest[d] > limit[d]:
                    message = (
                        f"{name!r} changes by {jumps.largest[d]:.3g} at step {jumps.step[d]}, 95 % of the dataset's "
                        f"changes are below {usual[d]:.3g}"
                    )
                    fix = "look for lost samples, wrapped angles or other units; drop the episode if it is damaged"
                    yield Fault(summary.entry.shard, summary.entry.key, "action", message, fix, "warning")


def _streams(survey: Survey) -> Iterator[tuple[str, list[str], list[tuple[Summary, Channels]]]]:
    """Every sensor stream of every embodiment with the episodes that have it, channel names alike."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[tuple[Summary, Channels]]] = {}
    for summary in survey.summaries:
        for stream, kept in summary.channels.items():
            group = groups.setdefault((summary.entry.embodiment, stream, tuple(kept.names)), [])
            group.append((summary, kept))
    for (_, stream, names), members in groups.items():
        yield stream, list(names), members


def check_dead(survey: Survey) -> Iterator[Fault]:
    """No sensor channel has one value in the whole dataset, but for those that the registry calls fixed."""
    fix = "check the sensor; name its modality absent, or take the channel out"
    for stream, names, members in _streams(survey):
        if len(members) < COMPANIONS or sum(s.entry.length for s, _ in members) < DEAD_STEPS:
            continue
        low = np.min([kept.low for _, kept in members], axis=0)
        high = np.max([kept.high for _, kept in members], axis=0)
        entry = members[0][0].entry
        robot = load_embodiments().get(entry.embodiment)
        fixed = robot.proprio.fixed if stream == "proprio" and robot and robot.proprio else ()
        for name, value in zip(np.array(names)[low == high], low[low == high], strict=True):
            if name in fixed:
                continue
            message = f"{name} is {value:g} at every step of all {len(members)} episodes of {entry.embodiment!r}"
            yield Fault(entry.shard, "", stream, message, fix, "warning")


def check_stuck(survey: Survey) -> Iterator[Fault]:
    """No sensor channel stands still for a whole episode if it moves in nearly all others.

    Touch channels that read zero for an episode are let pass: nothing was touched. So are grippers, which many tasks
    do not need.
    """
    fix = "check the sensor in this recording; drop the episode"
    for stream, names, members in _streams(survey):
        if len(members) <= COMPANIONS:
            continue
        still = np.stack([kept.still for _, kept in members])
        silent = np.stack([kept.silent for _, kept in members])
        others = len(members) - 1
        for c in np.flatnonzero(still.any(axis=0) & ~still.all(axis=0)):
            rests = "gripper" in names[c]
            for m in np.flatnonzero(still[:, c]):
                summary, kept = members[m]
                moving = (others - (still[:, c].sum() - 1)) / others
                quiet = (silent[:, c].sum() - silent[m, c]) / others >= SILENCE and kept.high[c] == 0
                if summary.entry.length < DEAD_STEPS or rests or quiet or moving < USUALLY_MOVES:
                    continue
                message = (
                    f"{names[c]} is {kept.high[c]:g} at all {summary.entry.length} steps, in other episodes it moves"
                )
                yield Fault(summary.entry.shard, summary.entry.key, stream, message, fix, "warning")


def check_clipped(survey: Survey) -> Iterator[Fault]:
    """No touch channel stays at exactly the dataset's extreme value; one fault a channel, at its longest plateau."""
    fix = "raise the sensor's range, or mark it as saturating there"
    for stream, names, members in _streams(survey):
        if stream == "proprio":  # joints and grippers rest at their stops
            continue
        for side in ("low", "high"):
            extremes = np.stack([getattr(kept, side) for _, kept in members])
            runs = np.stack([getattr(kept, f"run_{side}") * ~kept.still for _, kept in members])
            limit = extremes.min(axis=0) if side == "low" else extremes.max(axis=0)
            runs = runs * (extremes == limit)
            for c in np.flatnonzero((runs.max(axis=0) >= CLIPPED_RUN) & (limit != 0)):
                m = int(runs[:, c].argmax())
                entry = members[m][0].entry
                count = int((runs[:, c] >= CLIPPED_RUN).sum())
                message = (
                    f"{names[c]} stays at {limit[c]:g} for {runs[m, c]} steps, the {side}est value of the dataset: "
                    f"clipped in {count} episode{'s' if count > 1 else ''}"
                )
                yield Fault(entry.shard, entry.key, stream, message, fix, "warning")
