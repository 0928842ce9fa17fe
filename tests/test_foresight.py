"""What the state will be when decided actions are done, and the chunk that begins with them."""

import copy

import pytest
import torch
from test_model import draws, future_of, generator, observation_of

from worldmodel.contracts import Batch
from worldmodel.data.transforms import hide, jittered
from worldmodel.errors import ConfigError
from worldmodel.fitting import carried_along
from worldmodel.policy.foresight import Foresight
from worldmodel.policy.realtime import first_actions
from worldmodel.policy.state_policy import measure
from worldmodel.proposal_loss import foresight_error, proposal_loss


@pytest.fixture
def model(tiny_model):
    """One whose foresight expects something to change."""
    changed = copy.deepcopy(tiny_model)
    for number, part in enumerate((changed.expert.foresight.robot, changed.expert.foresight.contact)):
        torch.nn.init.normal_(part.out.weight, std=0.1, generator=generator(number))
    return changed


def measured(model, observation):
    s = model.normaliser(observation, model.grid)
    return measure(s), s.embodiment


def chunk(model, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, model.spec.chunk, model.spec.action, generator=generator(seed))


def test_foresight_takes_one_step_for_every_decided_action(model):
    now, robot = measured(model, observation_of(model.spec))
    foresight, actions = model.expert.foresight, chunk(model)
    after = foresight.after(now, first_actions(actions, torch.tensor([0, 2])), robot)
    twice = foresight(foresight(now, actions[:, 0], robot), actions[:, 1], robot)
    torch.testing.assert_close(after.proprio[0], now.proprio[0], rtol=0, atol=0)
    for name in ("proprio", "effector", "points"):
        torch.testing.assert_close(getattr(after, name)[1], getattr(twice, name)[1])
    assert (after.proprio[1] - now.proprio[1]).abs().max() > 1e-3


def test_absent_senses_stay_absent(model):
    now, robot = measured(model, hide(observation_of(model.spec), ["points", "proprio"]))
    after = model.expert.foresight(now, chunk(model)[:, 0], robot)
    assert torch.equal(after.proprio, now.proprio) and torch.equal(after.points, now.points)


def test_nothing_moves_that_the_robot_does_not_and_things_only_change_how_far_it_does(model):
    """Whoever knows where things are foresees what an expert would have done, and not what the action does."""
    now, robot = measured(model, observation_of(model.spec))
    foresight, actions = model.expert.foresight, chunk(model)
    torch.nn.init.normal_(foresight.contact.out.bias, std=3.0, generator=generator(5))
    after = foresight(now, actions[:, 0], robot)
    torch.nn.init.zeros_(foresight.contact.out.weight)
    torch.nn.init.zeros_(foresight.contact.out.bias)
    free = foresight(now, actions[:, 0], robot)
    assert torch.equal(free.points, now.points) and not torch.equal(after.points, now.points)
    share = (after.effector - now.effector) / (free.effector - now.effector)
    assert share.min() >= -1e-3 and share.max() <= 2 + 1e-3 and share.std() > 0.1
    torch.nn.init.normal_(foresight.contact.out.bias, std=3.0, generator=generator(5))
    torch.nn.init.zeros_(foresight.robot.out.weight)
    still = foresight(now, actions[:, 0], robot)
    for name in ("proprio", "effector", "points"):
        torch.testing.assert_close(getattr(still, name), getattr(now, name), rtol=0, atol=0)


def test_a_chunk_begins_with_what_is_decided_and_goes_on_from_the_state_after_it(model):
    o, actions = observation_of(model.spec), chunk(model)
    s = model.normaliser(o, model.grid)
    decided = first_actions(actions, torch.tensor([0, 3]))
    with torch.no_grad():
        plain = model.remember(s, None).proposal
        proposal = model.remember(s, None, decided=decided).proposal
        later = model.expert.foresight.after(measure(s, None), decided, s.embodiment)
        fresh = model.expert.state(later, model.encoder.instruction(s), s.embodiment)[1]
    torch.testing.assert_close(proposal[0], plain[0])
    torch.testing.assert_close(proposal[1, :3], actions[1, :3])
    torch.testing.assert_close(proposal[1, 3:], fresh[1, :-3])


def test_foresight_learns_how_the_state_moves(model):
    """A robot whose every measurement grows by its first action, and carries everything along."""
    model = copy.deepcopy(model)
    o, future = observation_of(model.spec, 2), future_of(model.spec, 2)
    n = model.normaliser
    motion = n.standardise("action", future.actions, o.embodiment)[..., :1].cumsum(1)
    scale = n.moments("proprio", o.embodiment, future.proprio)[1]
    future = future._replace(proprio=o.proprio[:, -1:] + motion * scale)
    hand, stride = (future.proprio - o.proprio[:, -1:])[..., n.effector], model.spec.stride
    future = future._replace(points=o.points[:, -1:] + hand[:, stride - 1 :: stride, None])
    batch = Batch(o, future, torch.zeros(2, model.spec.history, dtype=torch.long), ["a", "b"])
    foresight = model.expert.foresight
    optimiser = torch.optim.Adam(foresight.parameters(), 3e-3)
    errors = []
    for _ in range(240):
        now, robot = measured(model, o)
        optimiser.zero_grad()
        error = foresight_error(model, foresight, now, batch)
        error.backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.3 * errors[0]


def test_foresight_is_taught_by_what_happened_and_not_by_actions(model):
    o, future = observation_of(model.spec), future_of(model.spec)
    batch = Batch(o, future, torch.zeros(2, model.spec.history, dtype=torch.long), ["a", "b"])
    losses = proposal_loss(model, batch, {}, draws(), decided=1.0)
    losses["proposal"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.expert.foresight.parameters())
    losses["foresight"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.expert.foresight.parameters())
    model.zero_grad()
    s = model.normaliser(o, model.grid)
    model.remember(
        s, None, decided=first_actions(chunk(model), torch.tensor([2, 4]))
    ).proposal.square().sum().backward()
    assert all(p.grad is None for p in model.expert.foresight.parameters())
    assert model.expert.state.out.weight.grad.any()


@pytest.mark.parametrize("mode", ["video_prediction", "joint", "forward_dynamics"])
def test_points_go_where_foresight_expects_them_but_for_what_the_streams_correct(model, mode):
    """A network that answers nothing says what the proposal, or the actions that are given, will do."""
    torch.nn.init.normal_(model.expert.state.out.weight, std=0.1, generator=generator(7))
    o, future = observation_of(model.spec), future_of(model.spec)
    o = o._replace(has_points=o.has_points & (torch.arange(model.spec.points) > 0))
    s = model.normaliser(o, model.grid)
    with torch.no_grad():
        chosen = model.remember(s, None).proposal
        if mode == "forward_dynamics":
            chosen = model.normaliser.standardise("action", future.actions, s.embodiment)
        steps = {"frames": model.spec.future, "stride": model.spec.stride}
        expected, hand = model.expert.foresight.follow(measure(s), chosen, s.embodiment, **steps)
        before = model.predict(o, future, mode, generator=generator()).points
        model.get_buffer("carried")[1] = 1.0
        for name in ("points", "camera"):
            for part in model.denoiser.embed_out[name].parameters():
                part.zero_()
        prediction = model.predict(o, future, mode, generator=generator())
    found = prediction.points
    way = model.normaliser.restore("points", hand, s.embodiment)
    way = way - o.proprio[:, -1:][..., model.normaliser.effector]
    gone = prediction.camera_to_base - o.camera_to_base[:, -1:]
    assert way.abs().max() > 1e-2
    torch.testing.assert_close(gone[:, :, 1, :3, 3], way, atol=1e-5, rtol=1e-4)
    assert gone[:, :, 0].abs().max() < 1e-5, "what the hand does not carry stays"
    expected = model.normaliser.restore("points", expected, s.embodiment)
    torch.testing.assert_close(found[:, :, 1:], expected[:, :, 1:])
    assert (expected[:, :, 1:] - o.points[:, -1:, 1:]).abs().max() > 1e-2
    torch.testing.assert_close(found[:, :, 0], o.points[:, -1:, 0].expand(-1, model.spec.future, -1))
    assert not torch.allclose(before[:, :, 1:], found[:, :, 1:])


def test_streams_do_not_teach_foresight_and_noisy_actions_do_not_move_it(model):
    s = model.normaliser(observation_of(model.spec), model.grid)
    memory, actions = model.remember(s, None), chunk(model)
    model.get_buffer("carried").fill_(1.0)
    foreseen, noisy = model.foresee(memory), model.foresee(memory, actions, torch.full((2,), 0.5))
    told = model.foresee(memory, actions, torch.tensor([0.0, 0.5]))
    assert set(foreseen) == {"points", "camera"}
    for name, value in foreseen.items():
        assert not value.requires_grad and torch.equal(noisy[name], value)
        assert torch.equal(told[name][1], value[1]) and not torch.allclose(told[name][0], value[0])
    assert model.foresee(memory._replace(measured=None)) == {}


def test_jitter_leaves_the_hand_where_it_is(tiny_model):
    s = tiny_model.normaliser(observation_of(tiny_model.spec), tiny_model.grid)
    noisy = jittered(s, 0.3, tiny_model.normaliser.effector, draws())
    changed = noisy.proprio != s.proprio
    assert not changed[:, :-1].any() and not changed[:, -1, list(tiny_model.normaliser.effector)].any()
    assert changed[:, -1].sum() == 2 * (tiny_model.spec.proprio - 3)
    assert torch.equal(noisy.effector, s.effector) and jittered(s, 0.0, (0,), draws()) is s


def test_foresight_without_a_state_policy_is_refused(tiny_model):
    from worldmodel.policy.action_expert import ActionExpert

    with pytest.raises(ConfigError, match="foresight"):
        ActionExpert(
            width=8, attention_width=8, heads=1, hidden=8, context=8, layers=1, action=2, chunk=4, stride=2, history=2,
            embodiments=1, state=None, foresight=tiny_model.expert.foresight, proprio=3,
        )  # fmt: skip


def test_what_is_far_outside_the_data_is_taken_for_its_edge(model):
    now, robot = measured(model, observation_of(model.spec))
    edge = torch.full((2, model.spec.action), 5.0)
    wild, tame = (model.expert.foresight(now, action, robot) for action in (1e6 * edge, edge))
    torch.testing.assert_close(wild.points, tame.points)
    far = model.expert.foresight(now._replace(proprio=now.proprio + 100), edge, robot)
    assert wild.proprio.abs().max() <= 5 and far.proprio.abs().max() <= 5


def test_how_far_the_hand_carries_a_camera_is_fitted(model):
    """One that stands, one on the hand whose pose is known in half of the rows, whatever stands there otherwise."""
    o, future = observation_of(model.spec, 16), future_of(model.spec, 16)
    stride, effector, frames = model.spec.stride, model.normaliser.effector, model.spec.future
    ends = future.proprio[:, stride - 1 : frames * stride : stride][..., effector]
    way = ends - o.proprio[:, -1:, effector]
    poses = o.camera_to_base[:, -1:].expand(-1, frames, -1, -1, -1).clone()
    known = torch.arange(16) % 2 == 0
    poses[:, :, 1, :3, 3] += torch.where(known[:, None, None], way, -5.0)
    o = o._replace(has_camera=torch.stack([torch.ones(16, dtype=torch.bool), known], 1), has_proprio=torch.ones(16) > 0)
    s = model.normaliser(o, model.grid)
    share = carried_along(model, s, o, future._replace(camera_to_base=poses))
    torch.testing.assert_close(share.float(), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)


def test_cameras_are_carried_only_where_foresight_leads():
    with pytest.raises(ConfigError, match="carries is part of leads"):
        Foresight(proprio=4, points=2, action=3, embodiments=1, hidden=8, blocks=1, chunk=4, carries=True)
