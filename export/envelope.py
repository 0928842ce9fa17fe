"""The safety envelope inside the graph: what a robot may be commanded, whatever the network answers.

Shapes: see the legend in `worldmodel.contracts`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmodel.contracts import ClipSpec, Observation
from worldmodel.data.embodiments import Embodiment, Joint, load_embodiments

LIMITS = ("command", "position", "velocity", "acceleration", "force")
"""Kinds of limits, in the order of the last dimension of the output `limited`."""

FREE = 1e6
"""Stands for no limit: finite, since infinities would become NaN on their way."""

NOTICE = 1e-5
"""A command that a limit changes by less, in the unit of the action, is not said to be limited."""


class Envelope(nn.Module):
    """Clamps a chunk step by step so that commands, and the motion they ask for, stay inside every limit.

    Each action moves a joint with position p and velocity v: an action that commands a position asks for the velocity
    (u - p) / dt, one that commands a velocity for `rate` u. Per step the velocity is brought within dt times the
    acceleration limit of the one before, then within the velocity limit, then within what still lets the joint stop
    before its position limit; then p moves by v dt. Whoever starts at rest inside the box never meets a conflict of
    these; from outside it, position comes before velocity and velocity before acceleration. A force above the contact
    limit makes all wanted velocities zero.
    """

    def __init__(self, spec: ClipSpec, statistics: Mapping[str, Any], registry: Mapping[str, Embodiment] | None = None):
        super().__init__()
        self.dt = 1.0 / spec.fps
        self.feels = bool(spec.sensors)  # runtimes disagree on whether any of none is true
        known = load_embodiments() if registry is None else registry
        self.sources: dict[str, dict[str, Any]] = {}
        rows: list[dict[str, Tensor]] = []
        for name in spec.embodiments:
            row, self.sources[name] = limits_of(name, known.get(name), statistics[name], spec)
            rows.append(row)
        for field in rows[0]:
            self.register_buffer(field, torch.stack([row[field] for row in rows]), persistent=False)

    def forward(
        self, wanted: Tensor, previous: Tensor, has_previous: Tensor, now: Observation
    ) -> tuple[Tensor, Tensor]:
        """Actions (B, A, D), the two commands before them, oldest first (B, 2, D), which of them there were (B, 2).

        Returns the actions that may be executed, and which limit changed which step (B, A, L) bool, see `LIMITS`.
        """
        e, dt = now.embodiment, self.dt
        row = {name: value[e] for name, value in self.named_buffers()}
        absolute, moves, rate = row["absolute"], row["moves"], row["rate"]
        low, high = row["position_low"], row["position_high"]
        # An effort has a largest size; the force limit comes before the range of commands, which is often as wide.
        pushed = wanted.clamp(-row["force"].unsqueeze(1), row["force"].unsqueeze(1))
        commanded = self.in_range(pushed, e)
        stop = torch.zeros_like(moves)
        if self.feels:
            heavy = now.wrench[:, -1, :, :, :3].square().sum(-1).amax(1).sqrt()  # (B, S), largest of the newest steps
            stop = ((heavy > row["contact"]) & now.has_wrench).any(1, keepdim=True) & moves
        measured = now.proprio[:, -1].gather(1, row["measured"])
        placed = row["has_measured"] & now.has_proprio.unsqueeze(1)
        one, two = has_previous[:, 1:], has_previous.all(1, keepdim=True)
        # A joint that is sent to positions is where it was last sent; before the first command, where it is measured.
        start = torch.where(placed, measured, commanded[:, 0])
        p = torch.where(absolute & one, previous[:, 1], start)
        v = torch.where(absolute, (previous[:, 1] - previous[:, 0]) / dt * two, previous[:, 1] * rate * one)
        bounded = absolute | placed
        low, high = torch.where(bounded, low, -FREE), torch.where(bounded, high, FREE)
        p = torch.where(absolute, torch.minimum(torch.maximum(p, low), high), p)
        unit = row["acceleration"] * dt  # the change of velocity in one step
        # What is asked for is base - pull p, and nothing where the arm must stop.
        pull = torch.where(absolute, 1 / dt, 0.0)
        base = torch.where(absolute.unsqueeze(1), commanded / dt, commanded * rate.unsqueeze(1))
        rest = torch.where(stop, 0.0, 1.0)
        calm_base, calm_pull = base * rest.unsqueeze(1), pull * rest
        ends, sign = torch.stack([-low, high], 1), torch.tensor([[[1.0], [-1.0]]])
        places, speeds = [p], [v]
        # Nothing that can be done for all steps at once is in this loop: its nodes are most of the graph's.
        for now_base in calm_base.unbind(1):
            wish = torch.minimum(torch.maximum(now_base - calm_pull * p, v - unit), v + unit)
            wish = wish.clamp(-row["velocity"], row["velocity"])
            down, up = room(ends + sign * p.unsqueeze(1), unit.unsqueeze(1), dt).unbind(1)
            v = torch.minimum(torch.maximum(wish, -down), up)
            p = p + v * dt
            places.append(p)
            speeds.append(v)
        before, after = torch.stack(places[:-1], 1), torch.stack(places[1:], 1)
        speed_before, speed = torch.stack(speeds[:-1], 1), torch.stack(speeds[1:], 1)
        names = ("velocity", "absolute", "moves")
        unit, low, high, limit, absolute, moves = (x.unsqueeze(1) for x in (unit, low, high, *(row[n] for n in names)))
        rate = rate.unsqueeze(1)
        calm = calm_base - calm_pull.unsqueeze(1) * before
        slow = torch.minimum(torch.maximum(calm, speed_before - unit), speed_before + unit)
        fast = slow.clamp(-limit, limit)
        inside = torch.minimum(torch.maximum(after, low), high)
        actions = torch.where(moves, torch.where(absolute, inside, speed / rate), commanded)
        step = torch.where(absolute, dt, 1 / rate) * moves  # of a velocity, in the unit of the action
        asked = base - pull.unsqueeze(1) * before
        force, acceleration, velocity, position = (
            (first - second).abs() * step
            for first, second in ((asked, calm), (calm, slow), (slow, fast), (fast, speed))
        )
        changes = [(commanded - pushed).abs(), position, velocity, acceleration, force + (pushed - wanted).abs()]
        return actions, torch.stack(changes, 2).amax(3) > NOTICE

    def in_range(self, actions: Tensor, embodiment: Tensor) -> Tensor:
        """Actions (B, A, D) within the range of commands alone."""
        low, high = (self.get_buffer(name)[embodiment].unsqueeze(1) for name in ("command_low", "command_high"))
        return torch.minimum(torch.maximum(actions, low), high)


def room(distance: Tensor, unit: Tensor, dt: float) -> Tensor:
    """The largest velocity towards a limit at this distance from which a joint can stop in time, losing `unit` a step.

    A velocity of w units needs at most (w + 1/2)² / 2 unit-steps to stop, and exactly w of them where w <= 1. Beyond
    the limit no velocity away from the box is left.
    """
    twice = (distance * (2 / (unit * dt))).clamp(min=0)
    return torch.maximum(twice.sqrt() - 0.5, (0.5 * twice).clamp(max=1)) * unit


def limits_of(
    name: str, entry: Embodiment | None, statistics: Mapping[str, Any], spec: ClipSpec
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The limits of one robot as vectors over the padded actions, and as the manifest states them.

    Where the registry has no range of commands, it is that of the training data.
    """
    size = spec.action
    fill = {"position_low": -FREE, "position_high": FREE, "command_low": -FREE, "command_high": FREE, "rate": 1.0}
    fill |= {"velocity": FREE, "acceleration": FREE, "force": FREE}
    row = {field: torch.full((size,), value) for field, value in fill.items()}
    for field in ("absolute", "moves", "has_measured"):
        row[field] = torch.zeros(size, dtype=torch.bool)
    row["measured"] = torch.zeros(size, dtype=torch.int64)
    row["contact"] = torch.full((1,), FREE)
    said: dict[str, Any] = {"source": None, "contact": None, "joints": {}}
    channels, envelope = (entry.action, entry.envelope) if entry else (None, None)
    action = statistics.get("action", {})
    ranges, said["commands"] = None, "no limits known"
    if channels and channels.limits:
        ranges, said["commands"] = channels.limits, f"configs/embodiments/{name}.yaml"
    elif "min" in action and "max" in action:
        ranges, said["commands"] = tuple(zip(action["min"], action["max"], strict=True)), "range of the training data"
    for d, (lowest, highest) in enumerate(ranges or ()):
        row["command_low"][d], row["command_high"][d] = lowest, highest
    said["command_range"] = [list(pair) for pair in ranges or ()]
    if channels and envelope and entry:
        places = entry.proprio.names if entry.proprio else ()
        for action_name, joint in envelope.joints.items():
            d = channels.names.index(action_name)
            fill_joint(row, d, joint, places)
        row["contact"][0] = envelope.contact or FREE
        said |= {"source": envelope.source.strip(), "contact": envelope.contact}
        said["joints"] = {n: {k: v for k, v in vars(j).items() if v is not None} for n, j in envelope.joints.items()}
    return row, said


def fill_joint(row: dict[str, Tensor], d: int, joint: Joint, places: tuple[str, ...]) -> None:
    """Writes one joint's limits at dimension d."""
    row["absolute"][d] = joint.controls == "position"
    row["moves"][d] = joint.controls != "effort"
    row["rate"][d] = joint.rate if joint.controls == "velocity" else 1.0
    if joint.measured is not None:
        row["has_measured"][d], row["measured"][d] = True, places.index(joint.measured)
    if joint.position is not None:
        row["position_low"][d], row["position_high"][d] = joint.position
    for field in ("velocity", "acceleration", "force"):
        value = getattr(joint, field)
        if value is not None:
            row[field][d] = value
