"""The LeRobot side of `rivals.py`: runs in an interpreter that has lerobot and needs nothing of this repository.

  rivals_lerobot.py train SETTINGS   trains a policy on the arrays in settings["data"], saves it to settings["out"]
  rivals_lerobot.py serve FOLDER     answers observations on standard input with chunks of actions, one npz each

Policies, normalisation and optimisers are LeRobot's own and their loop is that of its training script. Batches come
from memory, so that reading and decoding its video files does not count against it.
"""

import json
import struct
import sys
import time
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SMALL: dict[str, dict[str, Any]] = {
    "act": {
        "dim_model": 256,
        "dim_feedforward": 1024,
        "n_encoder_layers": 2,
        "n_vae_encoder_layers": 2,
        "optimizer_lr": 1e-4,
        "optimizer_lr_backbone": 1e-4,
    },
    "diffusion": {
        "down_dims": (128, 256, 512),
        "use_separate_rgb_encoder_per_camera": True,
        "noise_scheduler_type": "DDIM",
        "num_inference_steps": 10,
        "scheduler_warmup_steps": 100,
    },
}
"""What is smaller than LeRobot's defaults: those need 4 to 8 times as long a step. No backbone is pretrained."""
CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}


def declare_operators() -> Any:
    """Declares what torchvision's compiled half would, where it does not load, as beside a CPU build of torch."""
    import torch

    try:
        import torchvision  # pyright: ignore[reportMissingImports]
    except RuntimeError:
        pass
    else:
        return torchvision
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # operators live as long as it does


def make_config(settings: dict[str, Any]) -> Any:
    """The policy's configuration for the sizes of the data."""
    from lerobot.configs.types import FeatureType, PolicyFeature  # pyright: ignore[reportMissingImports]
    from lerobot.policies.act.configuration_act import ACTConfig  # pyright: ignore[reportMissingImports]
    from lerobot.policies.diffusion.configuration_diffusion import (  # pyright: ignore[reportMissingImports]
        DiffusionConfig,
    )

    size, policy = settings["pixels"], settings["policy"]
    features = {
        f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, size, size))
        for camera in settings["cameras"]
    }
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (settings["state"],))
    sizes: dict[str, Any] = {
        "input_features": features,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (settings["action"],))},
        "device": settings["device"],
        "pretrained_backbone_weights": None,
        "push_to_hub": False,
        "n_action_steps": settings["chunk"] // 2,
        **(SMALL[policy] if settings["small"] else {}),
    }
    if policy == "act":
        return ACTConfig(chunk_size=settings["chunk"], **sizes)
    return DiffusionConfig(**sizes)


def make_policy(config: Any) -> Any:
    """The policy of a configuration, untrained."""
    from lerobot.policies.factory import get_policy_class  # pyright: ignore[reportMissingImports]

    return get_policy_class(config.type)(config)


class Demonstrations:
    """Every step of the demonstrations, in memory; episodes are contiguous."""

    def __init__(self, folder: Path, cameras: list[str], device: str) -> None:
        import torch

        def read(name: str) -> Any:
            return torch.from_numpy(np.load(folder / f"{name}.npy")).to(device)

        self.device, self.images = device, {name: read(name) for name in cameras}
        self.state, self.action = read("state"), read("action")
        episode = np.load(folder / "episode.npy")
        edges = np.flatnonzero(np.diff(episode)) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(episode)]])
        self.first, self.last = (torch.from_numpy(np.repeat(x, ends - starts)).to(device) for x in (starts, ends - 1))

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Statistics as LeRobot keeps them, pictures in 0..1."""
        import torch

        found = {}
        for name, values in (("observation.state", self.state), ("action", self.action)):
            flat = values.double()
            found[name] = {"mean": flat.mean(0), "std": flat.std(0), "min": flat.amin(0), "max": flat.amax(0)}
        for camera, images in self.images.items():
            some = images[:: max(len(images) // 500, 1)].double() / 255
            shape = {"mean": some.mean((0, 2, 3)), "std": some.std((0, 2, 3))}
            shape |= {"min": torch.zeros(3), "max": torch.ones(3)}
            found[f"observation.images.{camera}"] = {k: v.reshape(3, 1, 1) for k, v in shape.items()}
        return {k: {n: v.float() for n, v in values.items()} for k, values in found.items()}

    def batch(self, rows: Any, config: Any) -> dict[str, Any]:
        """The steps `rows` (B,) with the observations before and the actions after them that a policy asks for."""
        import torch

        def at(deltas: list[int] | None) -> Any:
            moments = rows[:, None] + torch.tensor(deltas or [0], device=self.device)
            return moments.maximum(self.first[rows][:, None]).minimum(self.last[rows][:, None])

        seen = at(config.observation_delta_indices)
        if config.observation_delta_indices is None:
            seen = seen[:, 0]
        ahead = rows[:, None] + torch.tensor(config.action_delta_indices, device=self.device)
        batch = {f"observation.images.{name}": images[seen].float() / 255 for name, images in self.images.items()}
        batch |= {"observation.state": self.state[seen], "action": self.action[at(config.action_delta_indices)]}
        outside = (ahead > self.last[rows][:, None]) | (ahead < self.first[rows][:, None])
        return {**batch, "action_is_pad": outside}


def train(settings: dict[str, Any]) -> None:
    """Trains for a number of steps or for a time, and saves the policy; prints `answer` with what it did."""
    import torch
    from lerobot.policies.factory import make_pre_post_processors  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    device = settings["device"]
    data = Demonstrations(Path(settings["data"]), settings["cameras"], device)
    if settings["init"]:
        config, policy, before, after = load(Path(settings["init"]), device)
    else:
        config = make_config(settings)
        policy = make_policy(config).to(device)
        before, after = make_pre_post_processors(policy_cfg=config, dataset_stats=data.statistics())
    optimiser = config.get_optimizer_preset().build(policy.get_optim_params())
    generator = torch.Generator().manual_seed(settings["seed"])
    clock, budget, limit = CLOCKS[settings["clock"]], settings["seconds"], settings["steps"]
    preset, schedule = config.get_scheduler_preset(), None
    usable = torch.arange(len(data.state), device=device)
    usable = usable[usable <= data.last - getattr(config, "drop_n_last_frames", 0)]
    # A schedule that is made after the first steps takes itself for one that was stepped too early.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    policy.train()
    begun, step, losses = clock(), 0, []
    with tqdm(total=limit, desc=f"LeRobot {config.type}", unit="step") as bar:
        while (limit is None or step < limit) and (budget is None or clock() - begun < budget):
            rows = usable[torch.randint(len(usable), (settings["batch"],), generator=generator).to(device)]
            loss, _ = policy.forward(before(data.batch(rows, config)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
            optimiser.step()
            optimiser.zero_grad()
            step += 1
            if preset is not None and schedule is None and (limit is not None or step == 20):
                # A schedule needs to know its end; where a time is given, the first steps tell how many there will be.
                total = limit if budget is None else max(round(20 * budget / (clock() - begun)), 40)
                schedule = preset.build(optimiser, total)
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
            bar.update()
    seconds = clock() - begun
    out = Path(settings["out"])
    policy.save_pretrained(out)
    before.save_pretrained(out)
    after.save_pretrained(out)
    parameters = sum(p.numel() for p in policy.parameters())
    said = {"steps": step, "seconds": seconds, "parameters": parameters, "loss": float(np.mean(losses[-100:]))}
    (out / "rivals.json").write_text(json.dumps({**settings, **said}, indent=1))
    print("answer", json.dumps(said), flush=True)


def load(folder: Path, device: str = "cpu") -> tuple[Any, Any, Any, Any]:
    """A saved policy on a device: its configuration, itself, and what comes before and after it."""
    from lerobot.configs.policies import PreTrainedConfig  # pyright: ignore[reportMissingImports]
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors  # pyright: ignore[reportMissingImports]

    config = PreTrainedConfig.from_pretrained(folder)
    config.device = device
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    there = {"device_processor": {"device": device}}
    around = make_pre_post_processors(policy_cfg=config, pretrained_path=str(folder), preprocessor_overrides=there)
    return config, policy, *around


def serve(folder: Path, source: BinaryIO, sink: BinaryIO) -> None:
    """Answers the newest observations with a chunk until the input ends."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, policy, before, after = load(folder)
    policy.eval()
    deltas = config.observation_delta_indices
    while (values := read_arrays(source)) is not None:
        # Rows of every array are control steps, the newest last.
        newest = [max(len(values["state"]) - 1 + d, 0) for d in deltas or [0]]
        batch = {
            f"observation.images.{name[4:]}": torch.from_numpy(array[newest]).permute(0, 3, 1, 2).float()[None] / 255
            for name, array in values.items()
            if name.startswith("rgb.")
        }
        batch["observation.state"] = torch.from_numpy(values["state"][newest])[None]
        batch = before({k: v if deltas else v[:, 0] for k, v in batch.items()})
        with torch.inference_mode():
            if config.type == "act":
                actions = policy.predict_action_chunk(batch)
            else:
                images = torch.stack([batch[key] for key in config.image_features], dim=2)
                seen = {"observation.state": batch["observation.state"], "observation.images": images}
                actions = policy.diffusion.generate_actions(seen)
            actions = after(actions)
        write_arrays(sink, {"actions": actions[0].numpy()})


def read_arrays(source: BinaryIO) -> dict[str, np.ndarray] | None:
    """One message: its length in 8 bytes and an npz; None at the end."""
    head = source.read(8)
    if len(head) < 8:
        return None
    with np.load(BytesIO(source.read(struct.unpack("<q", head)[0])), allow_pickle=False) as values:
        return dict(values)


def write_arrays(sink: BinaryIO, values: dict[str, np.ndarray]) -> None:
    """The other direction."""
    buffer = BytesIO()
    np.savez(buffer, **values)  # pyright: ignore[reportArgumentType]
    sink.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
    sink.flush()


if __name__ == "__main__":
    operators = declare_operators()
    if sys.argv[1] == "train":
        train(json.loads(sys.argv[2]))
    else:
        answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what libraries print must not mix with answers
        serve(Path(sys.argv[2]), sys.stdin.buffer, answers)
