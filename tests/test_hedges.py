"""Told of a task that it was not trained on, the model foresees what lies between those that it was trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose
from test_model import generator, observation_of

from worldmodel.checkpoint import build_model, describe, load_model, make_spec, save_model
from worldmodel.contracts import Observation
from worldmodel.data.align import text_ids
from worldmodel.data.statistics import statistics_hash
from worldmodel.data.transforms import hide
from worldmodel.errors import ConfigError
from worldmodel.guess import Memory
from worldmodel.model import WorldModel
from worldmodel.policy.foresight import Foresight

torch.set_num_threads(1)

KNOWN = ("Press the red button.", "Open the door.", "Push the puck.", "Close the drawer.")


def saved(statistics: dict[str, Any], folder: Path, *known: str, hedges: bool = True) -> WorldModel:
    """`kairos_tiny` with random weights that was trained on the instructions `known`, as it is loaded."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny", f"policy.expert.foresight.hedges={hedges}")
    statistics = statistics | {"instructions": list(known)}
    spec = make_spec(config["data"]["spec"])
    model = build_model(config["model"], spec, statistics)
    for name, parameter in model.expert.named_parameters():
        if name in ("foresight.robot.out.weight", "foresight.contact.out.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.get_buffer("carried").fill_(1.0)
    digest = statistics_hash(statistics)
    return load_model(save_model(model, folder, describe(config["model"], spec, statistics, digest, {"seed": 0})))


def told(model: WorldModel, *sentences: str) -> Observation:
    """One made-up moment, told each of the sentences."""
    o, n = observation_of(model.spec, 1), len(sentences)
    text = torch.stack([torch.from_numpy(text_ids(one, model.spec.text)) for one in sentences])
    return Observation(*(t.expand(n, *t.shape[1:]) for t in o))._replace(text=text)


@torch.no_grad()
def remembered(model: WorldModel, o: Observation) -> Memory:
    """The memory of its low-dimensional senses."""
    return model.remember(model.normaliser(o, model.grid), None)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_what_follows_from_the_median_of_the_known_tasks_is_foreseen(statistics, tmp_path, count):
    model = saved(statistics, tmp_path, *KNOWN[:count])
    memory = remembered(model, told(model, *KNOWN[:count], "Fold the towel."))
    assert memory.proposal is not None and memory.measured is not None
    median = memory.proposal[:count].quantile(0.5, dim=0, keepdim=True).expand_as(memory.proposal)
    foresight, now, spec = model.expert.foresight, memory.measured, model.spec
    assert foresight is not None
    with torch.no_grad():
        points, _ = foresight.follow(now, median, memory.embodiment, frames=spec.future, stride=spec.stride)
        lead = model.foresee(memory)["points"]
    hedged = model.relative(points, now.points.unsqueeze(1))[count]
    torch.testing.assert_close(lead[count], hedged, atol=1e-4, rtol=1e-4)
    if count > 1:
        assert all((lead[i] - hedged).abs().max() > 1e-3 for i in range(count))


def test_neither_known_tasks_nor_actions_are_hedged(statistics, tmp_path):
    """Nor is a moment without instruction, whose task the state may well tell."""
    hedging, plain = (saved(statistics, tmp_path / str(h), *KNOWN, hedges=h) for h in (True, False))
    o = told(hedging, *KNOWN, "Fold the towel.")
    first, second, silent = remembered(hedging, o), remembered(plain, o), remembered(hedging, hide(o, ["text"]))
    assert first.proposal is not None and second.proposal is not None and silent.proposal is not None
    assert torch.equal(first.proposal, second.proposal) and torch.equal(first.proposal[4], silent.proposal[4])
    with torch.no_grad():
        leads, others, quiet = hedging.foresee(first), plain.foresee(second), hedging.foresee(silent)
        known = (torch.randn(first.proposal.shape, generator=generator(1)), torch.zeros(5))
        given, usual = hedging.foresee(first, *known), plain.foresee(second, *known)
    for name in ("points", "camera"):
        torch.testing.assert_close(leads[name][:4], others[name][:4])
        torch.testing.assert_close(quiet[name][4], others[name][4])
        assert (leads[name][4] - others[name][4]).abs().max() > 1e-4
        torch.testing.assert_close(given[name], usual[name])


def test_a_model_that_reads_every_instruction_hedges_nothing(tiny_model):
    assert tiny_model.expert.foresight is not None and tiny_model.expert.foresight.hedges
    assert not tiny_model.training and tiny_model.known_words is None
    with pytest.raises(ConfigError, match="hedges is part of leads"):
        Foresight(proprio=4, points=2, action=3, embodiments=1, hidden=8, blocks=1, chunk=4, hedges=True)


def test_training_forgets_what_evaluation_read(statistics, tmp_path):
    model = saved(statistics, tmp_path, *KNOWN)
    read = model.known_words
    assert read is not None and model.train().known_words is None
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            parameter.mul_(1.1 if name.startswith("text.") else 1.0)
    again = model.eval().known_words
    assert again is not None and again.shape == read.shape and (again - read).abs().max() > 1e-4
