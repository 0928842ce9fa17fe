"""Where stage 1 sees the tracked points, and how the state policy learns to act on it."""

import copy

import pytest
import torch
from test_model import draws, future_of, observation_of

from worldmodel.contracts import Batch
from worldmodel.data.transforms import hide, modality_dropout
from worldmodel.encoders.keypoints import Keypoints
from worldmodel.losses import understanding_loss
from worldmodel.proposal_loss import proposal_loss


def test_keypoints_find_a_mark_between_the_cells_of_their_map():
    """Squares of 3 pixels anywhere in images of 32: cells of the map are 4 pixels apart, answers much less."""
    torch.manual_seed(0)
    network = Keypoints(channels=(8, 16), keypoints=4, instruction=4, size=(32, 32))
    answer = torch.nn.Linear(network.features, 2)
    optimiser = torch.optim.Adam([*network.parameters(), *answer.parameters()], 1e-2)
    generator = torch.Generator().manual_seed(1)

    def error() -> torch.Tensor:
        corner = torch.randint(0, 30, (32, 2), generator=generator)
        rows, columns = ((torch.arange(32) - corner[:, i, None] - 1).abs() <= 1 for i in range(2))
        images = (rows[:, :, None] & columns[:, None]).float()[:, None].expand(-1, 3, -1, -1)
        return answer(network(images, torch.zeros(32, 4))) * 8 + 15 - corner

    for _ in range(150):
        optimiser.zero_grad()
        error().square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        assert error().abs().mean() < 1.0


def test_the_instruction_says_what_to_look_for():
    network = Keypoints(channels=(8, 16), keypoints=4, instruction=4, size=(32, 32))
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one_way, other = network(image, torch.ones(1, 4)), network(image, -torch.ones(1, 4))
    assert (one_way[:, :8] - other[:, :8]).abs().max() > 1e-4


def test_hidden_senses_do_not_move_the_points(tiny_model):
    o = hide(observation_of(tiny_model.spec), ["rgb", "camera", "proprio"])
    changed = o._replace(rgb=255 - o.rgb, camera_to_base=o.camera_to_base.flip(0), proprio=-o.proprio)
    with torch.no_grad():
        seen, same = (tiny_model.encoder.locate(tiny_model.normaliser(x, tiny_model.grid)) for x in (o, changed))
        skipped = tiny_model.encoder.locate(tiny_model.normaliser(o, tiny_model.grid), images=False)
    torch.testing.assert_close(seen, same)
    torch.testing.assert_close(seen, skipped)


@pytest.mark.parametrize("hidden", [True, False])
def test_the_state_policy_learns_from_what_is_seen_where_points_are_hidden(tiny_model, hidden):
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.encoder.points_head.out[-1].weight *= 100.0
    o, future = observation_of(model.spec), future_of(model.spec)
    drop = ("points",) if hidden else ()

    def loss(observation) -> torch.Tensor:
        batch = Batch(observation, future, torch.zeros(2, model.spec.history, dtype=torch.long), ["a", "b"])
        return proposal_loss(model, batch, {}, draws(), drop=drop)["proposal"]

    first = loss(o)
    first.backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.encoder.points_head.parameters())
    assert all(p.grad is not None for p in model.expert.state.layers.parameters())
    other_images, other_points = loss(o._replace(rgb=255 - o.rgb)), loss(o._replace(points=o.points + 1.0))
    assert (other_images != first) == hidden
    assert (other_points != first) != hidden


def test_a_phase_of_points_alone_computes_nothing_else_and_the_same(tiny_model):
    model = copy.deepcopy(tiny_model)
    o, future = observation_of(model.spec), future_of(model.spec)
    batch = Batch(o, future, torch.zeros(2, model.spec.history, dtype=torch.long), ["a", "b"])
    dropout = {"points": 1.0, "touch": 1.0}
    whole = understanding_loss(model, batch, dropout, draws())
    model.encoder.requires_grad_(False)
    model.encoder.points_head.requires_grad_(True)
    alone = understanding_loss(model, batch, dropout, draws())
    assert set(alone) == {"loss", "points"} and set(whole) > set(alone)
    torch.testing.assert_close(alone["loss"], whole["points"])
    alone["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.points_head.parameters())


def test_a_view_is_hidden_as_often_as_asked_and_never_both(tiny_model):
    o = observation_of(tiny_model.spec, 64)
    hidden, dropped = modality_dropout(o, {"view": 0.5}, draws(64))
    assert torch.equal((o.has_rgb & ~hidden.has_rgb).sum(1), dropped["view"].long())
    assert 16 < dropped["view"].sum() < 48 and not hidden.has_rgb.all(0).any()
    assert torch.equal(hidden.has_camera, o.has_camera)
