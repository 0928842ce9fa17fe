"""Errors against hand-computed values, masks, baselines, and intervals over episodes."""

import math

import pytest
import torch

from worldmodel import metrics
from worldmodel.contracts import Observation
from worldmodel.errors import ContractError
from worldmodel.metrics import Sums

torch.set_num_threads(1)


def pooled(sums: Sums, decibel: bool = False) -> list[float]:
    return metrics.pooled(sums, decibel).tolist()


def rotation(axis: int, degrees: float) -> torch.Tensor:
    a, (i, j) = math.radians(degrees), [(1, 2), (2, 0), (0, 1)][axis]
    r = torch.eye(3)
    r[i, i] = r[j, j] = math.cos(a)
    r[i, j], r[j, i] = -math.sin(a), math.sin(a)
    return r


def posed(rotations: torch.Tensor) -> torch.Tensor:
    poses = torch.eye(4).repeat(*rotations.shape[:-2], 1, 1)
    poses[..., :3, :3] = rotations
    return poses


def random_rotations(count: int) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(count, 3, 3, generator=torch.Generator().manual_seed(1)))
    return q * torch.linalg.det(q)[:, None, None]


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 4, 1, 3, 16, 16)
    sums = metrics.squared_error(target + 0.1, target, torch.ones(2, 4, 1, dtype=torch.bool))
    assert pooled(sums, decibel=True) == pytest.approx([20.0] * 4, abs=1e-4)


def test_psnr_pools_errors_and_survives_equal_frames() -> None:
    target = torch.zeros(2, 1, 1, 3, 12, 12)
    predicted = target.clone()
    predicted[0] += 0.2  # mean squared errors 0.04 and 0, pooled 0.02
    sums = metrics.squared_error(predicted, target, torch.ones(2, 1, 1, dtype=torch.bool))
    assert pooled(sums, decibel=True) == pytest.approx([-10 * math.log10(0.02)], abs=1e-4)


def test_ssim_equals_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 2, 2, 3, 24, 20, generator=generator)
    predicted = (target + 0.2 * torch.randn(target.shape, generator=generator)).clamp(0, 1)
    sums = metrics.ssim(predicted, target, torch.ones(3, 2, 2, dtype=torch.bool))
    theirs = structural_similarity_index_measure(
        predicted.flatten(0, 2), target.flatten(0, 2), data_range=1.0, reduction="none"
    )
    assert isinstance(theirs, torch.Tensor)
    assert torch.allclose(sums.total.float(), theirs.view(3, 2, 2).sum(-1), atol=1e-4)
    assert pooled(metrics.ssim(target, target, torch.ones(3, 2, 2, dtype=torch.bool))) == pytest.approx(
        [1, 1], abs=1e-4
    )


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(ContractError, match="at least 11x11"):
        metrics.ssim(torch.zeros(1, 1, 1, 3, 8, 16), torch.zeros(1, 1, 1, 3, 8, 16), torch.ones(1, 1, 1).bool())


@pytest.mark.parametrize("degrees", [0.0, 0.01, 30.0, 90.0, 179.5, 180.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_error_is_the_angle(axis: int, degrees: float) -> None:
    assert metrics.rotation_error(posed(torch.eye(3)), posed(rotation(axis, degrees))).item() == pytest.approx(
        degrees, abs=1e-3
    )


def test_rotation_error_is_symmetric_and_invariant_to_a_common_turn() -> None:
    a, b, c = posed(random_rotations(30)).view(3, 10, 4, 4)
    error = metrics.rotation_error(a, b)
    assert torch.allclose(error, metrics.rotation_error(b, a), atol=1e-3)
    assert torch.allclose(error, metrics.rotation_error(c @ a, c @ b), atol=1e-3)
    assert torch.allclose(error, metrics.rotation_error(a @ c, b @ c), atol=1e-3)


def test_translation_error_is_the_distance() -> None:
    a, b = torch.eye(4), torch.eye(4)
    b[:3, 3] = torch.tensor([0.3, 0.0, 0.4])
    assert metrics.translation_error(a, b).item() == pytest.approx(0.5)


def test_trajectory_errors_count_only_points_and_frames_in_the_mask() -> None:
    target = torch.zeros(1, 2, 3, 3)
    predicted = target.clone()
    predicted[0, 0, 0, 0], predicted[0, 1, 0, 0] = 0.1, 0.3
    predicted[0, :, 1] = float("nan")  # absent
    predicted[0, 1, 2] = 9.0  # past the end
    mask = torch.tensor([[[True, False, True], [True, False, False]]])
    assert pooled(metrics.trajectory_error(predicted, target, mask)) == pytest.approx([0.05, 0.3])
    final = metrics.trajectory_error(predicted, target, metrics.last_valid(mask))
    assert (final.total.sum() / final.weight.sum()).item() == pytest.approx(0.15)  # 0.3 and 0


def test_moving_points() -> None:
    history, future = torch.zeros(1, 3, 2, 3), torch.zeros(1, 2, 2, 3)
    future[0, 0, 1, 2] = 0.02
    assert metrics.moving(history, future).tolist() == [[False, True]]


def test_force_and_torque_are_apart() -> None:
    target = torch.zeros(1, 1, 2, 6)
    predicted = target + torch.tensor([3.0, 0, 0, 0, 0, 0.6])
    predicted[0, 0, 1] = 100.0
    mask = torch.tensor([[[True, False]]])
    assert pooled(metrics.wrench_error(predicted, target, mask)) == pytest.approx([1.0])
    assert pooled(metrics.wrench_error(predicted, target, mask, torque=True)) == pytest.approx([0.2])


def test_action_error_ignores_padding_and_steps_past_the_end() -> None:
    target = torch.zeros(1, 2, 3)
    predicted = torch.tensor([[[1.0, 2.0, 50.0], [70.0, 70.0, 70.0]]])
    sums = metrics.action_error(predicted, target, torch.tensor([[True, False]]), torch.tensor([[True, True, False]]))
    assert sums.total.tolist() == [[3.0, 0.0]]
    assert sums.weight.tolist() == [[2.0, 0.0]]
    assert pooled(sums)[0] == 1.5


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_masked_values_never_count(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator) > 0.5
    spoiled = torch.where(mask, values, float("inf"))
    clean, dirty = metrics.masked_sums(values, mask), metrics.masked_sums(spoiled, mask)
    assert torch.equal(clean.total, dirty.total)
    assert clean.weight.sum() == mask.sum()
    assert clean.total.shape == shape[:2]


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(ContractError, match="one shape"):
        metrics.masked_sums(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))


def test_copy_last_frame_repeats_the_newest() -> None:
    rgb = torch.zeros(1, 3, 1, 3, 4, 4, dtype=torch.uint8)
    rgb[:, -1] = 255
    observation = Observation(rgb, *[torch.zeros(1)] * (len(Observation._fields) - 1))
    still = metrics.copy_last_frame(observation, 8)
    assert still.shape == (1, 8, 1, 3, 4, 4)
    assert (still == 1).all()


def test_hold_pose_keeps_only_the_gripper() -> None:
    held = metrics.hold_pose(torch.tensor([[0.5, -0.5, 0.1, 1.0]]), torch.tensor([False, False, False, True]), 2)
    assert held.tolist() == [[[0, 0, 0, 1], [0, 0, 0, 1]]]


def test_chordal_mean_lies_between_and_is_a_rotation() -> None:
    mean = metrics.chordal_mean(torch.stack((rotation(2, 10), rotation(2, 50))))
    assert torch.allclose(mean, rotation(2, 30), atol=1e-6)
    mean = metrics.chordal_mean(random_rotations(5))
    assert torch.allclose(mean @ mean.T, torch.eye(3), atol=1e-5)
    assert torch.linalg.det(mean).item() == pytest.approx(1, abs=1e-5)


def test_bootstrap_draws_episodes_not_clips() -> None:
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(20, generator=generator).repeat_interleave(10)  # ten equal clips an episode
    sums = Sums(level[:, None].double(), torch.ones(200, 1, dtype=torch.float64))

    def width(episodes: list[str]) -> float:
        value, low, high = metrics.summary(metrics.bootstrap(sums, *metrics.resampling_counts(episodes, seed=0)))
        assert low < value < high
        return high - low

    ratio = width([str(i // 10) for i in range(200)]) / width([str(i) for i in range(200)])
    assert ratio == pytest.approx(math.sqrt(10), rel=0.2)


def test_bootstrap_is_seeded_and_collapses_for_one_episode() -> None:
    sums = Sums(torch.rand(4, 2).double(), torch.ones(4, 2, dtype=torch.float64))
    first, again = (metrics.bootstrap(sums, *metrics.resampling_counts(list("abca"), seed=3)) for _ in range(2))
    assert torch.equal(first, again)
    value, low, high = metrics.summary(metrics.bootstrap(sums, *metrics.resampling_counts(["a"] * 4, seed=3)))
    assert value == pytest.approx(low) == pytest.approx(high)


def test_bootstrap_pools_by_weight_and_leaves_out_empty_draws() -> None:
    sums = Sums(torch.tensor([[6.0], [0.0]]).double(), torch.tensor([[3.0], [0.0]]).double())
    value, low, high = metrics.summary(metrics.bootstrap(sums, *metrics.resampling_counts(["a", "b"], seed=0)))
    assert (value, low, high) == (2.0, 2.0, 2.0)


def test_nothing_measured_is_not_a_number() -> None:
    sums = Sums(torch.zeros(2, 1).double(), torch.zeros(2, 1).double())
    assert all(map(math.isnan, metrics.summary(metrics.bootstrap(sums, *metrics.resampling_counts(["a", "b"], 0)))))


def test_rows_name_their_baselines() -> None:
    rows = metrics.Rows()
    rows.add(Sums(torch.ones(2, 3), torch.ones(2, 3)), copy_last_frame=Sums(torch.zeros(2, 3), torch.ones(2, 3)))
    assert list(rows.baselines) == ["copy last frame"]
    assert metrics.joined(rows.ours * 2).total.shape == (4, 3)
