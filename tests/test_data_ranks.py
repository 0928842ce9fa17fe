"""Two real processes under DDP: each reads its own part of every global batch, and a checkpoint counts both."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic import made_up_dataset

from worldmodel.contracts import ClipSpec
from worldmodel.data.datamodule import ClipDataModule

SPEC = ClipSpec(cameras=("front",), embodiments=("toy",), height=16, width=16, action=4, proprio=4, future=1)
STEPS, BATCH = 2, 3
RANK = """
import json, sys, warnings
import lightning as L
import torch
from test_data_ranks import STEPS, Recorder, module
from worldmodel.ranks import leave

root, out = sys.argv[1:]
warnings.filterwarnings("ignore")
data, model = module(root), Recorder()
trainer = L.Trainer(max_steps=STEPS, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                    limit_val_batches=0, use_distributed_sampler=True)
trainer.fit(model, data)
state = data.state_dict()
with open(f"{out}/{trainer.global_rank}.json", "w") as file:
    json.dump({"keys": model.keys, "state": state, "weight": float(model.weight)}, file)
leave()
"""


def module(root: str, **settings: Any) -> ClipDataModule:
    return ClipDataModule(**{"root": root, "spec": SPEC, "batch_size": BATCH, "seed": 4, "images": False, **settings})


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and only the ranks need it.
    if name != "Recorder":
        raise AttributeError(name)
    import lightning as L
    import torch

    class Recorder(L.LightningModule):
        """Learns the mean of what it is shown and remembers whose it was."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.keys: list[list[str]] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            self.keys.append(batch.key)
            return ((self.weight - batch.observation.proprio.mean()) ** 2).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Recorder


@pytest.mark.slow
def test_two_ranks_read_disjoint_parts_of_the_same_stream(tmp_path: Path) -> None:
    root = made_up_dataset(tmp_path / "data", {("toy", "lift"): 3}, length=5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent}:{here}", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    command = [sys.executable, "-c", RANK, str(root), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command, env=common | {"LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # What one rank with the whole global batch would have read, dealt out in order.
    alone = [batch.key for batch in itertools.islice(module(str(root), batch_size=2 * BATCH).train_dataloader(), STEPS)]
    assert [a + b for a, b in zip(first["keys"], second["keys"], strict=True)] == alone
    assert first["weight"] == second["weight"] != 0, "gradients of both"
    assert first["state"] == second["state"]
    assert first["state"]["drawn"] == [STEPS * 2 * BATCH] and first["state"]["ranks"] == 2
