"""Fixtures that several test files use."""

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("LP_NUM_THREADS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from worldmodel.data.generate import generate

torch.set_num_threads(1)

TINY_TASKS = ["drawer-close-v3", "button-press-topdown-v3", "drawer-open-v3"]
TINY_COUNTS: dict[str, Any] = {"episodes": 2, "heldout_episodes": 1, "heldout_task_episodes": 1}


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven episodes of two training tasks and a held-out one; treat it as read-only."""
    out = tmp_path_factory.mktemp("tiny") / "dataset"
    return generate("metaworld", out, tasks=TINY_TASKS, **TINY_COUNTS, workers=1, progress=False)


def compose(*overrides: str) -> dict[str, Any]:
    """A resolved training configuration."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from worldmodel.config import register_resolvers

    register_resolvers()
    with initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base="1.3"):
        config = OmegaConf.to_container(hydra_compose("train", list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


@pytest.fixture(scope="session")
def statistics() -> dict[str, Any]:
    """Statistics that change nothing but scale, of the sizes of the tiny experiment."""
    sizes = {"proprio": 18, "action": 4, "points": 3, "camera_translation": 3, "wrench": 18, "taxels": 3}
    fields = {name: {"mean": [0.1] * size, "std": [0.5] * size} for name, size in sizes.items()}
    return {"instructions": ["Press the red button."], "embodiments": {"sawyer": fields}}


@pytest.fixture(scope="session")
def robot_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact of a fake model on a robot with limits of position; treat it as read-only."""
    from export_fakes import FakeModel, fake_clips, fake_moments

    from export.build import BuildOptions, build_artefact
    from export.manifest import RobotNames

    out = tmp_path_factory.mktemp("artefacts") / "robot"
    names = RobotNames(
        action_names=("delta_x", "delta_y", "delta_z", "gripper_effort"),
        proprio_names=("end_effector_x", "end_effector_y", "end_effector_z", "gripper", "other"),
    )
    options = BuildOptions(paths=("policy", "proposal"), formats=("onnx",))
    build_artefact(FakeModel(), out, fake_moments(1), fake_clips(), {"sawyer": names}, options)
    return out


@pytest.fixture
def tiny_model(statistics: dict[str, Any]) -> Any:
    """`kairos_tiny` with random weights, its zero-initialised output layers included, in evaluation mode.

    It reads every instruction.
    """
    from worldmodel.checkpoint import build_model, make_spec

    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny", "model.normaliser.known_text_only=false")
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics)
    for layer in [*model.denoiser.embed_out.values(), model.expert.embed_out]:
        torch.nn.init.normal_(layer.weight, std=0.2)
    return model.eval()
