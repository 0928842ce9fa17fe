"""Weights, averages and optimiser states sharded over processes (FSDP2), and checkpoints that any number of them reads.

A checkpoint is a folder: `shard-*.safetensors` as `torch.distributed.checkpoint` writes them, each process its own;
`progress.pt`, the little that is no tensor of the model; and `complete.json`, which names and measures the other files.
It is written beside training to a folder that ends in `.part` and renamed when all of it is on disk.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from worldmodel.averaging import MovingAverage
from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.errors import ConfigError, DataError
from worldmodel.model import WorldModel
from worldmodel.ranks import rank, world_size

log = logging.getLogger(__name__)
COMPLETE, PROGRESS = "complete.json", "progress.pt"


def make_mesh(device: str, shards: int | None) -> DeviceMesh:
    """Processes as replicas × shards: `shards` of them hold one copy of the weights together, None is all.

    Raises `ConfigError` if the processes cannot be dealt out so.
    """
    world = world_size()
    if shards is None or shards == world:
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    if shards < 1 or world % shards:
        raise ConfigError(f"trainer.shards is {shards}; it must divide the number of processes, {world}")
    return init_device_mesh(device, (world // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard(root: nn.Module, models: list[WorldModel], mesh: DeviceMesh, dtype: torch.dtype, *, entry: str) -> None:
    """Shards the blocks of both transformers of `models`, each on its own, and everything else of `root` together.

    Blocks are gathered in `dtype` when they are needed, the rest in float32 when method `entry` of `root` begins.
    Gradients are added up in float32. All processes start from the numbers of process 0.
    """
    seen: set[int] = set()
    for tensor in root.state_dict(keep_vars=True).values():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            dist.broadcast(tensor.detach(), 0)
    blocks = {id(block): block for m in models for part in (m.denoiser, m.expert) for block in part.blocks}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks.values():
        # Action blocks are entered twice in a step, and are small enough to stay.
        twice = hasattr(block, "project")
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not twice)
        for norm in (m for m in block.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm)) and m.weight is not None):
            # What follows is in `dtype` too, and not every device takes inputs of one type and weights of another.
            norm.register_forward_pre_hook(lambda module, x: x[0].to(module.weight.dtype))
        if twice:
            register_fsdp_forward_method(block, "project")
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(root, mesh=mesh, mp_policy=rest)
    register_fsdp_forward_method(root, entry)


def gather(module: nn.Module) -> dict[str, Tensor]:
    """Whole weights in the memory of process 0, one tensor at a time; nothing on the others, which must ask too."""
    whole = {}
    for name, tensor in module.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            whole[name] = full.cpu()
    return whole


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for modules that shard themselves, with checkpoints that are written beside training."""

    def __init__(self, *, average: MovingAverage) -> None:
        super().__init__(data_parallel_size=world_size(), tensor_parallel_size=1)
        self.average = average
        self._group: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._saved: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of weights, optimiser and average by name, as far as this process has it."""
        module, found, seen = self.lightning_module, {}, set()
        assert module is not None
        for name, tensor in module.state_dict(keep_vars=True).items():
            # Parts that a teacher shares come twice.
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"module.{name}"] = tensor.detach()
        for name, parameter in module.named_parameters():
            state: Mapping[str, Tensor] = self.optimizers[0].state.get(parameter, {})
            found |= {f"optimiser.{name}.{key}": value for key, value in state.items()}
        return found | {f"average.{name}": value for name, value in self.average.shadow.items()}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: see `tensors`."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Settings alone; tensors are in `tensors`."""
        return {"param_groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Copies the state and writes it in the background, to a folder that is named after `filepath` and the step."""
        self.wait()
        if checkpoint["global_step"] == self._saved:
            return
        self._saved = checkpoint["global_step"]
        if self._group is None:
            # Its own, so that it does not come between the steps; on the CPU, where the copies are.
            self._group = dist.new_group(backend="gloo")
        final = Path(f"{filepath}-{checkpoint['global_step']:09d}")
        part = final.with_name(final.name + ".part")
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            checkpoint["callbacks"].pop(self.average.state_key, None)
            torch.save(checkpoint, part / PROGRESS)
        self.barrier()
        writer = HuggingFaceStorageWriter(path=str(part), save_distributed=True)
        written = async_save(self.tensors(), storage_writer=writer, process_group=self._group)
        self._pending = self._thread.submit(finish, written, part, final, world_size())

    def wait(self) -> None:
        """Waits until what is being written is on disk, and raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what this process needs of a checkpoint of any number of processes.

        Raises `DataError` for one that is damaged, of another version or of another model.
        """
        path = Path(checkpoint_path)
        check(path)
        reader, state = HuggingFaceStorageReader(path=str(path)), self.tensors()
        held = reader.read_metadata().state_dict_metadata
        module, optimiser = self.lightning_module, self.optimizers[0]
        assert module is not None
        parameters = dict(module.named_parameters())
        for key in (key for key in held if key.startswith("optimiser.")):
            name, kind = key.removeprefix("optimiser.").rsplit(".", 1)
            if name in parameters:
                like = torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[name].detach())
                optimiser.state[parameters[name]][kind] = state[key] = like
        if other := sorted(set(held) ^ set(state)):
            raise DataError(f"{path} is of another model: {len(other)} tensors differ, {', '.join(other[:4])}")
        load(state, storage_reader=reader)
        progress = torch.load(path / PROGRESS, weights_only=True, map_location="cpu")
        for group, saved in zip(optimiser.param_groups, progress["optimizer_states"][0]["param_groups"], strict=True):
            group.update(saved)
        return progress

    def teardown(self) -> None:
        """Waits for what is being written."""
        self.wait()
        self._thread.shutdown()
        super().teardown()


def finish(written: Any, part: Path, final: Path, ranks: int) -> None:
    """When all processes have written, names the folder as what it is, and removes the one before."""
    written.result()
    if rank() > 0:
        return
    files = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
    record = {"schema_version": SCHEMA_VERSION, "ranks": ranks, "files": files}
    with open(part / COMPLETE, "w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(final)
    for older in final.parent.glob(f"{final.name.rsplit('-', 1)[0]}-*"):
        if older.name < final.name:
            shutil.rmtree(older)


def complete(path: Path) -> bool:
    """Whether a folder is a checkpoint that was written to the end."""
    return path.suffix != ".part" and (path / COMPLETE).is_file()


def check(path: Path) -> None:
    """Raises `DataError` for a checkpoint that is damaged or of another version."""
    if not complete(path):
        raise DataError(f"{path} is no whole checkpoint: {COMPLETE} is missing")
    record = json.loads((path / COMPLETE).read_text())
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{path / COMPLETE}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}")
    for name, size in record["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise DataError(f"{path / name} is damaged: {size} bytes were written, {found or 'none'} are there")
