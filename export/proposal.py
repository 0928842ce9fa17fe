"""The small part of a policy, for a robot that follows what it measures while it executes a chunk."""

from typing import Any

from torch import Tensor

from export.tensors import F32, TensorSpec, command_specs, observation_specs
from export.wrappers import SENSES, Path
from worldmodel.contracts import Observation
from worldmodel.errors import ExportError
from worldmodel.policy.realtime import Decided


class ProposalPath(Path):
    """Newest frame to what the state policy proposes, which the chunk of `policy` corrects: no history, no transformer.

    Raises:
        ExportError: the model has no state policy.
    """

    name = "proposal"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if model.expert.state is None:
            raise ExportError("proposal: this model proposes nothing from the measured state: leave the path out")
        spec, decided = self.spec, command_specs(self.spec)[-2:]
        frames = min(spec.history, model.encoder.frames + 1)
        self.inputs = [*observation_specs(spec, frames, images=1), *decided]
        unit = "action_units of the embodiment"
        self.outputs = [TensorSpec("proposed", (spec.chunk, spec.action), F32, unit, "", "what `policy` corrects")]

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        """The tensors of `inputs` -> those of `outputs`."""
        return (self.model.propose(Observation(*inputs[:SENSES]), Decided(*inputs[SENSES:])),)
