"""The control loop around an artefact: time stamps, faults, and commands that never leave the limits."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import SPEC
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export_envelope import ARM, standing
from test_export_envelope import SPEC as ARM_SPEC
from test_export_envelope import run as run_envelope

from export.drill import Watch
from export.envelope import limits_of
from export.runtime import Controller, Guard, OnnxPolicy, RuntimeContractError

torch.set_num_threads(1)

FPS = SPEC.fps


def observed(step: int, images: bool = True) -> dict[str, Any]:
    """One control step whose values tell the step, the hand in the middle of its box."""
    result: dict[str, Any] = {
        "points": np.full((3, 3), step, np.float32),
        "visible": np.ones(3, bool),
        "wrench": np.full((3, 6), step, np.float32),
        "taxels": np.full((3, 2, 2, 2), step, np.float32),
        "proprio": np.array([0, 0.7, 0.25, 0, step], np.float32),
        "instruction": "go",
    }
    for camera in SPEC.cameras if images else ():
        result[f"rgb.{camera}"] = np.full((8, 8, 3), step, np.uint8)
        result[f"intrinsics.{camera}"] = np.diag([8.0, 8.0, 1.0]).astype(np.float32)
        result[f"camera_to_base.{camera}"] = np.eye(4, dtype=np.float32)
    return result


def drive(controller: Controller, first: int, end: int, *, lose: tuple[str, ...] = (), delay: int = 0) -> list[str]:
    """Runs control steps in time without some names; the states."""
    states, pending = [], []
    for step in range(first, end):
        now = step / FPS
        message = {k: v for k, v in observed(step, step % 4 == 0).items() if not k.startswith(lose or "?")}
        controller.receive(now, message, now)
        if question := controller.ask(now):
            pending.append((step + delay, question))
        while pending and pending[0][0] <= step:
            question = pending.pop(0)[1]
            controller.take(question, controller.think(question), now)
        assert np.isfinite(controller.command(now)).all()
        states.append(controller.state)
    return states


def test_the_policy_sees_what_it_would_see_step_by_step(robot_artefact: Path) -> None:
    """Also where messages arrive late, doubled and out of order."""
    plain = OnnxPolicy(robot_artefact)
    for step in range(17):
        plain.observe(observed(step, step % 4 == 0))
    controller = Controller(OnnxPolicy(robot_artefact))
    controller.reset(0.0)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 17), 2))
    controller.receive(0.0, observed(0), 0.0)
    assert controller.ask(0.0) is not None and controller.ask(0.0) is None, "one question at a time"
    controller._open = False
    for step in order:
        controller.receive(step / FPS, observed(step, step % 4 == 0), 16 / FPS)
    question = controller.ask(16 / FPS)
    assert question is not None and question.begun == 16
    controller.policy.load(question.history, question.instruction)
    for name, value in plain.inputs().items():
        np.testing.assert_array_equal(controller.policy.inputs()[name], value, err_msg=name)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_the_row_for_now_is_commanded_and_chunks_continue_it(robot_artefact: Path, delay: int) -> None:
    controller = Controller(OnnxPolicy(robot_artefact), realtime=True)
    controller.reset(0.0)
    drive(controller, 0, 16, delay=delay)
    controller.receive(16 / FPS, observed(16), 16 / FPS)
    question = controller.ask(16 / FPS)
    assert question is not None and len(question.decided) == delay
    assert question.previous is not None
    done = [np.array(controller.command(step / FPS)) for step in range(16, 16 + delay)]
    np.testing.assert_allclose(question.decided, np.reshape(done, (delay, 4)), atol=1e-6)
    chunk = controller.think(question)
    assert chunk is not None
    controller.take(question, chunk, (16 + delay) / FPS)
    np.testing.assert_allclose(controller.command((16 + delay) / FPS), chunk[delay], atol=1e-6)


def test_a_message_that_is_refused_leaves_nothing_behind(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact))
    controller.reset(0.0)
    for wrong in ({"instruction": "go" * 4000}, {"rgb.fornt": np.zeros((8, 8, 3), np.uint8)}):
        with pytest.raises(RuntimeContractError):
            controller.receive(0.0, {**observed(0), **wrong}, 0.0)
        assert controller.ask(0.0) is None and controller.reason == "no picture and no sensor is fresh"


def test_chunks_that_overlap_are_averaged_but_not_over_a_halt(robot_artefact: Path) -> None:
    for deadline in (None, 3 / FPS):  # the second halts before every question
        controller = Controller(OnnxPolicy(robot_artefact), replan=4, ensemble=0.1, deadline=deadline)
        controller.reset(0.0)
        taken, think = [], controller.think

        def watch(question: Any, think: Any = think, taken: list[Any] = taken) -> np.ndarray:
            taken.append(think(question))
            return taken[-1]

        controller.think = watch  # pyright: ignore[reportAttributeAccessIssue]
        drive(controller, 0, 17)
        older, newer = taken[-2:]
        shared, expected = len(newer) - 4, newer.copy()
        if deadline is None:
            old = np.exp(-0.4)
            expected[:shared] = (newer[:shared] + old * older[4:]) / (1 + old)
            assert shared > 0 and np.abs(expected - newer).max() > 1e-3
        assert controller._chunk is not None
        np.testing.assert_allclose(controller._chunk, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeContractError, match=r"ensemble 0\.1 and realtime"):
        Controller(OnnxPolicy(robot_artefact), ensemble=0.1, realtime=True)


def test_silence_is_held_then_stopped_until_reset(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact), stop_after=0.5)
    controller.reset(0.0)
    assert set(drive(controller, 0, 10)) == {"run"}
    states = []
    for step in range(10, 40):
        moved = np.array(controller.command(step / FPS))
        states.append(controller.state)
        assert states[-1] == "run" or not moved[:3].any()
    # The chunk of step 8 ends at step 16; half a second later the stop is final.
    assert states == ["run"] * 6 + ["hold"] * 10 + ["stop"] * 14
    assert set(drive(controller, 40, 50)) == {"stop"}
    controller.reset(50 / FPS)
    controller.receive(50 / FPS, observed(50), 50 / FPS)
    question = controller.ask(50 / FPS)
    assert question is not None and len(question.history) == 1


@pytest.mark.parametrize("missing", ["rgb.front", "proprio"])
def test_what_the_policy_needs_is_said_and_what_it_may_lack_is_masked(robot_artefact: Path, missing: str) -> None:
    controller = Controller(OnnxPolicy(robot_artefact))
    controller.reset(0.0)
    drive(controller, 0, 8)
    states = drive(controller, 8, 30, lose=(missing,))
    assert states[-1] == "hold" and controller.reason.startswith(f"{missing}: nothing newer than 0.")
    assert drive(controller, 30, 34)[-1] == "run", "it goes on when the sense is back"
    patient = Controller(OnnxPolicy(robot_artefact, allow_missing={missing.split(".")[-1]}))
    patient.reset(0.0)
    drive(patient, 0, 8)
    assert set(drive(patient, 8, 30, lose=(missing,))) == {"run"}


def test_frozen_cameras_and_values_that_are_no_numbers_are_dropped(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact), frozen_after=3)
    controller.reset(0.0)
    drive(controller, 0, 8)
    for step in range(8, 28, 4):
        late = observed(step) | {"rgb.wrist": observed(8)["rgb.wrist"], "wrench": np.full((3, 6), np.nan, np.float32)}
        controller.receive(step / FPS, late, step / FPS)
        asked = controller.ask(step / FPS)
        assert (asked is None) == (step >= 16), step
        if asked:
            assert step < 12 or "wrench" not in asked.history[-1]
            controller.take(asked, controller.think(asked), step / FPS)
    assert controller.dropped["wrench"] == 5 and controller.reason.startswith("rgb.wrist: frozen")
    with pytest.raises(RuntimeContractError, match=r"rgb\.frnt: unknown; did you mean 'rgb\.front'"):
        controller.receive(2.0, {"rgb.frnt": 0}, 2.0)
    controller.receive(9.0, observed(30), 2.0)
    assert controller.dropped["rgb.front"] == 1, "a stamp of the future"


def test_a_sensor_that_fails_takes_no_other_with_it(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact))
    controller.reset(0.0)
    for step in range(17):
        message = observed(step, step % 4 == 0)
        if 5 <= step < 8:  # forces are read between frames too
            message["wrench"][1, 2] = np.nan
        if 4 <= step < 9:
            message["points"][0] = np.inf
        controller.receive(step / FPS, message, step / FPS)
        if question := controller.ask(step / FPS):
            controller.policy.load(question.history, question.instruction)
            feed = controller.policy.inputs()
            # A history knows no time: what was missing in one of its frames is missing.
            assert feed["has_wrench"][0].tolist() == [True, not 8 <= step < 8 + 4 * SPEC.history, True], step
            assert np.isfinite(feed["wrench"]).all() and feed["wrench"][0, -1, -1, 0, 0] == step
            assert feed["has_points"][0, :2].tolist() == [not 4 <= step < 8 + 4 * SPEC.history, True], step
            controller.take(question, controller.think(question), step / FPS)
    assert controller.dropped == {"wrench": 3, "points": 5}


def test_answers_that_are_late_or_not_finite_are_not_commanded(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact), deadline=0.2)
    controller.reset(0.0)
    controller.receive(0.0, observed(0), 0.0)
    question = controller.ask(0.0)
    assert question is not None
    controller.take(question, np.full((SPEC.chunk, 4), np.nan, np.float32), 0.0)
    assert not controller.command(0.0).any() and controller.state == "hold"
    controller.take(question, np.ones((SPEC.chunk, 4), np.float32), 0.2)
    controller.command(0.2)
    assert controller.state == "hold" and controller.reason.endswith("too late")
    controller.reset(1.0)
    controller.take(question, np.ones((SPEC.chunk, 4), np.float32), 0.0)
    assert not controller.command(1.0).any(), "of an episode before"


def test_a_blow_stops_the_arm_and_forces_within_the_limit_do_not(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact))
    controller.guard.contact = 50.0
    controller.reset(0.0)
    drive(controller, 0, 10)
    assert controller.guard.velocity.any()
    for stamp, force in ((0.49, 90.0), (0.5, 1.0)):
        controller.receive(stamp, {"wrench": np.full((3, 6), force, np.float32)}, 0.5)
    assert not controller.command(0.5)[:3].any() and controller.state == "run"
    assert controller.command(0.55)[:3].any()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.1, 100.0))
def test_wild_chunks_leave_the_arm_inside_its_limits(robot_artefact: Path, seed: int, size: float) -> None:
    """Whatever a network answers, and although the last messages are old."""
    random = np.random.default_rng(seed)
    controller = Controller(OnnxPolicy(robot_artefact), replan=4)
    watch = Watch(controller.policy.robot, FPS)
    controller.reset(0.0)
    place = np.array([0.45, 0.41, 0.06])
    for step in range(40):
        now, seen = step / FPS, observed(step)
        seen["proprio"][:3] = place
        if random.random() < 0.6:
            controller.receive(now, seen, now)
        if question := controller.ask(now):
            controller.take(question, random.normal(0, size, (SPEC.chunk, 4)), now)
        command = controller.command(now)
        watch(command, seen)
        place = place + 0.8 / FPS * command[:3].astype(float)
    assert watch.not_finite == watch.outside == 0 and watch.farthest < 1e-6


def test_a_command_makes_no_array() -> None:
    """With so many actions that a single array of flags would be seen."""
    size = 100_000
    joints = {"0": vars(ARM.envelope.joints["place"]), "1": vars(ARM.envelope.joints["speed"])} if ARM.envelope else {}
    said = {"command_range": [], "contact": None, "joints": {k: v | {"force": 9.0} for k, v in joints.items()}}
    robot = {"action_names": [str(i) for i in range(size)], "proprio_names": ["at", "x"], "envelope": said}
    guard, wanted, out = Guard(robot, FPS), np.ones(size), np.zeros(size, np.float32)
    guard.measure(np.array([0.0, 0.5]), np.zeros(size))
    guard(wanted, out, still=False)
    tracemalloc.start()
    for _ in range(3):
        guard.rest(wanted)
        guard(wanted, out, still=True)
        guard(wanted, out, still=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(-1.0, 2.0), st.floats(0.05, 0.95), st.booleans())
def test_the_guard_is_the_envelope_step_by_step(seed: int, at: float, x: float, heavy: bool) -> None:
    wanted = torch.randn((1, ARM_SPEC.chunk, 3), generator=torch.Generator().manual_seed(seed)) * 2
    force = 80.0 if heavy else 0.0
    expected = run_envelope(wanted, standing(at, x, force))[0][0, :, :3].numpy()
    _, said = limits_of("arm", ARM, {}, ARM_SPEC)
    assert ARM.action is not None and ARM.proprio is not None
    robot = {"action_names": ARM.action.names, "proprio_names": ARM.proprio.names, "envelope": said}
    guard, out = Guard(robot, ARM_SPEC.fps), np.zeros(3, np.float32)
    guard.measure(np.array([at, x]), np.zeros(3))
    for row, right in zip(wanted[0].double().numpy(), expected, strict=True):
        guard(row, out, still=force > guard.contact)
        np.testing.assert_allclose(out, right, atol=2e-4)


def test_a_joint_of_unknown_place_is_not_moved() -> None:
    _, said = limits_of("arm", ARM, {}, ARM_SPEC)
    assert ARM.action is not None and ARM.proprio is not None
    robot = {"action_names": list(ARM.action.names), "proprio_names": ARM.proprio.names, "envelope": said}
    guard, out = Guard(robot, ARM_SPEC.fps), np.zeros(3, np.float32)
    wanted = np.zeros(3)
    guard.rest(wanted)
    with pytest.raises(RuntimeContractError, match="no known place yet"):
        guard(wanted, out, still=True)
    guard(np.array([0.5, 1.0, 1.0]), out, still=False)
    np.testing.assert_allclose(out, [0.5, 0.0, 0.6])
    with pytest.raises(RuntimeContractError, match="unknown actions"):
        Guard(robot, ARM_SPEC.fps, {"elbow": 0.0})
