"""Command line of long rollouts: `python -m worldmodel.rollout checkpoint=runs/kairos_tiny`; `--help` lists settings.

Draws what `drift` measures: films of predicted | true pictures, curves and a table.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldmodel.drift import Film

CONFIG = Path(__file__).parent.parent / "configs" / "rollout"


def rollout(config: Mapping[str, Any]) -> Path:
    """Runs what configs/rollout/rollout.yaml describes, prints the drift table and returns the path of the page.

    Raises `ConfigError` for settings that do not fit, and `DataError` for data that is damaged or was trained on.
    """
    import torch

    from worldmodel.checkpoint import load_model
    from worldmodel.data.dataset import ClipDataset
    from worldmodel.data.shards import ShardReader
    from worldmodel.drift import choose_episodes, drift_table, measure_drift
    from worldmodel.errors import ConfigError
    from worldmodel.holdout import check_unseen
    from worldmodel.plots import number
    from worldmodel.report import plain
    from worldmodel.stamp import protocol_stamp

    for name, least in (("episodes", 1), ("start", 0), ("films", 0), ("chunks", 1)):
        if config[name] is not None and config[name] < least:
            raise ConfigError(f"{name} is {config[name]}; expected {least} or more")
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    model, out = load_model(config["checkpoint"]), Path(config["out"])
    reader = ShardReader(config["data"] or model.metadata["training"]["data_root"])
    check_unseen(model.metadata, reader, config["split"])
    dataset = ClipDataset(reader, model.spec, split=config["split"], tasks=config["tasks"])
    clips = choose_episodes(dataset, config["episodes"], config["start"])
    result, films = measure_drift(
        model,
        dataset,
        clips,
        chunks=config["chunks"],
        kinds=config["actions"],
        seed=config["seed"],
        guidance=config["guidance"],
        steps=config["sampler_steps"],
        films=config["films"],
    )
    result["rolled_out"] = [{"episode": clip.episode, "task": clip.task, "step": clip.step} for clip in clips]
    result["stamp"] = protocol_stamp(model.metadata, reader, config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rollout.json").write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    paths = write_films(films, out / "films")
    page = out / "rollout.html"
    title = f"Rollouts of {Path(config['checkpoint']).resolve().name}"
    page.write_text(render(title, result, films, paths), encoding="utf-8")
    print("\n" + drift_table(result, number))
    print(page, out / "rollout.json", *([f"{len(paths)} films in {out / 'films'}"] if paths else []), sep="\n")
    return page


def write_films(films: "Sequence[Film]", folder: Path) -> list[Path]:
    """One mp4 a film, at a quarter of real speed: views below one another, predicted on the left, true on the right."""
    import numpy as np

    from worldmodel.viz import encode_mp4, side_by_side

    paths = []
    for film in films:
        folder.mkdir(parents=True, exist_ok=True)
        views = [side_by_side(film.predicted[:, v], film.true[:, v]) for v in range(film.true.shape[1])]
        path = folder / f"{film.clip.episode}-{film.kind}.mp4"
        path.write_bytes(encode_mp4(np.concatenate(views, axis=1)))
        paths.append(path)
    return paths


def render(title: str, result: Mapping[str, Any], films: "Sequence[Film]", paths: Sequence[Path]) -> str:
    """The page: how errors grow, the table, and the films inside it."""
    import base64

    from worldmodel.drift import MEASURES
    from worldmodel.page import compose
    from worldmodel.plots import line_chart, number
    from worldmodel.viz import video_tag

    figures, episodes = result["figures"], result["episodes"]
    seconds = [(i + 1) * result["chunk_seconds"] for i in range(len(episodes))]
    charts = "".join(
        line_chart(
            seconds,
            kinds,
            "seconds from the start",
            f"{MEASURES[name][0]} [{MEASURES[name][1]}]" if MEASURES[name][1] else MEASURES[name][0],
        )
        for name, kinds in figures.items()
    )
    heads = "".join(f"<th>{s:.1f} s<br>{n} episodes</th>" for s, n in zip(seconds, episodes, strict=True))
    rows = "".join(
        f"<tr><td>{escape(MEASURES[name][0])} {escape(MEASURES[name][1])}</td><td>{escape(kind)}</td>"
        + "".join(f'<td class="n">{number(value)}</td>' for value in values)
        + "</tr>"
        for name, kinds in figures.items()
        for kind, values in kinds.items()
    )
    table = (
        f'<div class="wide"><table><thead><tr><th>Measure</th><th>Actions</th>{heads}</tr></thead>{rows}</table></div>'
    )
    shown = "".join(
        video_tag(
            "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode(),
            f"<b>{escape(film.clip.task)}</b>, actions: {escape(film.kind)}; predicted | true, "
            f"{escape(film.clip.episode)}",
        )
        for film, path in zip(films, paths, strict=True)
    )
    first = {name: {kind: values[0] for kind, values in kinds.items()} for name, kinds in figures.items()}
    last = {name: {kind: values[-1] for kind, values in kinds.items()} for name, kinds in figures.items()}
    cards = [
        (f"{number(first['psnr'][kind])} → {number(last['psnr'][kind])} dB", f"video, first → last chunk: {kind}")
        for kind in first["psnr"]
    ]
    verdict = (
        f"{episodes[0]} held-out episodes, {len(episodes)} chunks of {result['chunk_seconds']:.2g} s, each predicted "
        f"after what was predicted before it, with a memory of {result['memory_bytes_per_episode'] / 1e3:.0f} kB an "
        "episode that does not grow."
    )
    sections = {
        "Drift": ("drift", f'<div class="grid">{charts}</div>'),
        "Per chunk": ("table", table),
        "Films": ("films", f'<div class="clips">{shown}</div>' if shown else '<p class="quiet">None asked for.</p>'),
    }
    stamp = result["stamp"]
    return compose(title, verdict, cards, sections, f"{stamp['git_revision']}, {stamp['data']}, {stamp['machine']}")


def main() -> None:
    """Composes the configuration with Hydra, rolls out, and answers what a user got wrong with one line."""
    import hydra
    from omegaconf import DictConfig, OmegaConf

    @hydra.main(version_base="1.3", config_path=str(CONFIG), config_name="rollout")
    def run(config: DictConfig) -> None:
        from worldmodel.errors import ConfigError, WorldModelError

        try:
            if OmegaConf.is_missing(config, "checkpoint"):
                raise ConfigError("which checkpoint? For example: checkpoint=runs/kairos_tiny")
            settings = OmegaConf.to_container(config, resolve=True)
            assert isinstance(settings, dict)
            rollout({str(key): value for key, value in settings.items()})
        except WorldModelError as error:
            sys.exit(f"python -m worldmodel.rollout: {error}")

    run()


if __name__ == "__main__":
    main()
