"""Pictures moved along paths and tracks: what goes where, what the compositor learns, and how following is scored."""

from typing import Any

import numpy as np
import pytest
import torch
from test_conditioning import clip_of
from test_model import draws, generator

from worldmodel.compositor_loss import composite_loss
from worldmodel.conditioning import between, give
from worldmodel.contracts import Batch, ClipSpec, Future, Observation, Understanding
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError
from worldmodel.evaluation_given import asked_places, camera_share, likeness, object_places
from worldmodel.geometry import fov_to_intrinsics, project_points
from worldmodel.synthesis.compositor import Compositor, Moves, by_geometry, carry
from worldmodel.synthesis.conditions import heat_maps
from worldmodel.viz import ringed


def moves_of(tracks: torch.Tensor, carried: tuple[bool, ...] = (True, False)) -> Moves:
    """A bright spot at the first of two marks, seen from a camera at the base that looks down on a plane."""
    lens, pose = fov_to_intrinsics(torch.tensor(1.0), 64, 64)[None], torch.eye(4)[None]
    pose[0, 1, 1] = pose[0, 2, 2] = -1.0
    marks = torch.tensor([[[0.0, 0.0, -1.0], [0.2, 0.2, -1.0]]])
    spot = heat_maps(marks[:, :1], lens, pose, (64, 64), (64, 64)).expand(-1, 3, -1, -1)
    ground, view = torch.tensor([-1.0]), torch.zeros(1, dtype=torch.long)
    return Moves(spot, lens, pose, pose, marks, tracks, torch.tensor([carried]), ground, view)


THERE = torch.tensor([[[0.2, 0.0, -0.8], [0.2, -0.2, -1.0]]])


def brightest(picture: torch.Tensor) -> torch.Tensor:
    row, column = divmod(int(picture.argmax()), picture.shape[-1])
    return torch.tensor([column + 0.5, row + 0.5])


def test_what_a_mark_carries_is_where_the_mark_is():
    """Larger as it comes nearer; a mark that is not carried moves nothing and is near nothing."""
    moves = moves_of(THERE)
    drawn, before, after = carry(moves, 0)
    old, new = (project_points(p[0, :1], moves.intrinsics[0], moves.here[0])[0] for p in (moves.marks, THERE))
    assert (brightest(drawn[0, 0]) - new[0]).abs().max() <= 1
    assert (brightest(before[0]) - old[0]).abs().max() <= 1 and (brightest(after[0]) - new[0]).abs().max() <= 1
    assert drawn.sum() > 1.3 * moves.pictures.sum()
    drawn, before, after = carry(moves, 1)
    torch.testing.assert_close(drawn, moves.pictures, atol=1e-5, rtol=0)
    assert not before.any() and not after.any()


def test_geometry_alone_copies_a_patch_and_otherwise_leaves_a_still_camera_its_picture():
    moves = moves_of(THERE)
    still = by_geometry(moves._replace(tracks=moves.marks), 2)
    torch.testing.assert_close(still, moves.pictures, atol=1e-4, rtol=0)
    moved = by_geometry(moves, 2)
    new = project_points(THERE[0, :1], moves.intrinsics[0], moves.here[0])[0][0].long()
    assert moved[0, 0, new[1], new[0]] > 0.5 and moves.pictures[0, 0, new[1], new[0]] < 0.1
    assert moved[0, 0, 32, 32] > 0.5, "it does not know what is behind"


@torch.no_grad()
def test_each_candidate_can_be_chosen():
    torch.manual_seed(0)
    net = Compositor(width=8, views=1, points=1, planes=(0.0, 0.1))
    moves = moves_of(THERE)
    candidates, _ = net.candidates(moves)
    weight, bias = net.choice.parameters()
    assert candidates.shape[1] == len(bias)
    torch.testing.assert_close(candidates[:, 0], moves.pictures)
    for k in range(candidates.shape[1]):
        weight.zero_()
        bias.copy_(100.0 * (torch.arange(candidates.shape[1]) == k))
        torch.testing.assert_close(net(moves), candidates[:, k], atol=1e-5, rtol=0)


def test_between_goes_straight_and_arrives(tiny_model):
    o, f = clip_of(tiny_model)
    poses, tracks = between(o, f.camera_to_base, f.points, 4)
    assert poses.shape[1] == tracks.shape[1] == 4 * f.points.shape[1]
    torch.testing.assert_close(tracks[:, 3::4], f.points)
    torch.testing.assert_close(poses[:, 3::4], f.camera_to_base, atol=1e-5, rtol=0)
    torch.testing.assert_close(tracks[:, 1], (o.points[:, -1] + f.points[:, 0]) / 2)


@torch.no_grad()
def test_a_network_without_corrections_of_its_own_follows_the_moved_picture(tiny_model):
    """What comes out is the film itself, where something leads, whatever the layer for other pictures answers."""
    o, f = clip_of(tiny_model)
    one = torch.tensor([[True, True], [False, False]])
    led = give(tiny_model, o, tiny_model.normaliser(o, tiny_model.grid), f, {"camera": one})
    assert led is not None and led.film is not None and led.led().tolist() == one.tolist()
    answer = tiny_model.predict(o, f, "video_prediction", generator=generator(), given={"camera": one})
    torch.testing.assert_close(answer.rgb[0], led.film[0] * 0.5 + 0.5, atol=1e-3, rtol=0)
    newest = o.rgb[:, -1:].float() / 127.5 - 1
    assert (led.film[0] - newest[0]).abs().max() > 0.1
    assert not led.moved[1].any()
    torch.testing.assert_close(led.film[1], newest[1].expand_as(led.film[1]))
    assert (answer.rgb[1] - led.film[1] * 0.5 - 0.5).abs().max() > 0.01


@pytest.fixture(scope="module")
def batch(tiny_dataset) -> Batch:
    clips = ClipDataset(ShardReader(tiny_dataset), ClipSpec(), split="train")
    return collate([clips[i] for i in range(0, len(clips), len(clips) // 8)])


def test_the_compositor_learns_one_batch(tiny_model, batch):
    optimiser = torch.optim.AdamW(tiny_model.compositor.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = composite_loss(tiny_model, batch, {"camera": 1.0, "points": 1.0}, draws(len(batch.key), 3))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for n, p in tiny_model.named_parameters() if not n.startswith("compositor."))


def test_the_compositor_is_asked_only_for_what_is_given(tiny_model, batch):
    def loss(given: dict[str, float]) -> float:
        return composite_loss(tiny_model, batch, given, draws(len(batch.key), 3))["loss"].item()

    assert loss({}) == 0 and loss({"camera": 1.0}) > 0 and loss({"points": 1.0}) > 0
    tiny_model.compositor = None
    with pytest.raises(ConfigError, match=r"synthesis\.compositor is null"):
        loss({"camera": 1.0})


def shifted(seed: int = 5) -> tuple[Observation, Future, torch.Tensor]:
    """Noise seen by two cameras that stand still, and points that go eight pixels to the right in them."""
    spec = ClipSpec()
    rng = np.random.default_rng(seed)
    rgb = torch.from_numpy(rng.integers(0, 255, (2, 1, 2, 3, 64, 64), dtype=np.uint8))
    pose = torch.eye(4).expand(2, 1, 2, 4, 4)
    lens = fov_to_intrinsics(torch.tensor(1.0), 64, 64)
    step = 8 / lens[0, 0].item()
    points = torch.tensor([0.0, 0.0, 1.0]).expand(2, 1, spec.points, 3)
    has: Any = {
        n: torch.ones(2, k, dtype=torch.bool) for n, k in (("has_rgb", 2), ("has_camera", 2), ("has_points", 4))
    }
    blank, absent = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    o = Observation(**{n: has.get(n, absent if n.startswith("has_") else blank) for n in Observation._fields})
    o = o._replace(rgb=rgb, camera_to_base=pose, intrinsics=lens.expand(2, 1, 2, 3, 3), points=points)
    there = (points + torch.tensor([step, 0.0, 0.0])).expand(-1, spec.future, -1, -1)
    later = rgb.roll(8, -1).expand(-1, spec.window, -1, -1, -1, -1)
    f = Future(*([blank] * len(Future._fields)))
    return o, f._replace(rgb=later, camera_to_base=pose.expand(-1, 2, -1, -1, -1), points=there), has["has_points"]


def test_likeness_is_one_where_the_object_went_and_nought_where_it_did_not():
    o, f, has = shifted()
    thing = has & (torch.arange(4) == 0)
    old, new, counts = object_places(thing, o, f)
    assert counts.all()
    torch.testing.assert_close(new - old, torch.tensor([8.0, 0.0]).expand(2, 2, 2), atol=1e-4, rtol=0)
    went, stayed = (likeness(thing, o, f, rgb.float() / 255) for rgb in (f.rgb, o.rgb.expand_as(f.rgb)))
    assert went.weight.sum() == 4
    assert went.total.sum() / 4 > 0.999 and abs(stayed.total.sum() / 4) < 0.2
    # One that hardly moves cannot be told from one that does not.
    assert not likeness(thing, o, f._replace(points=o.points.expand(-1, 2, -1, -1)), f.rgb / 255.0).weight.any()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_of_a_motion_is_the_slope_of_what_is_read(share: float):
    """A reader that sees where a camera is by how bright its picture is, and is wrong by a constant."""
    o, f, _ = shifted()
    o = o._replace(rgb=torch.zeros_like(o.rgb))
    way = torch.tensor([0.2, -0.1, 0.3])
    asked = f.camera_to_base.clone()
    asked[..., :3, 3] += way

    def understand(seen: Observation) -> Understanding:
        pose = seen.camera_to_base[:, -1].clone()
        pose[..., :3, 3] += 0.5 + seen.rgb[:, -1].float().mean((2, 3, 4)).unsqueeze(-1) / 255 * way
        return Understanding(pose, torch.zeros(2, 2), torch.zeros(2, 4, 3), torch.zeros(2, 1, 6))

    found = camera_share(
        understand, o, f._replace(camera_to_base=asked), torch.full_like(f.rgb, share, dtype=torch.float)
    )
    assert found.total.sum() / found.weight.sum() == pytest.approx(share, abs=0.01)


def test_asked_places_are_where_points_and_other_cameras_shall_be():
    o, f, has = shifted()
    points = asked_places(o, f, "points", has & (torch.arange(4) != 3))
    assert points.shape == (2, 8, 2, 6, 2)
    torch.testing.assert_close(points[:, -1, :, :3], torch.tensor([40.0, 32.0]).expand(2, 2, 3, 2), atol=1e-4, rtol=0)
    assert points[..., 3:, :].isnan().all()
    poses = f.camera_to_base.clone()
    poses[:, :, 1, 2, 3] = 0.5  # the second goes ahead of the first
    cameras = asked_places(o, f._replace(camera_to_base=poses), "camera", has)
    torch.testing.assert_close(cameras[:, -1, 0, 5], torch.tensor([32.0, 32.0]).expand(2, 2), atol=1e-4, rtol=0)
    assert cameras[..., :4, :].isnan().all() and cameras[:, :, 0, 4].isnan().all()


def test_rings_lie_around_their_places():
    frames = np.zeros((2, 3, 64, 64), np.float32)
    places = np.full((2, 2, 2), np.nan)
    places[1, 0] = 20.0, 40.0
    shown = ringed(frames, places)
    assert shown.shape == (2, 3, 192, 192) and shown.dtype == np.uint8 and not shown[0].any()
    rows, columns = np.nonzero(shown[1, 0])
    assert abs(rows.mean() + 0.5 - 120) < 1 and abs(columns.mean() + 0.5 - 60) < 1
    assert not shown[1, :, 118:122, 58:62].any()
