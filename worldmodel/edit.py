"""Command line of edits: `python -m worldmodel.edit checkpoint=DIR episode=KEY like=1`; `--help` lists settings.

An episode is drawn window by window, each after the recorded history, so that a clip of any length is changed whole.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from worldmodel.contracts import Batch
    from worldmodel.data.dataset import ClipDataset
    from worldmodel.model import WorldModel

CONFIG = Path(__file__).parent.parent / "configs" / "edit"
WINDOWS = 8
"""Windows of an episode that are drawn together."""
COLUMNS = 6
"""Moments that a sheet shows."""


class Request(NamedTuple):
    """What is to change."""

    elements: tuple[str, ...]  # none: the view
    text: str | None
    variant: int | None  # number in the reader


def edit(config: Mapping[str, Any]) -> list[Path]:
    """Runs what configs/edit/edit.yaml describes and returns the paths of the film and the sheet.

    Raises `ConfigError` for settings that do not fit, and `DataError` for data that is damaged or lacks masks.
    """
    import numpy as np
    import torch

    from worldmodel.checkpoint import load_model
    from worldmodel.data.dataset import ClipDataset
    from worldmodel.data.shards import ShardReader
    from worldmodel.errors import ConfigError
    from worldmodel.viz import encode_mp4, side_by_side

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    model = load_model(config["checkpoint"])
    reader = ShardReader(config["data"] or model.metadata["training"]["data_root"])
    numbers = {entry.key: i for i, entry in enumerate(reader.entries)}
    if config["episode"] not in numbers:
        raise ConfigError(
            f"episode: no {config['episode']!r} in {reader.root}, but for example {next(iter(numbers))!r}"
        )
    number = numbers[config["episode"]]
    entry = reader.entries[number]
    asked = make_request(config, reader, number)
    data = ClipDataset(reader, model.spec, split=entry.split, only_success=False, masks=bool(asked.elements))
    if unknown := sorted(set(asked.elements) - set(data.elements)):
        raise ConfigError(f"elements: unknown {unknown}; the masks have {', '.join(data.elements)}")
    old, true = pictures_of(data, number), None
    if asked.variant is not None:
        true = pictures_of(data, asked.variant)
    parts = []
    starts = np.arange(-1, entry.length - 1, model.spec.window)
    for group in np.array_split(starts, -(-len(starts) // WINDOWS)):
        with torch.inference_mode():
            parts.append(draw_windows(model, data, number, group, asked, config).flatten(0, 1))
    new = (torch.cat(parts)[: entry.length] * 255).round().to(torch.uint8).numpy()
    shown = [old, new] if true is None else [old, new, true]
    out = Path(config["out"])
    out.mkdir(parents=True, exist_ok=True)
    name = f"{entry.key}-{'variant' + str(config['like']) if config['like'] else 'edited'}"
    views = [side_by_side(*(clip[:, v] for clip in shown)) for v in range(old.shape[1])]
    film, sheet = out / f"{name}.mp4", out / f"{name}.png"
    film.write_bytes(encode_mp4(np.concatenate(views, axis=1), max(1, round(model.spec.fps / 2))))
    write_sheet(shown, sheet)
    print(asked.text or "other views", film, sheet, sep="\n")
    return [film, sheet]


def make_request(config: Mapping[str, Any], reader: Any, number: int) -> Request:
    """What the settings ask for. Raises `ConfigError` where they contradict one another or ask for nothing."""
    from worldmodel.errors import ConfigError

    entry, text, elements = reader.entries[number], config["instruction"], tuple(config["elements"] or ())
    views = config["camera"] is not None or config["only"] is not None
    if sum((bool(elements), views, config["like"] is not None)) != 1:
        raise ConfigError("say what to change by one of: `elements`; `camera` or `only`; `like`, a variant's number")
    variant = None
    if config["like"] is not None:
        metas = {j: reader.read(j, images=False).meta for j in reader.variants(entry.episode_id)}
        known = {meta["variant"]: j for j, meta in metas.items() if meta.get("vary") in (*ELEMENTAL, ["view"])}
        if config["like"] not in known:
            raise ConfigError(
                f"like: {entry.key} has no variant {config['like']} that changes elements or the view alone; it has "
                f"{sorted(known) or 'none'}"
            )
        variant = known[config["like"]]
        elements = tuple(metas[variant]["changed"])
        text = text or metas[variant]["edit"]
    elif elements and text is None and config["reference"] is None:
        raise ConfigError("elements: say what they shall look like, by `instruction`, by `reference` or both")
    return Request(elements, text, variant)


ELEMENTAL = (["element"], ["objects"], ["surfaces"])
"""What a variant varies that changes elements alone."""


def pictures_of(data: "ClipDataset", number: int) -> "np.ndarray":
    """All pictures (T, V, 3, h, w) uint8 of an episode."""
    import numpy as np

    spec, length = data.spec, data.reader.entries[number].length
    clips = [data.at(number, int(start)) for start in range(-1, length - 1, spec.window)]
    return np.concatenate([clip.pictures[1] for clip in clips])[:length]


def draw_windows(
    model: "WorldModel",
    data: "ClipDataset",
    number: int,
    starts: "np.ndarray",
    asked: Request,
    config: Mapping[str, Any],
) -> "Tensor":
    """Windows of an episode drawn anew, (windows, F*R, V, 3, h, w) in [0, 1]."""
    import torch

    from worldmodel.data.align import text_ids
    from worldmodel.data.clip import collate

    batch = collate([data.at(number, int(start)) for start in starts])
    generator = torch.Generator().manual_seed(config["seed"])
    if not asked.elements:
        lens, path, views = new_cameras(model, data, number, starts, batch, asked, config)
        return model.view(
            batch.observation, batch.future, lens, path,
            generator=generator, views=views, steps=config["sampler_steps"],
        )  # fmt: skip
    assert batch.masks is not None
    places = torch.tensor([data.elements.index(name) for name in asked.elements])
    text = None
    if asked.text is not None:
        text = torch.from_numpy(text_ids(asked.text, model.spec.text)).expand(len(starts), -1)
    return model.edit(
        batch.observation,
        batch.future,
        torch.isin(torch.cat([batch.masks.history, batch.masks.future], 1), places),
        generator=generator,
        text=text,
        reference=None if config["reference"] is None else read_reference(config["reference"], model, len(starts)),
        blank=config["blank"],
        steps=config["sampler_steps"],
    )


def read_reference(path: str, model: "WorldModel", count: int) -> "Tensor":
    """A picture file as (count, 3, h, w) uint8 of the model's size."""
    import torch
    from torch.nn import functional

    from worldmodel.data.media import decode_picture
    from worldmodel.errors import ConfigError

    if not Path(path).is_file():
        raise ConfigError(f"reference: there is no file {path}")
    found = torch.from_numpy(decode_picture(Path(path).read_bytes(), path, formats=("PNG", "JPEG")).copy())
    size = (model.spec.height, model.spec.width)
    fitted = functional.interpolate(found.movedim(-1, 0)[None].float(), size, mode="area")
    return fitted.round().to(torch.uint8).expand(count, -1, -1, -1)


def new_cameras(
    model: "WorldModel",
    data: "ClipDataset",
    number: int,
    starts: "np.ndarray",
    batch: "Batch",
    asked: Request,
    config: Mapping[str, Any],
) -> "tuple[Tensor, Tensor, Tensor | None]":
    """Lenses (B, V, 3, 3), paths (B, 1 + F, V, 4, 4) and, where views are made from one, its number (B, V)."""
    import math

    import torch

    from worldmodel.data.clip import collate
    from worldmodel.editing import source_encoder
    from worldmodel.errors import ConfigError
    from worldmodel.geometry import orbit

    cameras = model.spec.cameras
    for name in ("camera", "only"):
        if config[name] is not None and config[name] not in cameras:
            raise ConfigError(f"{name}: unknown camera {config[name]!r}; one of {', '.join(cameras)}")
    if asked.variant is not None:
        batch = collate([data.at(asked.variant, int(start)) for start in starts])
    path = torch.cat([batch.observation.camera_to_base[:, -1:], batch.future.camera_to_base], 1)
    lens, views = batch.observation.intrinsics[:, -1], None
    if config["only"] is not None:
        views = torch.full(lens.shape[:2], cameras.index(config["only"]))
    if config["camera"] is not None:
        v, last = cameras.index(config["camera"]), data.reader.entries[number].length - 1
        steps = torch.from_numpy(starts)[:, None] + model.spec.stride * torch.arange(path.shape[1])
        share = steps.clamp(0, last) / max(last, 1)
        at, ahead = path[:, :, v, :3, 3], path[:, :, v, :3, 2]
        away = (source_encoder(model).plane - at[..., 2:]) / ahead[..., 2:]
        if not bool(((away > 0) & (away < 10)).all()):
            raise ConfigError(
                f"camera: {config['camera']} does not look down on the scene, so there is nothing to go round"
            )
        moved = orbit(
            path[:, :, v],
            at + away * ahead,
            share * math.radians(config["azimuth"]),
            share * math.radians(config["elevation"]),
            1 + share * (config["distance"] - 1),
        )
        path = torch.cat([path[:, :, :v], moved.unsqueeze(2), path[:, :, v + 1 :]], 2)
    return lens, path, views


def write_sheet(clips: "list[np.ndarray]", path: Path) -> None:
    """A picture: for each view the clips below one another, a few moments of each."""
    import numpy as np
    from PIL import Image

    from worldmodel.viz import enlarged

    moments = np.linspace(0, len(clips[0]) - 1, COLUMNS).round().astype(int)
    rows = [
        np.concatenate(list(enlarged(clip[moments, v], 128)), axis=1)
        for v in range(clips[0].shape[1])
        for clip in clips
    ]
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    """Composes the configuration with Hydra, draws, and answers what a user got wrong with one line."""
    import hydra
    from omegaconf import DictConfig, OmegaConf

    @hydra.main(version_base="1.3", config_path=str(CONFIG), config_name="edit")
    def run(config: DictConfig) -> None:
        from worldmodel.errors import ConfigError, WorldModelError

        try:
            for name in ("checkpoint", "episode"):
                if OmegaConf.is_missing(config, name):
                    raise ConfigError(f"which {name}? For example: checkpoint=runs/kairos_tiny_edit episode=KEY like=1")
            settings = OmegaConf.to_container(config, resolve=True)
            assert isinstance(settings, dict)
            edit({str(key): value for key, value in settings.items()})
        except WorldModelError as error:
            sys.exit(f"python -m worldmodel.edit: {error}")

    run()


if __name__ == "__main__":
    main()
