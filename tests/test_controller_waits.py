"""When an arm has waited for its chunk, and where that begins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_controller import FPS, drive, observed

from export.runtime import Controller, OnnxPolicy

SENSES = ("rgb", "proprio", "points", "wrench", "taxels")


def asked(controller: Controller, step: int, picture: int | None = None) -> tuple[Any, np.ndarray]:
    """The question of a step about a picture, by default of now, and its answer."""
    picture = step if picture is None else picture
    controller.receive(picture / FPS, observed(picture), step / FPS)
    question = controller.ask(step / FPS)
    assert question is not None and question.begun == picture
    chunk = controller.think(question)
    assert chunk is not None
    return question, chunk


def commands(controller: Controller, first: int, end: int) -> np.ndarray:
    """What is commanded at the steps from one to before another."""
    return np.stack([np.array(controller.command(step / FPS)) for step in range(first, end)])


@pytest.mark.parametrize("halted", [False, True])
@pytest.mark.parametrize("took", [0, 1, 3])
def test_what_an_arm_at_rest_has_waited_for_begins_with_its_first_row(
    robot_artefact: Path, took: int, halted: bool
) -> None:
    """At the start of an episode, and where the chunks before have run out."""
    controller = Controller(OnnxPolicy(robot_artefact), realtime=True, stop_after=2.0)
    controller.reset(0.0)
    step = 24 if halted else 0
    if halted:
        assert drive(controller, 0, 4, delay=2)[-1] == "run"
        assert drive(controller, 4, step, lose=SENSES)[-1] == "hold"
    question, chunk = asked(controller, step)
    assert question.waits and not len(question.decided)
    for now in range(step, step + took):
        controller.command(now / FPS)
    controller.take(question, chunk, (step + took) / FPS)
    np.testing.assert_allclose(controller.command((step + took) / FPS), chunk[0], atol=1e-6)
    left = controller.policy.horizon - took
    states = []
    for later in range(1, left + 1):
        controller.command((step + took + later) / FPS)
        states.append(controller.state)
    assert states == ["run"] * (left - 1) + ["hold"], "the deadline is counted from the picture"


def test_a_chunk_that_comes_after_the_command_of_its_step_loses_no_row(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact))
    controller.reset(0.0)
    question, chunk = asked(controller, 0)
    controller.command(3 / FPS)
    controller.take(question, chunk, 3.1 / FPS)
    np.testing.assert_allclose(controller.command(4 / FPS), chunk[0], atol=1e-6)


def test_a_question_between_a_chunk_and_its_first_row_continues_that_chunk(robot_artefact: Path) -> None:
    """As a thread does that asks again as soon as it has taken an answer."""
    controller = Controller(OnnxPolicy(robot_artefact), realtime=True, replan=4)
    controller.reset(0.0)
    first, chunk = asked(controller, 0)
    commands(controller, 0, 4)
    controller.take(first, chunk, 4 / FPS)
    second, later = asked(controller, 4)
    assert not second.waits and len(second.decided) == 4
    np.testing.assert_allclose(second.decided, chunk[:4], atol=1e-6)
    done = commands(controller, 4, 8)
    np.testing.assert_allclose(done, chunk[:4], atol=1e-6)
    controller.take(second, later, 8 / FPS)
    np.testing.assert_allclose(controller.command(8 / FPS), later[4], atol=1e-6)


def test_an_arm_that_moved_when_the_picture_was_taken_has_not_waited(robot_artefact: Path) -> None:
    """Neither where chunks ran out before the question nor where they do while it is thought about."""
    for ask in (9, 7):
        controller = Controller(OnnxPolicy(robot_artefact), realtime=True)
        controller.reset(0.0)
        controller.take(*asked(controller, 0), 0.0)
        commands(controller, 0, ask)
        question, chunk = asked(controller, ask, picture=7)
        assert not question.waits
        commands(controller, ask, 11)
        assert controller.state == "hold"
        controller.take(question, chunk, 11 / FPS)
        np.testing.assert_allclose(controller.command(11 / FPS), chunk[4], atol=1e-6)


def test_what_is_decided_is_what_the_deadline_leaves(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact), realtime=True, replan=6)
    controller.reset(0.0)
    question, chunk = asked(controller, 0)
    commands(controller, 0, 3)
    controller.take(question, chunk, 3 / FPS)
    commands(controller, 3, 6)
    second, _ = asked(controller, 6)
    done = commands(controller, 6, 9)
    assert controller.state == "hold"
    np.testing.assert_allclose(second.decided[:, :3], done[:, :3], atol=1e-6)


def test_an_answer_that_takes_longer_than_the_next_question_is_not_averaged(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact), replan=2, ensemble=0.1)
    controller.reset(0.0)
    first, chunk = asked(controller, 0)
    commands(controller, 0, 3)
    controller.take(first, chunk, 3 / FPS)
    controller.command(3 / FPS)
    second, later = asked(controller, 3, picture=2)
    controller.take(second, later, 3.5 / FPS)
    np.testing.assert_allclose(controller.command(4 / FPS), later[2], atol=1e-6)
