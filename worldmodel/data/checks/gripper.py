"""The gripper's sign: what the command asks for and what the measured opening does, matched by their names."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from worldmodel.data.checks.finding import Fault, Grip, Sample, Survey
from worldmodel.data.schema import Episode

LAGS = range(1, 7)
"""Steps by which a gripper follows its command: up to a third of a second at 20 Hz."""
AGREEMENT = 0.5
"""Correlation from which a sign is certain; experts reach 0.7 to 0.98."""
COMMAND_SPAN = 0.1
"""Range of the command below which it is held; commands are of order one, or metres of which it is held anyway."""
MEASURED_SPAN = 1e-3
"""Range of the opening below which it does not move: a millimetre, or a milliradian of the driver."""
MAJORITY = 0.8
"""Share of episodes with one sign from which that sign is the dataset's."""
COMPANIONS = 4
_RATE = re.compile(r"velocity|effort|force|torque|current|speed")
_OPENING = re.compile(r"opening|width|aperture")
_SIDE = re.compile(r"left|right")


def pairs(meta: Mapping[str, object]) -> list[tuple[int, int]] | None:
    """(action, proprio) columns of each gripper, by name; None where the names do not tell which belong together."""
    commands = _columns(meta.get("action_names"), keep_rates=True)
    measured = _columns(meta.get("proprio_names"), keep_rates=False)
    found = []
    for side in dict.fromkeys(commands):
        if len(commands[side]) != 1 or len(measured.get(side, ())) != 1:
            return None
        found.append((commands[side][0], measured[side][0]))
    return found or None


def _columns(names: object, *, keep_rates: bool) -> dict[str, list[int]]:
    """Columns that are a gripper's, by side; of several on one side those named as an opening are taken."""
    listed = [str(name).lower() for name in names] if isinstance(names, list) else []
    found: dict[str, list[int]] = {}
    for column, name in enumerate(listed):
        if "gripper" in name and (keep_rates or not _RATE.search(name)):
            side = _SIDE.search(name)
            found.setdefault(side.group() if side else "", []).append(column)
    return {
        side: [c for c in columns if _OPENING.search(listed[c])] or columns if len(columns) > 1 else columns
        for side, columns in found.items()
    }


def check_names(sample: Sample) -> Iterator[Fault]:
    """Says so where the names do not tell which command moves which gripper."""
    meta = sample.episode.meta
    if {"action", "proprio"} & set(meta.get("absent", ())):
        yield sample.fault("action", "gripper sign not looked for: no action or no proprioception", "", "note")
    elif pairs(meta) is None:
        message = (
            "gripper sign not looked for: no single pair of names with 'gripper' in action_names and proprio_names"
        )
        yield sample.fault("action", message, "", "note")


def grips(episode: Episode) -> list[Grip]:
    """How each gripper's opening follows its command, where both move enough to tell."""
    if episode.action is None or episode.proprio is None or not (columns := pairs(episode.meta)):
        return []
    found = []
    for c, p in columns:
        command, opening = episode.action[:, c].astype(np.float64), episode.proprio[:, p].astype(np.float64)
        if np.ptp(opening) < MEASURED_SPAN:
            continue
        expected = _expected(episode.meta, c, p)
        if np.ptp(command) >= COMMAND_SPAN:
            agreement = _agreement(command, opening)
        elif expected and abs(command).min() >= COMMAND_SPAN:
            # A command that the metadata call opening or closing and that is held: the gripper must have gone there.
            travel = opening[-1] - opening[0]
            agreement = float(np.sign(command[0]) * travel / np.ptp(opening))
        else:
            continue
        names = episode.meta["action_names"][c], episode.meta["proprio_names"][p]
        found.append(Grip(*names, agreement, expected))
    return found


def _agreement(command: np.ndarray, opening: np.ndarray) -> float:
    """The correlation of the command with the opening some steps later that is largest in magnitude."""
    best = 0.0
    for lag in LAGS:
        ahead, behind = command[:-lag], opening[lag:]
        if len(ahead) >= len(LAGS) and np.ptp(ahead) > 0 and np.ptp(behind) > 0:
            found = float(np.corrcoef(ahead, behind)[0, 1])
            best = found if abs(found) > abs(best) else best
    return best


def _expected(meta: Mapping[str, object], command: int, measured: int) -> int:
    """-1 if the units say that positive closes and the measured name is an opening, +1 if it opens, 0 if not stated."""
    units, names = meta.get("action_units"), meta["proprio_names"]
    if not isinstance(units, list) or not isinstance(names, list) or command >= len(units):
        return 0
    if not _OPENING.search(str(names[measured]).lower()):
        return 0
    unit = str(units[command]).lower()
    opens, closes = "1 = open" in unit.replace("-1 = ", ""), "1 = close" in unit.replace("-1 = ", "")
    return int(opens) - int(closes)


def check_sign(survey: Survey) -> Iterator[Fault]:
    """The gripper goes where its command sends it: as the metadata say, else as in most of the dataset's episodes."""
    fix = "flip the sign of the command in this episode, or state the convention in action_units"
    groups: dict[tuple[str, str, str], list[Grip]] = {}
    for summary in survey.summaries:
        for grip in summary.grips:
            if abs(grip.agreement) >= AGREEMENT:
                groups.setdefault((summary.entry.embodiment, grip.command, grip.measured), []).append(grip)
    for summary in survey.summaries:
        for grip in summary.grips:
            if abs(grip.agreement) < AGREEMENT:
                continue
            expected, why = grip.expected, "action_units say otherwise"
            if not expected:
                signs = np.sign([g.agreement for g in groups[summary.entry.embodiment, grip.command, grip.measured]])
                usual = np.sign(signs.sum())
                if len(signs) <= COMPANIONS or (signs == usual).mean() < MAJORITY:
                    continue
                expected, why = int(usual), f"in {(signs == usual).mean():.0%} of the episodes it is the other way"
            if np.sign(grip.agreement) != expected:
                way = "rises" if grip.agreement > 0 else "falls"
                message = f"{grip.measured!r} {way} when {grip.command!r} rises; {why}"
                yield Fault(summary.entry.shard, summary.entry.key, "action", message, fix, "warning")
