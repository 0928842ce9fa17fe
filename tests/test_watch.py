"""Numbers that are not finite and signals stop all ranks at the same step, and what is saved is sound."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from worldmodel.progress import SaveProgress
from worldmodel.telemetry import Averages
from worldmodel.watch import Watch

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


class Toy(NamedTuple):
    """A batch of one number."""

    value: Tensor
    key: list[str]


class Learner(L.LightningModule):
    """Learns a number; step `bad` of rank `of` has what `how` says."""

    def __init__(self, bad: int = -1, of: int = 0, how: str = "loss") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.phase, self.gradient_norm, self.averages = SimpleNamespace(name="toy"), torch.zeros(()), Averages()
        self.bad, self.of, self.how, self.steps = bad, of, how, 0

    def training_step(self, batch: Toy, batch_idx: int) -> Tensor:
        self.steps += 1
        loss = (self.weight - batch.value).square()
        if self.steps == self.bad and self.global_rank == self.of:
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            elif self.how == "loss":
                loss = loss * torch.nan
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self.weight.grad is not None
        if self.how == "gradient" and self.steps == self.bad:
            self.weight.grad.fill_(torch.inf)
        self.gradient_norm = self.weight.grad.abs().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Learner, folder: Path, *, steps: int = 6, every: int = 1, **settings: Any) -> L.Trainer:
    data: Any = [Toy(torch.tensor(float(i)), [f"e{i}@0"]) for i in range(20)]
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **{"devices": 1, **settings},
        callbacks=[Watch(path=folder / "nonfinite.json"), SaveProgress(folder=folder, every=every)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


def saved_step(folder: Path) -> int:
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [3, 6])
def test_the_step_is_named_and_nothing_is_saved_from_after_it(tmp_path, how, bad):
    """In the middle, and at the last step of a phase."""
    what = {"loss": "loss", "gradient": "gradient norm"}[how]
    with pytest.raises(
        FloatingPointError, match=rf"phase 'toy', step {bad}: the {what} is not finite; .*'e{bad - 1}@0'"
    ):
        fit(Learner(bad, how=how), tmp_path)
    record = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (record["phase"], record["step"], record["what"]) == ("toy", bad, what)
    assert record["ranks"][0]["keys"] == [f"e{bad - 1}@0"]
    assert saved_step(tmp_path) == bad - 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["weight"].isfinite()


@pytest.mark.parametrize("bad", [3, 6])
def test_a_signal_saves_and_stops_within_a_step(tmp_path, bad):
    module, before = Learner(bad, how="signal"), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(module, tmp_path, every=100)
    assert saved_step(tmp_path) == module.steps == min(bad + 1, 6)
    assert signal.getsignal(signal.SIGTERM) == before and not Watch.asked


def test_batches_of_one_step_are_all_watched(tmp_path):
    with pytest.raises(FloatingPointError, match=r"'e2@0'"):
        fit(Learner(3), tmp_path, accumulate_grad_batches=4)


RANK = """
import json, sys, warnings
import torch
from pathlib import Path
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_watch import Learner, fit

warnings.filterwarnings("ignore")
out, found = Path(sys.argv[1]), {}
for how in ("signal", "loss"):
    (out / how).mkdir(exist_ok=True)
    module = Learner(3, of=1, how=how)
    try:
        fit(module, out / how, every=100, devices=2, strategy="ddp")
    except (SIGTERMException, FloatingPointError) as error:
        found[how] = [type(error).__name__, str(error), module.steps]
(out / f"{module.global_rank}.json").write_text(json.dumps(found))
# Threads of the group that outlive the other process abort this one at its end.
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_what_happens_to_one_rank_stops_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent}:{here}", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env=common | {"LOCAL_RANK": str(n)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for n in (0, 1)
    ]
    outputs = [process.communicate(timeout=200)[0].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["signal"] == second["signal"] and first["signal"][0] == "SIGTERMException"
    assert saved_step(tmp_path / "signal") == first["signal"][2] == 4
    assert first["loss"] == second["loss"] and first["loss"][0] == "FloatingPointError"
    assert "step 3: the loss is not finite; rank 1: batch keys ['e2@0']" in first["loss"][1]
    record = json.loads((tmp_path / "loss" / "nonfinite.json").read_text())
    assert [entry["rank"] for entry in record["ranks"]] == [1]
