"""LeRobot's interface over an exported policy: same actions as the policy itself, rows apart, chunks that join."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import SPEC
from server_fakes import made_up_artefact

from export.lerobot import LeRobotPolicy, soft_mask
from export.runtime import OnnxPolicy, RuntimeContractError

torch.set_num_threads(1)

ROWS = 2


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_artefact(tmp_path_factory.mktemp("artefacts") / "fake")


def batch(seed: int, rows: int = ROWS) -> dict[str, Any]:
    """As LeRobot's environments and datasets give it."""
    random = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {
        f"observation.images.{camera}": torch.randint(0, 256, (rows, 3, 8, 8), generator=random) / 255
        for camera in SPEC.cameras
    }
    return result | {
        "observation.state": torch.randn(rows, 5, generator=random),
        "observation.wrench": torch.randn(rows, 3, 6, generator=random),
        "observation.tactile": torch.randn(rows, 3, 2, 2, 2, generator=random),
        "task": [f"task {i}" for i in range(rows)],
        "timestamp": torch.zeros(rows),
        "action": torch.zeros(rows, 4),
    }


def ours(batch: dict[str, Any], row: int) -> dict[str, Any]:
    observation: dict[str, Any] = {
        f"rgb.{camera}": (batch[f"observation.images.{camera}"][row] * 255).round().byte().permute(1, 2, 0).numpy()
        for camera in SPEC.cameras
    }
    return observation | {
        "proprio": batch["observation.state"][row].numpy(),
        "wrench": batch["observation.wrench"][row].numpy(),
        "taxels": batch["observation.tactile"][row].numpy(),
        "instruction": batch["task"][row],
    }


def test_select_action_hands_out_chunks_and_observes_every_step(artefact: Path) -> None:
    adapter = LeRobotPolicy(OnnxPolicy(artefact), action_steps=3)
    rows = [OnnxPolicy(artefact) for _ in range(ROWS)]
    for _ in range(2):
        for policy in rows:
            policy.reset()
        adapter.reset()
        chunks = np.zeros((ROWS, 0, 4))
        for step in range(10):
            one = batch(step)
            for i, policy in enumerate(rows):
                policy.observe(ours(one, i))
            if step % 3 == 0:
                chunks = np.stack([policy.act() for policy in rows])
            action = adapter.select_action(one)
            assert isinstance(action, torch.Tensor) and action.dtype == torch.float32
            np.testing.assert_array_equal(action.numpy(), chunks[:, step % 3])


def test_arrays_give_arrays_and_other_names_are_mapped(artefact: Path) -> None:
    adapter = LeRobotPolicy(OnnxPolicy(artefact), action_steps=1, names={"observation.images.cam_high": "rgb.front"})
    plain = LeRobotPolicy(OnnxPolicy(artefact), action_steps=1)
    one = batch(0)
    arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in one.items()}
    arrays["observation.images.cam_high"] = (arrays.pop("observation.images.front") * 255).round().astype(np.uint8)
    action = adapter.select_action(arrays)
    assert isinstance(action, np.ndarray)
    np.testing.assert_array_equal(action, plain.select_action(one).numpy())


def test_chunks_join_what_is_left_of_the_previous_one(artefact: Path) -> None:
    adapter, plain = (LeRobotPolicy(OnnxPolicy(artefact), action_steps=1) for _ in range(2))
    previous = adapter.predict_action_chunk(batch(0))
    assert previous.shape == (ROWS, SPEC.chunk, 4)
    np.testing.assert_array_equal(previous.numpy(), plain.predict_action_chunk(batch(0)).numpy())
    left = previous[:, 3:]
    joined = adapter.predict_action_chunk(batch(1), inference_delay=2, prev_chunk_left_over=left).numpy()
    free = plain.predict_action_chunk(batch(1)).numpy()
    overlap = left.shape[1]
    np.testing.assert_array_equal(joined[:, :2], left[:, :2])
    np.testing.assert_array_equal(joined[:, overlap:], free[:, overlap:])
    weights = soft_mask(2, overlap)[:, None]
    np.testing.assert_allclose(
        joined[:, :overlap], weights * left.numpy() + (1 - weights) * free[:, :overlap], atol=1e-6
    )
    # Unbatched, as LeRobot's queue keeps it; and an observation that was already told.
    one = LeRobotPolicy(OnnxPolicy(artefact), action_steps=1)
    one.observe(batch(1, rows=1))
    chunk = one.predict_action_chunk(None, inference_delay=1, prev_chunk_left_over=left[0])
    np.testing.assert_array_equal(chunk[0, 0], left[0, 0])


def test_soft_mask_keeps_then_falls_to_nothing() -> None:
    weights = soft_mask(3, 8)
    assert weights[:3].tolist() == [1, 1, 1] and (np.diff(weights[2:]) < 0).all() and weights[-1] > 0
    # c = 1/2 half way: (exp(1/2) - 1) / 2 / (e - 1).
    np.testing.assert_allclose(soft_mask(0, 3)[1], 0.5 * (np.exp(0.5) - 1) / (np.e - 1), rtol=1e-6)
    assert soft_mask(0, 0).shape == (0,) and soft_mask(4, 4).tolist() == [1] * 4


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "camera": ({"observation.images.top": torch.zeros(ROWS, 3, 8, 8)}, r"rgb\.top: unknown"),
    "picture size": ({"observation.images.front": torch.zeros(ROWS, 3, 9, 8)}, r"rgb\.front: got uint8 \[9, 8, 3\]"),
    "picture axes": ({"observation.images.front": torch.zeros(ROWS, 8, 8, 3)}, "expected \\[rows, 3, height, width"),
    "picture range": ({"observation.images.front": torch.full((ROWS, 3, 8, 8), 2.0)}, "outside 0..1"),
    "picture not a number": ({"observation.images.front": torch.full((ROWS, 3, 8, 8), torch.nan)}, "outside 0..1"),
    "rows": ({"observation.state": torch.zeros(3, 5)}, "rows .*'proprio': 3"),
    "one number": ({"observation.state": torch.tensor(1.0)}, "single number"),
    "tasks": ({"task": ["a"]}, "rows .*'instruction': 1"),
    "state": ({"observation.state": torch.full((ROWS, 5), torch.inf)}, "proprio: non-finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_are_refused_by_name(artefact: Path, case: str) -> None:
    values, message = BAD[case]
    with pytest.raises(RuntimeContractError, match=message):
        LeRobotPolicy(OnnxPolicy(artefact), action_steps=1).select_action(batch(0) | values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inference_delay": 9}, "inference_delay: got 9, expected 0 to 8"),
        ({"inference_delay": 1}, "0 actions, expected at least inference_delay, 1"),
        ({"prev_chunk_left_over": np.zeros((3, 2, 4))}, r"got \[3, 2, 4\], expected \[2, n, 4\]"),
        ({"prev_chunk_left_over": np.zeros((2, 2, 5))}, r"got \[2, 2, 5\], expected \[2, n, 4\]"),
        ({"prev_chunk_left_over": np.full((2, 4), np.nan)}, "non-finite"),
    ],
)
def test_bad_left_overs_are_refused(artefact: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeContractError, match=message):
        LeRobotPolicy(OnnxPolicy(artefact), action_steps=1).predict_action_chunk(batch(0), **arguments)


def test_bad_arguments_are_refused(artefact: Path) -> None:
    with pytest.raises(RuntimeContractError, match="action_steps: got 9, expected 1 to 8"):
        LeRobotPolicy(OnnxPolicy(artefact), action_steps=9)
    with pytest.raises(RuntimeContractError, match="nothing has been observed"):
        LeRobotPolicy(OnnxPolicy(artefact), action_steps=1).predict_action_chunk(None)
