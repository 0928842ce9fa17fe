"""The exported policy that reads every picture once, against the checkpoint that carries its memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.build import BuildOptions, build_artefact
from export.drive import OnnxPolicyFactory
from export.observations import held_out_moments, recorded_clips, robot_names
from export.runtime import OnnxPolicy, RuntimeContractError, StepPolicy
from worldmodel.checkpoint import build_model, make_spec
from worldmodel.controllers import EagerPolicy
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.metaworld import MetaworldScene
from worldmodel.errors import ExportError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def built(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory, statistics: Any) -> tuple[Any, Path]:
    """`kairos_tiny` with random weights, and its artefact with both paths of actions."""
    from conftest import compose

    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny")
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval()
    torch.nn.init.normal_(model.expert.embed_out.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    model.metadata = {"statistics": statistics, "statistics_hash": "0" * 64}
    reader, spec = ShardReader(tiny_dataset), model.spec
    out = tmp_path_factory.mktemp("artefacts") / "tiny"
    options = BuildOptions(paths=("policy", "policy_step"), formats=("onnx",))
    moments = held_out_moments(reader, spec, 1, ticks=3)
    build_artefact(model, out, moments, recorded_clips(reader, spec, 8), robot_names(reader, spec), options)
    return model, out


@pytest.mark.slow
def test_it_answers_what_a_checkpoint_with_its_memory_answers(built: tuple[Any, Path]) -> None:
    model, artefact = built
    stepping, whole = StepPolicy(artefact), OnnxPolicy(artefact)
    eager = EagerPolicy(model, stateful=True)
    scene = MetaworldScene("drawer-close-v3", pixels=model.spec.height, cameras=model.spec.cameras)
    stride, away = stepping.stride, []
    for _ in range(2):  # a second episode remembers nothing of the first
        observation: dict[str, Any] = scene.reset(np.random.default_rng(0))
        for policy in (stepping, whole, eager):
            policy.reset()
        for step in range(6 * stride + 1):
            for policy in (stepping, whole, eager):
                policy.observe(observation)
            if step % stride == 0:
                chunk, forgetful = stepping.act(), whole.act()
                wanted = eager.act().clip(-1, 1)
                assert stepping.report is not None
                held = np.any([rows for kind, rows in stepping.report.limited.items() if kind != "command"], axis=0)
                np.testing.assert_allclose(chunk[~held], wanted[~held], atol=1e-4)
                away.append(float(np.abs(chunk - forgetful).max()))
            observation, _ = scene.step(np.zeros(4, np.float32), images=(step + 1) % stride == 0)
    scene.close()
    assert away[0] < 1e-5 and max(away) > 1e-4, "what lies before the history counts"


@pytest.mark.slow
def test_a_gap_reads_the_history_anew(built: tuple[Any, Path]) -> None:
    _, artefact = built
    stepping, whole = StepPolicy(artefact), OnnxPolicy(artefact)
    scene = MetaworldScene("drawer-close-v3", pixels=64, cameras=("front", "wrist"))
    seen = [scene.reset(np.random.default_rng(0))]
    seen += [scene.step(np.zeros(4, np.float32), images=True)[0] for _ in range(24)]
    scene.close()
    for policy in (stepping, whole):
        policy.reset()
    noise = np.zeros((stepping.horizon, 8), np.float32)
    asked, answers = (0, 4, 8, 12, 16, 19), list[np.ndarray]()
    for step, observation in enumerate(seen[:20]):
        for policy in (stepping, whole):
            policy.observe(observation)
        if step in asked:
            answers = [policy.act(noise) for policy in (stepping, whole)]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)
    fork = stepping.fork()
    fork.observe(seen[0])
    whole.reset()
    whole.observe(seen[0])
    np.testing.assert_allclose(fork.act(noise), whole.act(noise), atol=1e-6)


def test_without_the_graph_it_says_so(robot_artefact: Path) -> None:
    with pytest.raises(RuntimeContractError, match="policy_step in fp32: no such ONNX graph"):
        StepPolicy(robot_artefact)
    with pytest.raises(ExportError, match="stepping"):
        OnnxPolicyFactory(robot_artefact, blind=("wrist",), stepping=True)
