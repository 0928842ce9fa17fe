"""Separating what moves from what stands: the truth, the network, its loss, its phase, and its part of the report."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose
from page_checks import check_page
from test_data_variants import SETTINGS

from worldmodel.checkpoint import build_model, load_model, make_spec
from worldmodel.contracts import MOVERS, Batch, ClipSpec, Separation
from worldmodel.curriculum import train
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.generate import generate
from worldmodel.data.shards import ShardReader
from worldmodel.draws import Draws
from worldmodel.encoders.motion import MotionEncoder
from worldmodel.errors import ConfigError, DataError
from worldmodel.evaluation import evaluate_offline
from worldmodel.metrics import MOVED, overlap
from worldmodel.model import WorldModel
from worldmodel.motion_evaluation import frame_difference, has_masks, motion_means
from worldmodel.motion_loss import motion_loss, motion_truth
from worldmodel.phases import make_phases
from worldmodel.report import plain, render
from worldmodel.report_motion import painted
from worldmodel.training import PhaseModule

SIZES: dict[str, Any] = {"width": 16, "channels": [8, 8], "features": 8, "heads": 2, "hidden": 16, "layers": 1}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An episode of each of two splits, with masks."""
    return generate("metaworld", tmp_path_factory.mktemp("motion") / "masked", **SETTINGS, masks=True)


@pytest.fixture(scope="module")
def batch(masked: Path) -> Batch:
    clips = ClipDataset(ShardReader(masked), ClipSpec(), split="train", masks=True)
    return collate([clips[0], clips[len(clips) // 2], clips[len(clips) - 3]])


@pytest.fixture
def scene_model(statistics: dict[str, Any]) -> WorldModel:
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny_scene", *(f"model.motion.{k}={v}" for k, v in SIZES.items()))
    return build_model(config["model"], make_spec(config["data"]["spec"]), statistics)


def head() -> MotionEncoder:
    torch.manual_seed(0)
    return MotionEncoder(**SIZES, views=2, size=(32, 48)).eval()


def clip_of(frames: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rgb = torch.rand(2, frames, 2, 3, 32, 48, generator=generator)
    rays = torch.randn(2, frames, 2, 6, 4, 6, generator=generator)
    return [rgb, rays, torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)]


@pytest.mark.parametrize("frames", [1, 3, 5])
@torch.no_grad()
def test_clips_of_any_length_are_read(frames: int) -> None:
    masks, moves, tracks = head()(*clip_of(frames))
    m = len(MOVERS)
    assert (masks.shape, moves.shape, tracks.shape) == ((2, frames, 2, m, 32, 48), (2, m), (2, frames, m, 3))


@torch.no_grad()
def test_what_is_absent_is_not_read() -> None:
    rgb, rays, seen, known = clip_of(3)
    seen[:, 1] = known[:, 1] = False
    one = head()(rgb, rays, seen, known)
    other = head()(rgb.clone().index_fill_(2, torch.tensor([1]), 0.3), rays.clone()[:, :, [0, 0]], seen, known)
    torch.testing.assert_close(one[0][:, :, 0], other[0][:, :, 0])
    torch.testing.assert_close(one[1:], other[1:])
    assert not torch.allclose(one[2], head()(rgb, rays, seen, torch.zeros_like(known))[2])


def test_each_pixel_belongs_to_one_slot_that_moves() -> None:
    masks = torch.tensor([2.0, 3.0, -1.0]).view(1, 1, 1, 3, 1, 1).expand(1, 2, 1, 3, 4, 4)
    shown = Separation(masks, torch.tensor([[1.0, 1.0, 1.0]]), torch.zeros(1, 2, 3, 3)).shown()
    assert shown[:, :, :, 1].all() and not shown[:, :, :, [0, 2]].any()
    shown = Separation(masks, torch.tensor([[1.0, -1.0, 1.0]]), torch.zeros(1, 2, 3, 3)).shown()
    assert shown[:, :, :, 0].all() and not shown[:, :, :, [1, 2]].any()


def test_a_thing_moves_if_it_gets_far_from_where_it_was(batch: Batch) -> None:
    truth, masks = motion_truth(batch, 4), batch.masks
    assert masks is not None and truth.masks.shape == (3, 5, 2, 3, 64, 64)
    assert torch.equal(truth.seen[-1].all(-1), torch.tensor([True] * 3 + [False] * 2))
    places = {name: masks.elements.index(name) for name in ("robot", "gripper", "object")}
    drawer = torch.cat([batch.observation.points, batch.future.points], 1)[:, :, 0]
    assert torch.equal(truth.tracks[:, :, 1], drawer)
    far = (drawer - drawer[:, :1]).norm(dim=-1).amax(1) > MOVED
    assert torch.equal(truth.moves[:, 1], far) and far.any() and not far.all()
    assert not truth.moves[:, 2].any() and not truth.known[..., 2].any()
    pixels = torch.cat([masks.history, masks.future[:, 3::4]], 1)
    for b in range(3):
        shown = pixels[b] == places["object"]
        assert torch.equal(truth.masks[b, :, :, 1], shown if far[b] else torch.zeros_like(shown))
        arm = (pixels[b] == places["robot"]) | (pixels[b] == places["gripper"])
        assert torch.equal(truth.masks[b, :, :, 0], arm & truth.moves[b, 0])
    with pytest.raises(DataError, match="masks=True"):
        motion_truth(batch._replace(masks=None), 4)


def test_the_loss_falls_to_nothing_at_the_truth(
    scene_model: WorldModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = motion_truth(batch, 4)

    def loss(sign: float, away: float) -> dict[str, float]:
        answer = Separation(
            sign * 30 * (2 * truth.masks.float() - 1), sign * 30 * (2 * truth.moves.float() - 1), truth.tracks + away
        )
        monkeypatch.setattr(scene_model, "separate", lambda *given: answer)
        return {
            name: value.item()
            for name, value in motion_loss(scene_model, batch, {}, Draws(0, range(len(batch.key)))).items()
        }

    right, wrong = loss(1, 0), loss(-1, 0.1)
    assert all(abs(value) < 1e-5 for value in right.values())
    assert wrong["masks"] > 10 and wrong["dice"] > 0.5 and wrong["moves"] > 10
    assert math.isclose(wrong["tracks"], 0.2, rel_tol=1e-4)  # 0.1 m at a standard deviation of 0.5


def test_it_learns_one_batch(scene_model: WorldModel, batch: Batch) -> None:
    assert scene_model.motion is not None
    optimiser = torch.optim.AdamW(scene_model.motion.parameters(), lr=1e-2)
    losses = []
    for step in range(25):
        loss = motion_loss(scene_model, batch, {"camera": 0.3}, Draws(step, range(len(batch.key))))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for p in scene_model.encoder.parameters())


def test_overlap_counts_what_both_and_either_show() -> None:
    found, true = torch.zeros(2, 1, 2, 4, 4, dtype=torch.bool), torch.zeros(2, 1, 2, 4, 4, dtype=torch.bool)
    found[0, 0, 0, :2], true[0, 0, 0, 1:3], true[0, 0, 1] = True, True, True
    sums = overlap(found, true, torch.tensor([[[True, False]], [[True, True]]]))
    assert sums.total.tolist() == [[4.0], [0.0]] and sums.weight.tolist() == [[12.0], [0.0]]


def test_baselines_are_fitted_to_training_clips(masked: Path, batch: Batch) -> None:
    means = motion_means(ShardReader(masked), ClipSpec())
    assert means.moves.tolist()[0] and not means.moves.tolist()[2] and 0 < means.share < 1
    assert (means.shares[:, 2] == 0).all() and means.shares[1, 0].max() > 0.5
    still = batch._replace(
        observation=batch.observation._replace(rgb=batch.observation.rgb[:, :1].expand_as(batch.observation.rgb)),
        future=batch.future._replace(rgb=batch.observation.rgb[:, :1].expand_as(batch.future.rgb)),
    )
    assert not frame_difference(still, 4).any() and frame_difference(batch, 4).max() > 50


def test_a_phase_needs_the_head_that_it_trains(tiny_model: WorldModel) -> None:
    (phase,) = make_phases(compose("experiment=kairos_tiny_scene")["phases"])
    with pytest.raises(ConfigError, match=r"trains 'motion', which this model has not"):
        PhaseModule(model=tiny_model, phase=phase, seed=0)
    with pytest.raises(ConfigError, match="kairos_tiny_scene"):
        tiny_model.separate(None)  # pyright: ignore[reportArgumentType]


def test_a_trained_head_is_evaluated_and_shown(masked: Path, tmp_path: Path) -> None:
    overrides = [f"model.motion.{name}={value}" for name, value in SIZES.items()]
    overrides += [f"data.root={masked}", f"run_dir={tmp_path / 'run'}", "init=null", "wandb.mode=disabled"]
    overrides += ["trainer.threads=1", "phases.motion.steps=3", "phases.motion.batch_size=2"]
    model = load_model(train(compose("experiment=kairos_tiny_scene", *overrides)))
    reader = ShardReader(masked)
    result = evaluate_offline(model, reader, "heldout_episodes", clips_per_episode=2, sampler_steps=1)
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert {"moving_iou", "moving_iou/wrist", "slot_iou/object", "slot_track/robot", "slot_moves/robot"} <= set(figures)
    assert "slot_iou/object2" not in figures
    assert {b["name"] for b in figures["moving_iou"]["baselines"]} == {"frame difference", "mean mask"}
    (overlay,) = result["overlays"]
    assert overlay.found.shape == overlay.true.shape == (5, 2, 3, 64, 64) and overlay.true.any()
    results = {"title": "run", "stamp": {}, "offline": [result], "closed_loop": []}
    page = render(results)
    check_page(page)
    assert "Moving and standing" in page and page.count("data:image/png") == 1 and "overlays" not in plain(result)


def test_overlays_colour_what_masks_cover() -> None:
    frames, masks = np.full((2, 3, 4, 4), 100, np.uint8), np.zeros((2, 3, 4, 4), bool)
    masks[:, 1, :2] = True
    picture = painted(frames, masks)
    assert (picture[:, 2:] == 100).all() and (picture[:, :2] != 100).any() and picture.shape == (2, 4, 4, 3)


def test_data_without_masks_have_nothing_to_score(tiny_dataset: Path, masked: Path) -> None:
    assert has_masks(ShardReader(masked), "train") and not has_masks(ShardReader(tiny_dataset), "train")
