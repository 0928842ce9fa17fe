"""One frame at a time: the exported step is the model's own memory, whatever is in the cache; and other precisions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_model import generator, observation_of

from export.build import make_path
from export.envelope import Envelope
from export.manifest import path_entry
from export.onnx import OnnxRunner, write_onnx
from export.parity import (
    check_handover,
    check_parity,
    eager_answers,
    make_examples,
    shortened,
    write_golden,
)
from export.runtime.golden import Golden, signature_faults
from export.runtime.session import open_session
from export.still import still_pictures
from export.torchscript import TorchScriptRunner, write_torchscript
from export.trust import Trust, no_trust
from export.wrappers import ActionPath, RolloutPath, StepPath
from worldmodel.contracts import Observation
from worldmodel.errors import ExportError
from worldmodel.model import WorldModel
from worldmodel.policy.realtime import Decided, first_actions
from worldmodel.streaming import future_of_actions

torch.set_num_threads(1)


@pytest.fixture
def model(tiny_model: WorldModel, statistics: dict[str, Any]) -> WorldModel:
    tiny_model.metadata = {"statistics": statistics, "statistics_hash": "0" * 64}
    return tiny_model


def paths(model: WorldModel) -> tuple[ActionPath, StepPath]:
    envelope, trust = Envelope(model.spec, model.statistics), Trust(no_trust(128, model.spec.proprio))
    policy = make_path("policy", model, envelope, trust, ("policy", "policy_step")).eval()
    step = make_path("policy_step", model, envelope, trust).eval()
    assert isinstance(policy, ActionPath) and isinstance(step, StepPath)
    return policy, step


def ticks(model: WorldModel, count: int, missing: bool = False) -> list[Observation]:
    """Made-up consecutive observations: the frames of each are those of the one before, moved on by one."""
    g, made = generator(4), []
    now = observation_of(model.spec, 1)
    series = ("rgb", "intrinsics", "camera_to_base", "points", "visible", "wrench", "taxels", "proprio")
    for _ in range(count):
        new = {n: getattr(now, n)[:, -1:] for n in series}
        for name in ("points", "wrench", "proprio", "taxels"):
            new[name] = torch.randn(new[name].shape, generator=g)
        new["rgb"] = torch.randint(0, 256, new["rgb"].shape, generator=g, dtype=torch.uint8)
        now = now._replace(**{n: torch.cat([getattr(now, n)[:, 1:], new[n]], 1) for n in series})
        hidden = {"has_points": torch.zeros_like(now.has_points), "has_camera": torch.zeros_like(now.has_camera)}
        made.append(now._replace(**hidden) if missing else now)
    return made


@pytest.mark.parametrize("missing", [False, True])
def test_steps_are_the_models_own_memory(model: WorldModel, missing: bool) -> None:
    """Empty, partial and full caches, with whole histories given to the model and one frame to the step."""
    _, step = paths(model)
    spec, g = model.spec, generator()
    before = (torch.zeros(1, 2, spec.action), torch.zeros(1, 2, dtype=torch.bool))
    commands = torch.rand(1, spec.chunk, spec.action, generator=g)
    decided = first_actions(commands, torch.tensor([2]))
    memory, cache, filled = None, step.empty(1), []
    with torch.no_grad():
        for now in ticks(model, 7, missing):
            noise = torch.randn(1, spec.chunk, spec.action, generator=g)
            decision = model.decide(now, noise, decided, past=memory, fresh=1)
            memory = decision.memory
            answer = step(*shortened(now, step), noise, *before, *decided, *cache)
            expected = step.answer(decision, now, decided, *before)
            for a, b in zip(answer[: len(expected)], expected, strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
            cache = answer[len(expected) :]
            rows = dict(zip([row.name for row in step.caches], cache, strict=True))
            filled.append([int(rows[f"cache_{i}_mask"].any(2).sum()) for i in (0, 2)])
    assert filled == ([[min(i, 3), min(i, 4)] for i in range(1, 8)])
    assert sum(x.nbytes for x in cache) < 600_000


def test_the_history_matters_and_policy_fills_the_cache(model: WorldModel) -> None:
    policy, step = paths(model)
    spec = model.spec
    moment = ticks(model, 5)
    assert check_handover(policy, step, [("made up", moment)]) < 2e-5
    inputs = step.example(1, seed=2)
    with torch.no_grad():
        opened = policy(*policy.example(1, seed=2))
        names = [row.name for row in policy.outputs[5:]]
        assert names == [f"next_{row.name}" for row in step.caches]
        known = step(*inputs[: -len(step.caches)], *opened[5:])
        unknown = step(*inputs)
        noise = policy.example(1, seed=2)[17]
        alone = model.act(Observation(*policy.example(1, seed=2)[:17]), noise)
    assert (known[0] - unknown[0]).abs().max() > 1e-4
    assert not opened[1][..., 1:].any() or spec.action > 4
    plain = policy.envelope.in_range(alone, torch.zeros(1, dtype=torch.int64))
    assert (opened[0] - plain)[..., 4:].abs().max() < 5e-6, "what no limit holds is the model's answer"


def test_an_exported_step_goes_through_every_state_of_its_cache(model: WorldModel, tmp_path: Path) -> None:
    """ONNX with an open batch, TorchScript and torch.export against the model, over ticks and batch sizes."""
    _, step = paths(model)
    examples = make_examples(step, [("a", ticks(model, 6)), ("b", ticks(model, 5, missing=True))])
    write_onnx(step, tmp_path / "step.onnx", opset=18, dynamic=True)
    write_torchscript(step, tmp_path / "step.pt")
    runners = {"step.onnx": OnnxRunner(tmp_path / "step.onnx"), "step.pt": TorchScriptRunner(tmp_path / "step.pt")}
    chosen = [*examples[:2], *examples[6:8]]
    results = check_parity(step, runners, chosen, batches=(1, 3))
    assert all(result.ticks == 22 + 5 and result.max_error["actions"] <= 1e-4 for result in results.values())
    write_golden(tmp_path / "golden.npz", step, chosen)
    with np.load(tmp_path / "golden.npz", allow_pickle=False) as golden:
        assert golden["actions"].shape == (4, 5, model.spec.chunk, model.spec.action)
        np.testing.assert_allclose(golden["actions"][0, 0], eager_answers(step, chosen[0])[0][0][0], atol=1e-6)
    entry = path_entry(step)
    session = open_session(tmp_path / "step.onnx")
    assert not signature_faults(session, entry)
    kept = Golden(tmp_path / "golden.npz", entry)
    assert (kept.examples, kept.ticks) == (4, 5) and set(kept.next) == {row.name for row in step.caches}
    assert max(kept.compare(session, None)["max_error"].values()) <= 1e-4, "the robot's loop hands the cache on"
    forgetful = runners["step.onnx"]

    def broken(inputs: Any) -> list[np.ndarray]:
        return list(forgetful([*inputs[: -len(step.empty(1))], *step.empty(1)]))

    with pytest.raises(ExportError, match=r"step\.onnx: output '\w+' differs .* tick [1-9]"):
        check_parity(step, {"step.onnx": broken}, chosen[:1])


@pytest.mark.parametrize("name", ["understanding", "rollout", "proposal"])
def test_paths_without_actions_are_the_models(model: WorldModel, tmp_path: Path, name: str) -> None:
    envelope, trust = Envelope(model.spec, model.statistics), Trust(no_trust(128, model.spec.proprio))
    model.stream_steps = 1  # each is a copy of the network in the graph
    path = make_path(name, model, envelope, trust).eval()
    with still_pictures(model):
        write_torchscript(path, tmp_path / "graph.pt")
        write_onnx(path, tmp_path / "graph.onnx", opset=18, dynamic=False)
    moments = [("a", ticks(model, 2)), ("b", ticks(model, 1, missing=True))]
    examples = make_examples(path, moments)
    runner = TorchScriptRunner(tmp_path / "graph.pt")
    result = check_parity(path, {"graph.pt": runner}, examples, batches=(1, 2))["graph.pt"]
    assert set(result.max_error) == {row.name for row in path.outputs}
    write_golden(tmp_path / f"golden_{name}.npz", path, examples)
    entry = path_entry(path)
    golden = Golden(tmp_path / f"golden_{name}.npz", entry)
    session = open_session(tmp_path / "graph.onnx")
    assert not signature_faults(session, entry)
    assert max(golden.compare(session, None)["max_error"].values()) < 1e-4
    now = moments[0][1][-1]
    with torch.no_grad():
        if name == "understanding":
            expected = tuple(model.understand(now))
            answer = path(*shortened(now, path))
        elif name == "proposal":
            inputs = examples[2].ticks[0]
            decided = Decided(*inputs[17:])
            assert decided.where.any(), "a chunk that begins with what is decided is among the examples"
            expected, answer = (model.propose(Observation(*inputs[:17]), decided),), path(*inputs)
        else:
            inputs = examples[0].ticks[0]
            noise = dict(zip(model.denoiser.streams, inputs[18:], strict=True))
            future = future_of_actions(now, inputs[17])
            p = model.predict(now, future, "forward_dynamics", generator=None, noise=noise)
            expected, answer = (p.rgb, p.camera_to_base, p.points, p.wrench), path(*now, *inputs[17:])
            other = path(*now, inputs[17] + 1, *inputs[18:])
            assert any((a - b).abs().max() > 1e-5 for a, b in zip(answer, other, strict=True)), "actions are not heard"
    for a, b in zip(answer, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_rollout_needs_streams_that_see_actions(model: WorldModel) -> None:
    model.coupling = "history_only"
    with pytest.raises(ExportError, match="coupling=joint; this model has history_only"):
        RolloutPath(model)
