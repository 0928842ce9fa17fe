"""Compiled and checkpointed blocks compute what plain ones do, and leave the model as it was."""

from functools import partial
from typing import Any

import pytest
import torch
from test_model import future_of, observation_of

from worldmodel.acceleration import accelerated
from worldmodel.contracts import Batch
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError
from worldmodel.phases import PARTS, Ingredient, Phase
from worldmodel.synthesis.delta import GatedDelta, gated_delta_auto
from worldmodel.training import PhaseModule

# Torch's tracer asks every tensor for its gradient, and hides the warning from people but not from pytest.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def step_loss(model: Any, batch: Batch, mode: str, draws: int = 1) -> torch.Tensor:
    """Loss of one step of a phase that trains every part."""
    mixture = (Ingredient(mode=mode, weight=1.0, draws=draws),)
    rest: dict[str, Any] = {"trains": tuple(p for p in PARTS if p != "motion"), "steps": 1}
    rest |= {"batch_size": 2, "learning_rate": 1e-3, "insulate": False}
    phase = Phase(name="test", objective="world", mixture=mixture, **rest)
    return PhaseModule(model=model, phase=phase, seed=0).world_step(batch, Draws(0, range(2)))["loss"]


def gradients(model: Any, mode: str, draws: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    model.zero_grad()
    o, f = observation_of(model.spec), future_of(model.spec)
    loss = step_loss(model, Batch(o, f, torch.zeros(2, 3, dtype=torch.int64), ["a", "b"]), mode, draws)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Recount:
    """Counts the calls of a module's forward."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        plain = module.forward

        def counted(*args: Any) -> Any:
            self.calls += 1
            return plain(*args)

        monkeypatch.setattr(module, "forward", counted)


@pytest.mark.parametrize(("checkpointing", "again"), [("none", 0), ("selective", 2), ("full", 4)])
def test_checkpointing_changes_no_number(tiny_model, monkeypatch, checkpointing, again):
    """Losses and gradients are equal to the last bit, and as many blocks run again as were asked for."""
    model = tiny_model.train()
    loss, expected = gradients(model, "joint")
    mixes = [Recount(block.mix, monkeypatch) for block in model.denoiser.blocks]
    with accelerated(model, compiled=False, checkpointing=checkpointing):
        found, grads = gradients(model, "joint")
    assert torch.equal(found, loss) and grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    # History and future are a pass each.
    assert [mix.calls for mix in mixes].count(4) == again and sum(mix.calls for mix in mixes) == 8 + 2 * again
    assert not any("forward" in vars(block) for block in model.denoiser.blocks)


@pytest.mark.parametrize(("checkpointing", "mode"), [("none", "policy"), ("full", "joint")])
def test_compiled_blocks_change_no_number(tiny_model, monkeypatch, checkpointing, mode):
    """Through torch's tracer; the code generator is not run here."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, draws = tiny_model.train(), 2 if mode == "policy" else 1
    loss, expected = gradients(model, mode, draws)
    with accelerated(model, compiled=True, checkpointing=checkpointing):
        found, grads = gradients(model, mode, draws)
    torch.testing.assert_close(found, loss)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)
    gated = [block.mix for block in model.denoiser.blocks if isinstance(block.mix, GatedDelta)]
    assert gated and all(mix.rule is gated_delta_auto for mix in gated)


def test_a_longer_sentence_needs_no_new_graph(tiny_model, monkeypatch):
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = tiny_model
    s = model.normaliser(observation_of(model.spec), model.grid)
    latents = model.history_latents(observation_of(model.spec))
    counts = []
    with torch.no_grad(), accelerated(model, compiled=True, checkpointing="none"):
        fused = model.encoder(s)
        for more in (0, 3, 5):
            longer = fused._replace(
                tokens=torch.nn.functional.pad(fused.tokens, (0, 0, 0, more)),
                mask=torch.nn.functional.pad(fused.mask, (0, more)),
            )
            model.remember(s, latents, longer)
            counts.append(len(graphs))
    assert counts[0] > 0 and counts[1] == counts[2] == counts[0]


def test_unknown_checkpointing_is_refused(tiny_model):
    with (
        pytest.raises(ConfigError, match="unknown 'half'; one of none, selective, full"),
        accelerated(tiny_model, compiled=False, checkpointing="half"),
    ):
        pass
