"""Moving averages of weights, whole or sharded."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class MovingAverage(L.Callback):
    """Exponential moving average of the trained weights; saved with the checkpoint, put into the model at the end.

    Of sharded weights each process averages its own shards, without a word to the others.
    """

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the weights unless a checkpoint brought an average."""
        if not self.shadow:
            self.shadow = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follows the weights; early steps average over fewer of them."""
        decay = self.rate(trainer.global_step)
        live = [p.detach() for n, p in pl_module.named_parameters() if n in self.shadow]
        for average, parameter in zip(self.shadow.values(), live, strict=True):
            local(average).lerp_(local(parameter), 1 - decay)

    def rate(self, step: int) -> float:
        """The decay after a number of steps."""
        return min(self.decay, (1 + step) / (10 + step))

    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into the module's parameters."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in self.shadow:
                    local(parameter).copy_(local(self.shadow[name]))

    def state_dict(self) -> dict[str, Any]:
        """The average, for the checkpoint."""
        return {"shadow": dict(self.shadow)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the average of a checkpoint."""
        self.shadow = {name: value.clone() for name, value in state_dict["shadow"].items()}


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
