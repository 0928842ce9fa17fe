"""Told of a task that it was not trained on, a policy hedges between those that it was trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose
from test_model import observation_of

from export.build import make_path
from export.envelope import Envelope
from export.onnx import OnnxRunner, write_onnx
from export.parity import check_parity, make_examples
from export.still import still_pictures
from export.torchscript import TorchScriptRunner, write_torchscript
from export.trust import Trust, no_trust
from worldmodel.checkpoint import build_model, describe, load_model, make_spec, save_model
from worldmodel.contracts import Observation
from worldmodel.data.align import text_ids
from worldmodel.data.statistics import statistics_hash
from worldmodel.data.transforms import hide
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.policy.action_expert import ActionExpert
from worldmodel.policy.realtime import first_actions

torch.set_num_threads(1)

KNOWN = ("Press the red button.", "Open the door.", "Push the puck.", "Close the drawer.")


def saved(statistics: dict[str, Any], folder: Path, *known: str, hedges: bool = True) -> WorldModel:
    """`kairos_tiny` with random weights that was trained on the instructions `known`, as it is loaded."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny", f"policy.expert.hedges={hedges}")
    statistics = statistics | {"instructions": list(known)}
    spec = make_spec(config["data"]["spec"])
    model = build_model(config["model"], spec, statistics)
    torch.nn.init.normal_(model.expert.embed_out.weight, std=0.2)
    digest = statistics_hash(statistics)
    return load_model(save_model(model, folder, describe(config["model"], spec, statistics, digest, {"seed": 0})))


def told(model: WorldModel, *sentences: str) -> Observation:
    """One made-up moment, told each of the sentences."""
    o, n = observation_of(model.spec, 1), len(sentences)
    text = torch.stack([torch.from_numpy(text_ids(one, model.spec.text)) for one in sentences])
    return Observation(*(t.expand(n, *t.shape[1:]) for t in o))._replace(text=text)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_median_of_what_is_proposed_for_each_known_instruction(statistics, tmp_path, count):
    model, known = saved(statistics, tmp_path, *KNOWN[:count]), KNOWN[:count]
    o = told(model, *known, "Fold the towel.")
    with torch.no_grad():
        proposed = model.propose(o)
        expected = proposed[:count].quantile(0.5, dim=0)
        torch.testing.assert_close(proposed[count], expected, atol=1e-5, rtol=1e-5)
        proposal = model.remember(model.normaliser(o, model.grid), None).proposal
        assert proposal is not None
        torch.testing.assert_close(model.normaliser.restore("action", proposal, o.embodiment), proposed)
        decided = first_actions(proposed * 0 + 0.25, torch.full((count + 1,), 3))
        begun = model.propose(o, decided)
    assert (begun[:, :3] - 0.25).abs().max() < 1e-6
    torch.testing.assert_close(begun[count, 3:], begun[:count, 3:].quantile(0.5, dim=0), atol=1e-5, rtol=1e-5)


def test_without_any_instruction_it_goes_by_what_it_senses(statistics, tmp_path):
    """That may well be a known task, which the state tells; only another instruction tells that it is not."""
    hedging, plain = saved(statistics, tmp_path, *KNOWN), saved(statistics, tmp_path, *KNOWN, hedges=False)
    o = told(hedging, *KNOWN, "Fold the towel.")
    with torch.no_grad():
        assert torch.equal(hedging.propose(hide(o, ["text"])), plain.propose(hide(o, ["text"])))
        first, second = hedging.propose(o), plain.propose(o)
    assert torch.equal(first[:4], second[:4]) and (first[4] - second[4]).abs().max() > 1e-4


def test_a_model_that_reads_every_instruction_hedges_nothing(tiny_model):
    assert not tiny_model.training and tiny_model.expert.hedges and tiny_model.known_words is None


def test_training_forgets_what_evaluation_read(statistics, tmp_path):
    model = saved(statistics, tmp_path, *KNOWN)
    read = model.known_words
    assert read is not None and model.train().known_words is None
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            parameter.mul_(1.1 if name.startswith("text.") else 1.0)
    again = model.eval().known_words
    assert again is not None and again.shape == read.shape and (again - read).abs().max() > 1e-4


def test_hedging_needs_a_state_policy():
    sizes = dict.fromkeys(("width", "attention_width", "hidden", "context", "action", "chunk", "history"), 8)
    with pytest.raises(ConfigError, match="hedges is about what the state policy proposes"):
        ActionExpert(**sizes, heads=2, layers=1, stride=1, embodiments=1, state=None, proprio=3, hedges=True)


def test_exported_graphs_hedge_too(statistics, tmp_path):
    model = saved(statistics, tmp_path, *KNOWN)
    path = make_path(
        "proposal", model, Envelope(model.spec, model.statistics), Trust(no_trust(128, model.spec.proprio))
    )
    path.eval()
    with still_pictures(model):
        write_torchscript(path, tmp_path / "graph.pt")
        write_onnx(path, tmp_path / "graph.onnx", opset=18, dynamic=False)
    runners = {"pt": TorchScriptRunner(tmp_path / "graph.pt"), "onnx": OnnxRunner(tmp_path / "graph.onnx")}
    examples = make_examples(path, [(one, [told(model, one)]) for one in (KNOWN[1], "Fold the towel.")])
    check_parity(path, runners, examples)
    new = next(example for example in examples if example.key.startswith("Fold")).ticks[0]
    with torch.no_grad():
        hedged = path(*new)[0]
        model.known_words = None
        assert (path(*new)[0] - hedged).abs().max() > 1e-3, "among the examples is one that is hedged"
