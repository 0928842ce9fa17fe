"""Buckets: sizes of batches, cameras of resized pictures, the order of the stream, a model at several sizes."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import made_up_dataset
from test_data_position import FakeTrainer
from test_model import draws

from worldmodel.contracts import ClipSpec
from worldmodel.data.buckets import Bucket, TokenCounts, batch_sizes, cover
from worldmodel.data.clip import collate
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.data.dataset import ClipDataset, Request
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError
from worldmodel.geometry import project_points
from worldmodel.losses import world_loss
from worldmodel.nn import at_grid
from worldmodel.phases import Phase, make_phases
from worldmodel.sized import sized, token_counts

COUNTS = TokenCounts(views=1, cell=16, multiple=32, others=0, history=3)
BUCKETS = tuple(
    Bucket(height=h, width=w, future=f) for h, w, f in ((256, 256, 20), (480, 832, 20), (704, 1280, 20), (256, 448, 60))
)
SPEC = ClipSpec(cameras=("front",), embodiments=("toy",), height=16, width=16, action=4, proprio=4, future=1)


def test_batches_of_all_buckets_have_about_as_many_tokens() -> None:
    """At most those of the largest clips, and less than one more row below it."""
    sizes = batch_sizes(8, COUNTS, BUCKETS, chunks=1, pictures=True)
    assert len(sizes) == 2 * len(BUCKETS)
    tokens = {key: COUNTS.picture(key[0]) if key[1] else COUNTS.clip(key[0]) for key in sizes}
    largest = max(tokens, key=lambda key: tokens[key])
    assert sizes[largest] == 8 and largest[0].height == 704
    budget = 8 * tokens[largest]
    for key, rows in sizes.items():
        assert budget - tokens[key] < rows * tokens[key] <= budget
    assert min(rows * tokens[key] for key, rows in sizes.items()) > 0.9 * budget
    twice = batch_sizes(8, COUNTS, BUCKETS, chunks=2, pictures=True)
    assert all(abs(twice[key] - (2 if key[1] else 1) * rows) <= 1 for key, rows in sizes.items())


def test_a_bucket_that_does_not_come_out_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"720 × 1280 pixels: .* multiples of 32"):
        COUNTS.clip(Bucket(height=720, width=1280, future=20))
    with pytest.raises(ConfigError, match="sizes are 1 or more"):
        Bucket(height=0, width=32, future=1)


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (96, 48), (20, 30), (64, 80)])
def test_points_are_seen_at_the_same_place_of_resized_pictures(size: tuple[int, int]) -> None:
    """A blob drawn where a camera projects a point lies where the camera of the resized picture projects it."""
    lens = torch.tensor([[60.0, 0, 41], [0, 58, 30], [0, 0, 1]])
    points = torch.tensor([[0.05, -0.03, 1.0], [-0.1, 0.08, 1.2]])
    places, _ = project_points(points, lens, torch.eye(4))
    y, x = np.mgrid[:64, :80] + 0.5
    blobs = [np.exp(-((x - float(px)) ** 2 + (y - float(py)) ** 2) / 18.0) for px, py in places]
    pictures = np.repeat((255 * np.stack(blobs))[:, None], 3, 1).round().astype(np.uint8)
    seen, matrix = cover(pictures, size)
    assert seen.shape == (2, 3, *size) and seen.dtype == np.uint8
    where, _ = project_points(points, torch.from_numpy(matrix) @ lens, torch.eye(4))
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    for blob, (px, py) in zip(seen[:, 0].astype(np.float64), where, strict=True):
        weight = blob / blob.sum()
        assert (weight * columns).sum() == pytest.approx(float(px), abs=0.1)
        assert (weight * rows).sum() == pytest.approx(float(py), abs=0.1)


def test_pictures_of_the_right_size_stay_as_they_are() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 24), np.uint8)
    seen, matrix = cover(pictures, (16, 24))
    np.testing.assert_array_equal(seen, pictures)
    np.testing.assert_array_equal(matrix, np.eye(3))
    cut, matrix = cover(pictures, (16, 16))
    np.testing.assert_array_equal(cut, pictures[..., 4:20])
    np.testing.assert_array_equal(matrix, [[1, 0, -4], [0, 1, 0], [0, 0, 1]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_dataset(tmp_path_factory.mktemp("buckets") / "data", {("toy", "lift"): 3}, length=9)


def test_clips_of_a_bucket_have_its_sizes_and_all_else_unchanged(tiny_dataset: Path) -> None:
    bucket = Bucket(height=32, width=48, future=1)
    clips = ClipDataset(ShardReader(tiny_dataset), ClipSpec(), split="train")
    plain, other = collate([clips[7]]), collate([clips[Request(7, bucket=bucket)]])
    assert other.observation.rgb.shape == (1, 3, 2, 3, 32, 48)
    assert other.future.rgb.shape == (1, 4, 2, 3, 32, 48)
    assert torch.equal(other.future.points, plain.future.points[:, :1])
    assert torch.equal(other.observation.camera_to_base, plain.observation.camera_to_base)
    assert torch.equal(other.future.actions, plain.future.actions)
    # 64 × 64 becomes 48 × 48, of which 8 rows are cut off above and below.
    matrix = torch.tensor([[0.75, 0, 0], [0, 0.75, -8], [0, 0, 1]])
    torch.testing.assert_close(other.observation.intrinsics, matrix @ plain.observation.intrinsics)
    ahead = collate([clips[Request(7, ahead=1, bucket=bucket)]])
    assert torch.equal(ahead.future.points[:, 0], plain.future.points[:, 1])


def test_without_a_bucket_pictures_of_another_size_are_refused(root: Path) -> None:
    clips = ClipDataset(ShardReader(root), replace(SPEC, height=32, width=32), split="train")
    with pytest.raises(DataError, match="or give the phase buckets"):
        clips[0]
    shown = collate([clips[Request(0, bucket=Bucket(height=8, width=16, future=1))]])
    assert shown.observation.rgb.shape[-2:] == (8, 16)


def phase(**settings: Any) -> Phase:
    values = {"objective": "world", "trains": ["denoiser"], "steps": 9, "batch_size": 2, "learning_rate": 1e-3}
    mixture = [{"mode": "video_prediction", "weight": 0.9}, {"mode": "image", "weight": 0.1}]
    buckets = [{"height": 16, "width": 16, "future": 2}, {"height": 32, "width": 16, "future": 2, "weight": 3}]
    return make_phases({"physical": {**values, "mixture": mixture, "buckets": buckets, **settings}})[0]


def test_buckets_and_pictures_come_as_often_as_they_should_and_the_same_on_every_rank() -> None:
    own, again = phase(), phase()
    sizes = own.batch_sizes(replace(COUNTS, cell=8, multiple=8))
    needs = [own.needs(5, step, sizes=sizes) for step in range(3000)]
    assert needs[::100] == [again.needs(5, step, sizes=sizes) for step in range(0, 3000, 100)]
    assert np.mean([n.bucket == own.buckets[1] for n in needs]) == pytest.approx(0.75, abs=0.03)
    pictures = [not n.future for n in needs]
    assert np.mean(pictures) == pytest.approx(0.1, abs=0.02)
    assert {n.history for n, alone in zip(needs, pictures, strict=True) if alone} == {1}
    assert all(n.clips == sizes[n.bucket, alone] for n, alone in zip(needs, pictures, strict=True) if n.bucket)
    other = [n.bucket for n in (own.needs(6, step, sizes=sizes) for step in range(3000))]
    assert other != [n.bucket for n in needs]


def test_mistakes_about_buckets_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown field 'frames'; a bucket has height, width, future, weight"):
        phase(buckets=[{"height": 16, "width": 16, "frames": 2}])
    with pytest.raises(ConfigError, match="leave `rows` out of the mixture"):
        phase(mixture=[{"mode": "joint", "weight": 1.0, "rows": 2}])
    with pytest.raises(ConfigError, match="buckets belong to objectives `world` and `distill`"):
        phase(objective="understanding", mixture=[])
    with pytest.raises(ConfigError, match="leave `drop` out"):
        phase(mixture=[{"mode": "image", "weight": 1.0, "drop": ["points"]}])
    with pytest.raises(ConfigError, match="no bucket has a weight above 0"):
        phase(buckets=[{"height": 16, "width": 16, "future": 2, "weight": 0}])


def module(root: Path, rank: int = 0, ranks: int = 1, batch_size: int = 2, seed: int = 5) -> ClipDataModule:
    mixture = [{"mode": "video_prediction", "weight": 1.0}, {"mode": "image", "weight": 1.0}]
    own = phase(batch_size=batch_size, mixture=mixture)
    sizes = own.batch_sizes(replace(COUNTS, cell=8, multiple=8))
    data = ClipDataModule(
        root=str(root),
        spec=SPEC,
        batch_size=batch_size,
        seed=seed,
        needs=lambda number: own.needs(seed, number, sizes=sizes),
        clips=list(sizes.values()),
    )
    data.trainer = FakeTrainer(rank, ranks)  # type: ignore[assignment]
    return data


def read(data: ClipDataModule, count: int) -> list[Any]:
    batches = []
    for batch in itertools.islice(data.train_dataloader(), count):
        batches.append(batch)
        data.trainer.progress.processed += 1  # type: ignore[union-attr]
    return batches


@pytest.mark.parametrize("stop", [1, 6])
def test_batches_of_buckets_resume_exactly_and_draw_every_clip_once(root: Path, stop: int) -> None:
    whole = read(module(root), 12)
    first = module(root)
    keys = [batch.key for batch in read(first, stop)]
    second = module(root)
    second.load_state_dict(first.state_dict())
    keys += [batch.key for batch in read(second, 12 - stop)]
    assert keys == [batch.key for batch in whole]
    assert len({batch.observation.rgb.shape[-2:] for batch in whole}) == 2
    clips = len(module(root).train_clips)
    drawn = [key for batch in whole for key in batch.key]
    assert len(drawn) > clips and len(set(drawn[:clips])) == clips
    # Rows whose future is not loaded are pictures, of which there are more.
    assert len({len(batch.key) for batch in whole}) >= 3


def test_ranks_share_bucket_and_stream_and_may_change_where_the_sizes_scale(root: Path) -> None:
    two = [module(root, rank, 2) for rank in (0, 1)]
    parts = [read(data, 5) for data in two]
    for a, b in zip(*parts, strict=True):
        assert a.observation.rgb.shape == b.observation.rgb.shape
    one = module(root, batch_size=4)
    whole = [batch.key for batch in read(module(root, batch_size=4), 9)]
    assert [a.key + b.key for a, b in zip(*parts, strict=True)] == whole[:5]
    one.load_state_dict(two[0].state_dict())
    assert [batch.key for batch in read(one, 4)] == whole[5:]
    state = two[0].state_dict()
    state["clips"] = [state["clips"][0] + 1, *state["clips"][1:]]
    with pytest.raises(ConfigError, match=r"clips of all ranks in the batches of each bucket: .* resume on 2 ranks"):
        module(root, batch_size=4).load_state_dict(state)


def test_a_model_at_another_size_is_the_model_built_for_it(statistics, tiny_dataset: Path) -> None:
    """Same weights, same losses; afterwards it is as it was."""
    from conftest import compose

    from worldmodel.checkpoint import build_model, make_spec

    size = ("data.spec.height=32", "data.spec.width=64", "data.spec.future=1", "synthesis.denoiser.latent_size=[4,8]")
    models = []
    for more in ((), size):
        torch.manual_seed(0)
        config = compose("experiment=kairos_tiny", "synthesis.autoencoder.config.resolution=64", *more)
        models.append(build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval())
    model, other = models
    position = "encoder.image.position"
    weights = model.state_dict() | {position: at_grid(model.encoder.image.position.detach(), (4, 4), (2, 4))}
    bucket = Bucket(height=32, width=64, future=1)
    clips = ClipDataset(ShardReader(tiny_dataset), model.spec, split="train")
    batch = collate([clips[Request(i, bucket=bucket)] for i in (3, 9)])
    other.load_state_dict(weights)
    settings: dict[str, Any] = {"drop": (), "dropout": {}, "draws": 1, "weights": {}, "insulate": False, "huber": 0.1}
    settings |= {"given": {"camera": 0.5, "points": 0.5}, "absent": 0.1, "mode": "joint"}
    before = (model.spec, model.grid, model.denoiser.counts)
    losses = []
    for one in models:
        with torch.no_grad(), sized(one, batch):
            assert one.grid == (4, 8)
            latents = one.history_latents(batch.observation)
            losses.append(world_loss(one, batch, latents, draws(), **settings))
    # Noise levels that no row drew have no loss.
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0, equal_nan=True)
    assert (model.spec, model.grid, model.denoiser.counts) == before
    counts = token_counts(model)
    tokens = other.denoiser.counts
    assert counts.clip(bucket) == (other.spec.history + 1) * sum(tokens.values())
