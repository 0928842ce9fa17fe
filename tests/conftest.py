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
