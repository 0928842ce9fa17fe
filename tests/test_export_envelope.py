"""The safety envelope: no chunk leaves it, and what lies inside passes unchanged."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from export.envelope import LIMITS, Envelope, room
from export.tensors import observation_specs, random_tensors
from worldmodel.contracts import ClipSpec, Observation
from worldmodel.data.embodiments import Channels, Embodiment, Joint, load_embodiments
from worldmodel.data.embodiments import Envelope as Limits

torch.set_num_threads(1)

SPEC = ClipSpec(height=8, width=8, points=3, proprio=3, action=5, taxels=(2, 2, 2), embodiments=("arm",), chunk=12)
DT = 1 / SPEC.fps
JOINTS = {
    "place": Joint(controls="position", measured="at", position=(-1.0, 2.0), velocity=3.0, acceleration=20.0),
    "speed": Joint(controls="velocity", measured="x", rate=0.5, position=(0.0, 1.0), velocity=0.4, acceleration=4.0),
    "grip": Joint(controls="effort", force=0.6),
}
ARM = Embodiment(
    name="arm",
    title="Arm",
    action=Channels(names=tuple(JOINTS), units=("rad", "m/s", "1"), limits=((-3, 3), (-1, 1), (-1, 1))),
    gripper=None,
    proprio=Channels(names=("at", "x"), units=("rad", "m")),
    envelope=Limits(source="made up", contact=50.0, joints=JOINTS),
)


def envelope(arm: Embodiment = ARM) -> Envelope:
    return Envelope(SPEC, {"arm": {}}, {"arm": arm})


def standing(at: float, x: float, force: float = 0.0, batch: int = 1) -> Observation:
    now = Observation(*random_tensors(observation_specs(SPEC), SPEC, batch))
    now.proprio[:] = torch.tensor([at, x, 7.0])
    now.wrench.zero_()
    now.wrench[:, -1, 1, 0, 2] = force
    return now


def run(wanted: Tensor, now: Observation, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    padded = torch.nn.functional.pad(wanted, (0, SPEC.action - wanted.shape[-1]))
    before = torch.zeros(len(wanted), 2, SPEC.action)
    if previous is not None:
        before[..., : previous.shape[-1]] = previous
    has = torch.full((len(wanted), 2), previous is not None)
    return envelope()(padded, before, has, now)


def motion(actions: Tensor, now: Observation) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, velocities and accelerations (A, 2) of the two joints that move, from rest."""
    place, speed = actions[0, :, 0], actions[0, :, 1] * 0.5
    start = now.proprio[0, -1, :2]
    positions = torch.stack([place, start[1] + speed.cumsum(0) * DT], 1)
    velocities = torch.stack([torch.diff(place, prepend=start[:1]) / DT, speed], 1)
    return positions, velocities, torch.diff(velocities, dim=0, prepend=torch.zeros(1, 2)) / DT


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 2), st.floats(0, 1), st.sampled_from([0.3, 3.0, 30.0]))
def test_no_chunk_leaves_the_envelope(seed: int, at: float, x: float, size: float) -> None:
    now = standing(at, x)
    wanted = torch.randn(1, SPEC.chunk, 3, generator=torch.Generator().manual_seed(seed)) * size
    if seed % 3 == 0:
        wanted = wanted[:, :1].expand_as(wanted)  # straight at a limit, which it must stop before
    actions, limited = run(wanted, now)
    positions, velocities, accelerations = motion(actions, now)
    slack = 1e-3
    for d, joint in enumerate((JOINTS["place"], JOINTS["speed"])):
        assert joint.position and joint.velocity and joint.acceleration
        assert positions[:, d].min() >= joint.position[0] - 1e-5 and positions[:, d].max() <= joint.position[1] + 1e-5
        assert velocities[:, d].abs().max() <= joint.velocity + slack
        assert accelerations[:, d].abs().max() <= joint.acceleration + 0.02
    assert actions[0, :, 2].abs().max() <= 0.6
    unchanged = ~limited[0].any(1)
    padded = torch.nn.functional.pad(wanted, (0, 2))
    # What is not said to be limited is what was wanted.
    torch.testing.assert_close(actions[0][unchanged], padded[0][unchanged], atol=1e-4, rtol=1e-5)


def test_a_chunk_inside_passes_as_it_is() -> None:
    now = standing(0.0, 0.5)
    time = torch.arange(1, SPEC.chunk + 1) * DT
    wanted = torch.stack([0.2 * time**2, 0.1 * time, 0.5 * torch.ones_like(time)], 1)[None]
    actions, limited = run(wanted, now)
    torch.testing.assert_close(actions[..., :3], wanted)
    assert not limited.any() and not actions[..., 3:].any()


@pytest.mark.parametrize(
    ("kind", "wanted", "now", "previous"),
    [
        ("command", [0.0, 5.0, 0.0], standing(0, 0.5), None),
        ("position", [2.5, 0.0, 0.0], standing(1.999, 0.5), [[2.0, 0, 0]] * 2),
        ("velocity", [0.0, 0.95, 0.0], standing(0, 0.1), [[0.0, 0.8, 0]] * 2),
        ("acceleration", [0.3, 0.0, 0.0], standing(0, 0.5), None),
        ("force", [0.0, 0.0, 0.9], standing(0, 0.5), None),
    ],
)
def test_flags_name_the_limit_that_acted(
    kind: str, wanted: list[float], now: Observation, previous: list[list[float]] | None
) -> None:
    chunk = torch.tensor(wanted).expand(1, SPEC.chunk, 3)
    _, limited = run(chunk, now, None if previous is None else torch.tensor([previous]))
    acted = [name for name, flag in zip(LIMITS, limited[0, 0], strict=True) if flag]
    assert kind in acted and set(acted) <= {kind, "velocity", "acceleration"}, acted


def test_contact_brings_the_arm_to_rest_and_leaves_the_gripper() -> None:
    previous = torch.tensor([[[0.0, 0.6, 0.1], [0.1, 0.6, 0.1]]])
    wanted = torch.tensor([1.0, 0.6, 0.4]).expand(1, SPEC.chunk, 3)
    actions, limited = run(wanted, standing(0.1, 0.5, force=80.0), previous)
    assert limited[0, :, LIMITS.index("force")].all()
    assert actions[0, -1, 1] == 0 and actions[0, 0, 1] > 0, "it brakes no harder than it may"
    assert (actions[0, -1, 0] - actions[0, -2, 0]).abs() < 1e-6
    torch.testing.assert_close(actions[0, :, 2], wanted[0, :, 2])
    light, _ = run(wanted, standing(0.1, 0.5, force=20.0), previous)
    assert light[0, -1, 1] > 0.5
    absent = standing(0.1, 0.5, force=80.0)
    absent.has_wrench.zero_()
    assert run(wanted, absent, previous)[0][0, -1, 1] > 0.5


def test_outside_the_box_it_moves_no_farther_out() -> None:
    wanted = torch.tensor([0.0, 1.0, 0.0]).expand(1, SPEC.chunk, 3)
    actions, limited = run(wanted, standing(0.0, 1.2))
    assert not actions[0, :, 1].any() and limited[0, :, LIMITS.index("position")].all()
    back, _ = run(-wanted, standing(0.0, 1.2))
    assert back[0, -1, 1] < -0.5
    unknown = standing(0.0, 1.2)
    unknown.has_proprio.zero_()
    assert run(wanted, unknown)[0][0, -1, 1] > 0.5, "what is not measured has no limit of position"


def test_room_lets_a_joint_stop_in_time() -> None:
    distance, unit = torch.linspace(0, 3, 400), torch.tensor(0.7)
    for d in distance:
        v, left = room(d, unit, DT), float(d)
        while v > 0:
            left -= float(v) * DT
            v = (v - unit).clamp(min=0)
        assert left >= -1e-5
    assert room(torch.tensor(-1.0), unit, DT) == 0


def test_robots_of_one_batch_have_their_own_limits() -> None:
    spec = replace(SPEC, embodiments=("arm", "free"))
    both = Envelope(spec, {"arm": {}, "free": {"action": {"min": [-9.0] * 3, "max": [9.0] * 3}}}, {"arm": ARM})
    now = standing(0.0, 0.5, batch=2)._replace(embodiment=torch.tensor([0, 1]))
    wanted = torch.full((2, SPEC.chunk, SPEC.action), 20.0)
    actions, _ = both(wanted, torch.zeros(2, 2, SPEC.action), torch.zeros(2, 2, dtype=torch.bool), now)
    assert actions[0].max() == 20.0 and actions[0, :, :3].max() < 3  # padding is no command
    assert actions[1, :, :3].unique().tolist() == [9.0]
    assert both.sources["free"]["commands"] == "range of the training data" and both.sources["arm"]["contact"] == 50.0


def test_the_registry_states_where_its_limits_come_from() -> None:
    for name, entry in load_embodiments().items():
        if entry.envelope is None:
            continue
        assert len(entry.envelope.source) > 40, name
        spec = replace(SPEC, embodiments=(name,), action=32, proprio=64)
        statistics: dict[str, Any] = {name: {}}
        made = Envelope(spec, statistics)
        assert set(made.sources[name]["joints"]) == set(entry.envelope.joints)
