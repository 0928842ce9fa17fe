"""Real-time chunking: chunks that continue what the robot does while the policy thinks."""

from typing import Any

import numpy as np
import pytest
import torch
from test_closed_loop import LineScene
from test_model import future_of, observation_of

from worldmodel.closed_loop import Rollout
from worldmodel.contracts import Batch, ClipSpec
from worldmodel.controllers import EagerPolicy
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError, ContractError
from worldmodel.losses import clip_loss
from worldmodel.model import WorldModel
from worldmodel.policy.realtime import draw_prefixes, first_actions
from worldmodel.schedule import Schedule


def make_batch(spec: ClipSpec) -> Batch:
    """Made-up clips of four rows."""
    return Batch(observation_of(spec, 4), future_of(spec, 4), torch.arange(4), ["a", "b", "c", "d"])


SETTINGS: dict[str, Any] = {
    "mode": "policy",
    "drop": (),
    "dropout": {},
    "draws": 2,
    "weights": {},
    "insulate": True,
    "huber": None,
    "given": {},
    "absent": 0.0,
}


def test_what_is_decided_stays_and_the_rest_follows_from_it(tiny_model: WorldModel) -> None:
    model, spec, batch = tiny_model, tiny_model.spec, make_batch(tiny_model.spec)
    observation = batch.observation
    rows = observation.text.shape[0]
    with torch.no_grad():
        for parameter in model.expert.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    noise = torch.randn(rows, spec.chunk, spec.action, generator=torch.Generator().manual_seed(0))
    free = model.act(observation, noise)
    counts = torch.arange(rows) % (spec.chunk // 2 + 1)
    known = first_actions(batch.future.actions, counts)
    held = model.act(observation, noise, known)
    dims = batch.future.action_dims
    for row, count in enumerate(counts.tolist()):
        real = dims[row]
        torch.testing.assert_close(
            held[row, :count, real], batch.future.actions[row, :count, real], atol=1e-4, rtol=1e-4
        )
        same = torch.allclose(held[row, count:], free[row, count:], atol=1e-5)
        assert same == (count == 0)


def test_one_level_for_all_actions_is_the_same_level_for_each(tiny_model: WorldModel) -> None:
    model, batch = tiny_model, make_batch(tiny_model.spec)
    observation = batch.observation
    s = model.normaliser(observation, model.grid)
    memory = model.remember(s, model.history_latents(observation))
    actions = torch.randn(batch.future.actions.shape, generator=torch.Generator().manual_seed(0))
    level = torch.linspace(0.1, 0.9, len(actions))
    _, one = model.velocity(memory, actions=actions, action_level=level)
    _, each = model.velocity(memory, actions=actions, action_level=level[:, None].expand(-1, actions.shape[1]))
    torch.testing.assert_close(one, each, atol=1e-5, rtol=1e-5)


def test_prefixes_are_as_long_and_as_many_as_asked() -> None:
    actions = torch.zeros(4000, 8, 3)
    counts = draw_prefixes(actions, 0.25, Draws(0, range(4000))).where.sum(1)
    assert set(counts.tolist()) == {0, 1, 2, 3, 4}
    assert (counts > 0).float().mean() == pytest.approx(0.25, abs=0.03)
    where = draw_prefixes(actions, 1.0, Draws(0, range(4000))).where
    assert (where[:, 1:] <= where[:, :-1]).all() and where[:, 0].all()


def test_known_actions_have_no_loss(tiny_model: WorldModel) -> None:
    """A network that always answers nothing is wrong by the actions themselves, but for those that are known."""
    batch = make_batch(tiny_model.spec)
    torch.nn.init.zeros_(tiny_model.expert.embed_out.weight)

    def loss(actions: torch.Tensor) -> float:
        latents = tiny_model.history_latents(batch.observation)
        part = batch._replace(future=batch.future._replace(actions=actions))
        losses, _ = clip_loss(tiny_model, part, latents, Draws(3, range(4)), decided=1.0, **SETTINGS)
        return float(losses["policy/actions"])

    first = torch.arange(batch.future.actions.shape[1])[:, None] < 1
    last = torch.arange(batch.future.actions.shape[1])[:, None] > 6
    with torch.no_grad():
        usual = loss(batch.future.actions)
        assert loss(torch.where(first, 1e3, batch.future.actions)) == pytest.approx(usual, rel=1e-3)
        assert loss(torch.where(last, 1e3, batch.future.actions)) > 2 * usual


class Counting:
    """A policy whose action says at which step it was asked and for which row."""

    def __init__(self) -> None:
        self.told: list[np.ndarray] = []
        self.steps = -1

    def reset(self) -> None:
        self.steps = -1

    def observe(self, observation: dict[str, Any]) -> None:
        self.steps += 1

    def act(self) -> np.ndarray:
        return np.array([[100.0 * self.steps + row, 0, 0, 0] for row in range(8)])

    def act_after(self, decided: np.ndarray) -> np.ndarray:
        self.told.append(decided)
        return np.concatenate([decided, self.act()[len(decided) :]])


class Recording(LineScene):
    """Keeps what is executed and never ends."""

    def __init__(self) -> None:
        super().__init__("task")
        self.done: list[float] = []

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        self.done.clear()
        return super().reset(rng, images)

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        self.done.append(float(action[0]))
        return self._observe(images), False


@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("realtime", [False, True])
def test_late_chunks_are_executed_at_their_time(delay: int, realtime: bool) -> None:
    scene, policy = Recording(), Counting()
    Rollout(max_steps=16, replan=4, delay=delay, realtime=realtime, image_every=0)(scene, policy, "task", 0)
    for step, value in enumerate(scene.done):
        asked = (step - delay) // 4 * 4
        first = delay if asked == 0 else asked  # the arm waits for its first chunk, which then is executed whole
        assert value == (0.0 if asked < 0 else 100.0 * asked + step - first)
    if realtime:
        assert not len(policy.told[0]), "an arm at rest has decided nothing"
        for number, decided in enumerate(policy.told[1:], 1):
            assert [row[0] for row in decided] == scene.done[4 * number : 4 * number + delay]
    assert bool(policy.told) == realtime


def test_a_delay_longer_than_the_time_between_questions_is_refused() -> None:
    with pytest.raises(ConfigError, match="delay 5; expected 0 to replan, 4"):
        Rollout(delay=5)


def test_a_schedule_without_chunks_holds() -> None:
    schedule = Schedule(np.array([7.0]), 2)
    assert schedule.action(0) == 7.0 and schedule.ahead(0, 3).shape == schedule.ahead(0, 0).shape == (0, 1)


def test_more_decided_than_a_chunk_has_is_refused(tiny_model: WorldModel) -> None:
    policy = EagerPolicy(tiny_model, action_dims=4)
    with pytest.raises(ContractError, match="decided actions, the chunk has"):
        policy.act_after(np.zeros((tiny_model.spec.chunk + 1, 4)))
