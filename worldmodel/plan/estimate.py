"""From counts to memory, time and data: arithmetic on what was counted, and the assumptions of `Cluster`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from worldmodel.acceleration import CHECKPOINTING
from worldmodel.contracts import ClipSpec
from worldmodel.errors import ConfigError
from worldmodel.phases import PARTS
from worldmodel.plan.count import Clip, Kind
from worldmodel.plan.gpus import GPU
from worldmodel.training import PhaseModule

GIB = 2**30
SHARDED = ("denoiser", "expert")
"""Parts that are sharded whether they train or not; of the others each rank shards what trains and keeps the rest."""
UPDATE = 40
"""Bytes of memory traffic that AdamW and the moving average need at least for a parameter: 28 and 12."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and what is assumed of them.

    `shard` GPUs share one copy of what trains (1: none, data parallel; all: FSDP; between: HSDP). `mfu` is the share of
    the peak at which FLOPs run, recomputation included; `efficiency` that of nominal links; `spare` the share of
    memory that is left to the CUDA context, NCCL and fragmentation; `network` GB/s per GPU between nodes.
    """

    nodes: int
    gpus: int
    gpu: GPU
    shard: int
    mfu: float = 0.2
    efficiency: float = 0.7
    spare: float = 0.1
    network: float | None = None

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus < 1:
            raise ConfigError(f"nodes and gpus are 1 or more, not {self.nodes} and {self.gpus}")
        if self.shard < 1 or self.world % self.shard:
            raise ConfigError(f"shard: {self.shard} does not divide the {self.world} GPUs")
        for name in ("mfu", "efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share, above 0 to 1, not {getattr(self, name)}")
        if not 0 <= self.spare < 1:
            raise ConfigError(f"spare is a share, 0 to below 1, not {self.spare}")

    @property
    def world(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus

    def rate(self, ranks: int) -> float:
        """Bytes per second of each GPU in a collective of consecutive `ranks`: within a node its link, else the net."""
        network = self.gpu.network if self.network is None else self.network
        return 1e9 * self.efficiency * (self.gpu.link if ranks <= self.gpus else network)


class Sizes(NamedTuple):
    """Parameters of a phase, counted on the meta device."""

    parts: dict[str, int]  # part -> parameters
    trained: int  # those that train
    spread: int  # those that are sharded, if anything is
    whole: int  # bytes of all others and of buffers
    block: int  # the largest block of a transformer


def sizes(module: PhaseModule) -> Sizes:
    """Of a module on the meta device."""
    model = module.model
    held = {name: getattr(model, name) for name in PARTS if getattr(model, name) is not None}
    parts = {name: numel(part) for name, part in held.items()}
    if module.teacher is not None:
        mine = {id(p) for p in model.parameters()}
        parts["teacher"] = sum(p.numel() for p in module.teacher.parameters() if id(p) not in mine)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spread, whole = parts.get("teacher", 0), sum(b.numel() * b.element_size() for b in module.buffers())
    for name, part in held.items():
        for p in part.parameters():
            if p.requires_grad or name in SHARDED:
                spread += p.numel()
            else:
                whole += p.numel() * p.element_size()
    block = max(numel(b) for b in (*model.denoiser.blocks, *model.expert.blocks))
    return Sizes(parts, trained, spread, whole, block)


def numel(part: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in part.parameters())


def memory(found: Sizes, kinds: list[Kind], cluster: Cluster, checkpointing: str) -> dict[str, float]:
    """Bytes on each GPU by kind, for the kind of batch that needs most; `total` is the fullest moment.

    Under sharding, products read blocks that are gathered in bfloat16 instead of own copies of the parameters: two at a
    time, one in use and one on its way, with whose gradients go out in float32. Data parallel ranks hold gradients in
    buckets beside their own. On one GPU gradients grow while activations go. AdamW (`foreach`) makes one temporary list
    as long as the parameters.
    """
    how, s = CHECKPOINTING.index(checkpointing), cluster.shard
    count = max((kind.step for kind in kinds), key=lambda c: c.peak[how])
    trained, peak = 4 * found.trained / s, count.peak[how]
    found_bytes = {
        "parameters": 4 * found.spread / s + found.whole,
        "optimiser": 2 * trained,
        "moving average": trained,
        "gradients": trained,
        "gradient buckets": trained if s == 1 < cluster.world else 0.0,
        "gathered blocks": (2 * 2 + 6) * found.block if s > 1 else 0.0,
        "bfloat16 copies": count.copies[how] if s == 1 else 0.0,
        "activations": count.kept[how],
        "temporary": peak - count.kept[how],
    }
    steady = sum(list(found_bytes.values())[:5])
    busy = peak + found_bytes["gathered blocks"] + found_bytes["bfloat16 copies"]
    alone = cluster.world == 1
    total = steady - trained + max(busy, 2 * trained) if alone else steady + max(busy, trained)
    return {**found_bytes, "total": total}


def traffic(found: Sizes, passes: float, cluster: Cluster, accumulate: int) -> dict[str, float]:
    """Seconds of communication of a step: gathering blocks in bfloat16 in each of `passes`, reducing gradients."""
    s, r = cluster.shard, cluster.world // cluster.shard
    ring = (s - 1) / s
    gather = passes * 2 * found.spread * ring / cluster.rate(s)
    scatter = accumulate * 4 * found.trained * ring / cluster.rate(s)
    # Replicas of a shard lie in other nodes unless all GPUs are in one.
    reduce = 2 * 4 * found.trained / s * (r - 1) / r / cluster.rate(cluster.world)
    return {"gather": gather, "reduce-scatter": scatter, "all-reduce": reduce}


def step_time(
    found: Sizes, kinds: list[Kind], cluster: Cluster, accumulate: int, checkpointing: str
) -> dict[str, float]:
    """FLOPs and seconds of a mean step on each GPU.

    Communication is taken to hide behind computing as far as it is shorter.
    """
    how = CHECKPOINTING.index(checkpointing)

    def mean(value: Callable[[Kind], float]) -> float:
        return accumulate * sum(kind.share * value(kind) for kind in kinds)

    flops = {
        "forward": mean(lambda k: k.step.forward),
        "backward": mean(lambda k: k.step.backward),
        "teacher": mean(lambda k: k.teacher),
        "again": mean(lambda k: k.step.again[how]),
    }
    compute = sum(flops.values()) / (1e12 * cluster.gpu.tflops * cluster.mfu)
    update = UPDATE * found.trained / cluster.shard / (1e9 * cluster.gpu.bandwidth)
    # The history and what follows are two passes, forward and backward; where neither runs, only what trains moves.
    moved = found if any(k.step.velocity for k in kinds) else found._replace(spread=found.trained)
    parts = traffic(moved, mean(lambda k: 2 * 2 + k.passes), cluster, accumulate)
    talk = sum(parts.values())
    return {
        **flops,
        "compute": compute,
        "update": update,
        **parts,
        "communication": talk,
        "seconds": max(compute, talk) + update,
        "samples": cluster.world * mean(lambda k: k.rows),
    }


def mean_clip(kinds: list[Kind]) -> dict[str, float]:
    """Tokens, control steps, pictures and pixels (of all recorded pictures) of a mean sample."""
    samples = sum(kind.share * kind.rows for kind in kinds)

    def mean(value: Callable[[Clip], float]) -> float:
        return sum(kind.share * kind.rows * value(kind.clip) for kind in kinds) / samples

    return {
        "tokens": mean(lambda c: c.tokens),
        "frames": mean(lambda c: c.frames),
        "read": mean(lambda c: c.read),
        "pixels": mean(lambda c: c.frames * c.pixels),
    }


def data(
    spec: ClipSpec,
    clip: Mapping[str, float],
    samples: float,
    seconds: float,
    nodes: int,
    *,
    bits: float,
    epochs: float,
) -> dict[str, float]:
    """What `samples` of a `mean_clip` in `seconds` ask of data: recordings are cut end to end, seen `epochs` times."""
    hours = samples * clip["frames"] / spec.fps / 3600 / epochs
    size = samples * clip["pixels"] * len(spec.cameras) * bits / 8 / epochs
    rate = samples / seconds / nodes
    return {
        "hours": hours,
        "gigabytes": size / 1e9,
        "samples_per_s_and_node": rate,
        "pictures_per_s_and_node": rate * clip["read"],
    }
