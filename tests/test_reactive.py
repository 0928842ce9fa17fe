"""Actions that follow what is measured while a chunk is executed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import SPEC
from test_controller import FPS, observed
from test_drill import STEPS, Hand
from test_realtime import Counting, Recording, make_batch

from export.drill import drill_trial
from export.proposal import ProposalPath
from export.runtime import Controller, OnnxPolicy, RuntimeContractError
from worldmodel.closed_loop import Rollout
from worldmodel.controllers import EagerPolicy
from worldmodel.data.transforms import hide
from worldmodel.ensemble import averaged
from worldmodel.errors import ConfigError, ContractError, ExportError
from worldmodel.model import WorldModel
from worldmodel.policy.realtime import first_actions
from worldmodel.schedule import Schedule

torch.set_num_threads(1)


@pytest.mark.parametrize("hidden", [(), ("points",)])
@pytest.mark.parametrize("count", [0, 2])
def test_a_proposal_is_what_a_chunk_corrects(tiny_model: WorldModel, hidden: tuple[str, ...], count: int) -> None:
    model, batch = tiny_model, make_batch(tiny_model.spec)
    now = hide(batch.observation, hidden)
    decided = first_actions(batch.future.actions, torch.full((len(now.text),), count)) if count else None
    with torch.no_grad():
        s = model.normaliser(now, model.grid)
        memory = model.remember(s, model.history_latents(now), decided=model.own_units(decided, now.embodiment))
        assert memory.proposal is not None
        corrected = model.normaliser.restore("action", memory.proposal, now.embodiment)
        torch.testing.assert_close(model.propose(now, decided), corrected, atol=1e-5, rtol=1e-5)
        blind = model.propose(now, decided, images=False)
    assert torch.allclose(blind, corrected, atol=1e-5) == (not hidden), "pictures count where nothing is tracked"


def test_a_model_without_a_state_policy_proposes_nothing(tiny_model: WorldModel) -> None:
    tiny_model.expert.state = None
    with pytest.raises(ConfigError, match=r"policy\.expert\.state is null"):
        tiny_model.propose(make_batch(tiny_model.spec).observation)
    with pytest.raises(ExportError, match="leave the path out"):
        ProposalPath(tiny_model)


def test_a_schedule_keeps_the_correction_and_takes_the_newest_proposal() -> None:
    schedule = Schedule(np.zeros(1), 1)
    rows = np.arange(4.0)[:, None]
    schedule.add(-1, 10 + rows, proposed=rows)
    assert schedule.action(-1) == 0.0, "the chunk is not there yet"
    assert schedule.action(0) == 10.0 and schedule.action(2) == 12.0
    schedule.follow(1, 100 * (1 + rows))
    np.testing.assert_array_equal(schedule.ahead(1, 2), [[11 + 100 - 1], [12 + 200 - 2]])
    schedule.follow(2, None)
    assert schedule.action(2) == 12 + 200 - 2, "the proposal before stands"
    schedule.add(2, 20 + rows, proposed=rows)
    assert schedule.action(3) == 21.0, "the chunk saw more than that proposal"
    schedule.follow(3, 100 * (1 + rows))
    assert schedule.action(3) == 21 + 100 - 1
    schedule.add(4, 30 + rows)
    schedule.follow(5, 100 * (1 + rows))
    assert schedule.action(5) == 31.0, "a chunk that corrects nothing stays as it is"


class Proposing(Counting):
    """Proposes the number of the step; silent in every third."""

    def propose(self, decided: np.ndarray) -> np.ndarray | None:
        if not len(decided) and self.steps % 3 == 2:
            return None
        return np.full((8, 4), float(self.steps))


@pytest.mark.parametrize("delay", [0, 2])
def test_every_action_follows_what_is_measured_then(delay: int) -> None:
    scene = Recording()
    rollout = Rollout(max_steps=16, replan=4, delay=delay, realtime=True, reactive=True, image_every=0)
    rollout(scene, Proposing(), "task", 0)
    for step, value in enumerate(scene.done):
        asked = (step - delay) // 4 * 4
        first = delay if asked == 0 else asked  # the arm waits for its first chunk
        # Where nothing is proposed, what was proposed a step before is followed.
        followed = step - asked - (step % 3 == 2)
        # At step 8 nothing was proposed: without a delay the chunk asked for then corrects nothing.
        followed = 0 if asked == 8 and not delay else followed
        # Nothing was at step 2 either, and what was proposed before is older than the first row.
        followed = 0 if step == delay == 2 else followed
        assert value == (0.0 if asked < 0 else 100.0 * asked + step - first + followed)


def test_what_cannot_follow_is_refused() -> None:
    with pytest.raises(ContractError, match="reactive: Counting cannot do that"):
        Rollout(max_steps=4, reactive=True, image_every=0)(Recording(), Counting(), "task", 0)
    with pytest.raises(ConfigError, match="follow what is measured are not averaged"):
        averaged(lambda robot: Counting(), 0.1, realtime=False, reactive=True, delay=0)


def test_nothing_is_proposed_where_nothing_is_measured(tiny_model: WorldModel, robot_artefact: Path) -> None:
    nothing = np.zeros((0, 4), np.float32)
    exported = OnnxPolicy(robot_artefact, allow_missing=("points", "proprio"))
    for lost, answers in ((), True), (("rgb",), True), (("points", "visible", "rgb"), False), (("proprio",), False):
        exported.reset()
        exported.observe({k: v for k, v in observed(0).items() if not k.startswith(lost or "?")})
        assert (exported.propose(nothing) is not None) == answers, lost
    spec = tiny_model.spec
    eager = EagerPolicy(tiny_model, mask=("points",), action_dims=4, proprio_dims=spec.proprio)
    eager.observe({"proprio": np.zeros(spec.proprio, np.float32), "instruction": "go"})
    assert eager.propose(nothing) is None
    eager.observe({"proprio": np.zeros(spec.proprio, np.float32)} | {
        f"rgb.{camera}": np.zeros((spec.height, spec.width, 3), np.uint8) for camera in spec.cameras
    })  # fmt: skip
    with pytest.raises(ContractError, match="missing 1 control steps ago"):
        eager.propose(nothing)


class Standing(Hand):
    """Stands where it is, so that no limit of position acts; what is measured changes all the same."""

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        self.told.append(np.clip(action, -1, 1))
        return self._observe(images), False

    def _observe(self, images: bool) -> dict[str, Any]:
        observation = super()._observe(images)
        observation["points"] = np.sin(observation["points"] + np.arange(9.0).reshape(3, 3)).astype(np.float32)
        return observation


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_controller_follows_as_an_evaluation_does(robot_artefact: Path, delay: int) -> None:
    policy, scene = OnnxPolicy(robot_artefact), Standing()
    rollout = Rollout(max_steps=STEPS, delay=delay, realtime=delay > 0, reactive=True)
    rollout(scene, policy, "task", 0)
    usual = np.stack(scene.told)

    def make(reactive: bool = True) -> Controller:
        return Controller(policy, replan=4, realtime=delay > 0, reactive=reactive)

    drill_trial(make, scene, "task", 0, "none", rollout=rollout)
    np.testing.assert_allclose(np.stack(scene.told), usual, atol=1e-5)
    drill_trial(lambda: make(False), scene, "task", 0, "none", rollout=rollout)
    assert np.abs(np.stack(scene.told) - usual).max() > 1e-2, "following changes something"


@pytest.mark.parametrize("ensemble", [None, 0.1])
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_controller_executes_late_chunks_and_means_as_an_evaluation_does(
    robot_artefact: Path, delay: int, ensemble: float | None
) -> None:
    """And the policy is told the same of what was done before."""
    policy, scene, told = OnnxPolicy(robot_artefact), Standing(), []
    before = policy._before

    def listen(given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        told.append(before(given))
        return told[-1]

    policy._before = listen  # pyright: ignore[reportAttributeAccessIssue]
    rollout = Rollout(max_steps=STEPS, delay=delay)
    rollout(scene, averaged(lambda _: policy, ensemble, realtime=False, reactive=False, delay=delay)("arm"), "task", 0)
    usual, first = np.stack(scene.told), list(told)
    told.clear()
    drill_trial(lambda: Controller(policy, replan=4, ensemble=ensemble), scene, "task", 0, "none", rollout=rollout)
    np.testing.assert_allclose(np.stack(scene.told), usual, atol=1e-5)
    assert len(first) == len(told) > 2
    for (one, has), (other, also) in zip(first, told, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert (has == also).all()


def test_a_controller_says_what_it_lacks_to_follow(robot_artefact: Path) -> None:
    with pytest.raises(RuntimeContractError, match=r"ensemble 0\.1 and reactive"):
        Controller(OnnxPolicy(robot_artefact), ensemble=0.1, reactive=True)
    policy = OnnxPolicy(robot_artefact)
    policy._small = None
    with pytest.raises(RuntimeContractError, match="no path `proposal`"):
        policy.propose(np.zeros((0, 4), np.float32))
    with pytest.raises(RuntimeContractError, match="built with the path `proposal`"):
        Controller(policy, reactive=True)


def test_a_policy_in_another_precision_proposes_all_the_same(robot_artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(robot_artefact, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (whole,) = (graph for graph in manifest["graphs"] if graph["path"] == "policy")
    manifest["graphs"].append(whole | {"precision": "bf16"})  # and none of `proposal`
    (folder / "manifest.json").write_text(json.dumps(manifest))
    policy = OnnxPolicy(folder, precision="bf16")
    policy.observe(observed(0))
    assert policy.propose(np.zeros((0, 4), np.float32)) is not None


def test_a_look_from_before_a_chunk_does_not_change_it(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact), reactive=True)
    controller.reset(0.0)
    for step in (0, 4):
        controller.receive(step / FPS, observed(step), step / FPS)
        if step == 0:
            controller.react(0.0)
        question = controller.ask(step / FPS)
        assert question is not None
        chunk = controller.think(question)
        controller.take(question, chunk, step / FPS)
    assert chunk is not None
    np.testing.assert_allclose(controller.command(5 / FPS), chunk[1], atol=1e-6)


def test_a_look_that_nothing_came_of_changes_nothing(robot_artefact: Path) -> None:
    controller = Controller(OnnxPolicy(robot_artefact), reactive=True)
    controller.reset(0.0)
    controller.react(0.0)  # before anything is known
    controller.receive(0.0, observed(0), 0.0)
    question = controller.ask(0.0)
    assert question is not None
    chunk = controller.think(question)
    assert chunk is not None
    controller.take(question, chunk, 0.0)
    controller.react(3.0)  # everything is too old by now
    first: Any = controller.command(0.0)
    np.testing.assert_allclose(first, chunk[0], atol=1e-6)
    assert SPEC.chunk == len(chunk)
