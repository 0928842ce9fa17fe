"""Command line of feature caches: `python -m worldmodel.features experiment=... data.features=DIR`; see `HELP`."""

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HELP = """\
Runs the frozen networks of stage 1 once over the training frames of a dataset and keeps what they answer, so that
training reads it instead of running them. It takes the settings of the training that will read them:

  python -m worldmodel.features experiment=kairos_small data.root=data/mine data.features=data/mine/features \\
      encoders/image=vision encoders.image.path=models/siglip2
  python train.py experiment=kairos_small data.root=data/mine data.features=data/mine/features \\
      encoders/image=vision encoders.image.path=models/siglip2

Features are found again by what the network was given - the bytes of a picture, the words of an instruction - so what
training changes (`lens` zooms pictures) or what is not here (other splits) is computed as before. They belong to one
network, its weights and settings, and one dataset; training refuses others. An interrupted call goes on where it
stopped, shard by shard, when it is started again.

  data.features=DIR        where they go, one folder per network and dataset below it
  data.root=DIR            the dataset; those of mixtures are covered too
  trainer=gpu              runs on a GPU; trainer.workers=N processes decode pictures
  batch=N                  frames at once (default: 32)
"""
CONFIGS = Path(__file__).parent.parent / "configs"
log = logging.getLogger(__name__)


def make_features(config: Mapping[str, Any], *, batch: int = 32, progress: bool = True) -> list[Path]:
    """Writes what is missing of the features of a resolved training configuration; returns their folders.

    Raises `ConfigError` if it has no frozen network or no folder for features, `DataError` for damaged data.
    """
    import torch
    from hydra.utils import instantiate
    from tqdm import tqdm

    from worldmodel.data.index import INDEX
    from worldmodel.data.shards import ShardReader
    from worldmodel.encoders.feature_store import describe, folder_of, part_path, write_part
    from worldmodel.encoders.pretrained import frozen_parts
    from worldmodel.errors import ConfigError
    from worldmodel.finetune import plan_model
    from worldmodel.phase_run import data_settings, other_roots
    from worldmodel.phases import make_phases

    if config["data"]["features"] is None:
        raise ConfigError("data.features is null; it names the folder that the features go to")
    torch.set_num_threads(config["trainer"]["threads"])
    device = torch.device("cuda" if config["trainer"]["accelerator"] in ("gpu", "cuda") else "cpu")
    phases = make_phases(config["phases"])
    skip = any(data_settings(config, phase)["on_error"] == "skip" for phase in phases)
    roots = [config["data"]["root"], *other_roots(config, phases)]
    readers = [ShardReader(root, cache_bytes=0, check_sizes=not skip) for root in roots]
    plan = plan_model(config, readers)
    encoder = instantiate(plan.model["encoder"], _convert_="all")
    parts = frozen_parts(encoder)
    digests = {name: part.digest() for name, part in parts.items()}
    encoder.to(device)
    silent = any(
        "text" in item.drop or (phase.dropout if item.dropout is None else item.dropout).get("text", 0) > 0
        for phase in phases
        for item in phase.mixture
    ) or any(phase.dropout.get("text", 0) > 0 for phase in phases if not phase.mixture)
    written = []
    for root, reader in zip(roots, readers, strict=True):
        clips = frames_by_shard(reader, plan.spec, on_error="skip" if skip else "raise")
        dataset = hashlib.sha256((reader.root / INDEX).read_bytes()).hexdigest()
        folders = {}
        for name, part in parts.items():
            folders[name] = folder_of(Path(config["data"]["features"]), name, digests[name], dataset)
            backbone = {"kind": part.kind, "digest": digests[name], "path": part.path, **part.settings()}
            describe(folders[name], part=name, backbone=backbone, dataset=dataset, name=str(root), shards=list(clips))
        lacking = {shard: [name for name in parts if not part_path(folders[name], shard).is_file()] for shard in clips}
        total = sum(len(clips[shard]) for shard, names in lacking.items() if names)
        with tqdm(total=total, desc=f"features of {root}", unit="frame", disable=not progress) as bar:
            for shard, names in lacking.items():
                found: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
                frames = batches(clips[shard], batch, config["trainer"]["workers"]) if names else ()
                for o in frames:
                    rgb = o.rgb[:, -1].to(device).float() / 127.5 - 1.0
                    given = (o.text.to(device), o.has_text.to(device), rgb, o.has_rgb.to(device))
                    for name, held in found.items():
                        with torch.no_grad():
                            new = parts[name].examples(*given, known=held, silent=silent)
                        held |= {key: features.cpu() for key, features in new.items()}
                    bar.update(len(rgb))
                for name, held in found.items():
                    write_part(folders[name], shard, held)
        written += list(folders.values())
    return written


def frames_by_shard(reader: Any, spec: Any, *, on_error: str) -> dict[str, Any]:
    """The training clips of each shard as a dataset of single frames, as training reads them."""
    from torch.utils.data import Subset

    from worldmodel.data.dataset import ClipDataset

    present = {entry.embodiment for entry in reader.entries if entry.split == "train"}
    dataset = ClipDataset(
        reader,
        dataclasses.replace(spec, history=1),
        split="train",
        embodiments=sorted(present & set(spec.embodiments)),
        future=False,
        on_error=on_error,
    )
    places: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        places.setdefault(reader.entries[dataset.locate(index)[0]].shard, []).append(index)
    return {shard: Subset(dataset, chosen) for shard, chosen in places.items()}


def batches(clips: Any, size: int, workers: int) -> Iterator[Any]:
    """Observations of single frames; what a damaged episode was replaced by comes in its own place too."""
    from torch.utils.data import DataLoader

    from worldmodel.data.clip import collate

    for found in DataLoader(clips, batch_size=size, num_workers=workers, collate_fn=collate):
        yield found.observation


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 2 for what a user got wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        print(HELP, end="")
        return 0
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from worldmodel.config import register_resolvers
    from worldmodel.errors import WorldModelError

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    register_resolvers()
    sizes = [word.removeprefix("batch=") for word in words if word.startswith("batch=")]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config: Any = compose("train", [word for word in words if not word.startswith("batch=")])
            settings = OmegaConf.to_container(config, resolve=True)
        assert isinstance(settings, dict)
        for folder in make_features({str(k): v for k, v in settings.items()}, batch=int(sizes[-1]) if sizes else 32):
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(f"features: {folder} ({size / 1e6:.1f} MB)")
    except (WorldModelError, HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"python -m worldmodel.features: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
