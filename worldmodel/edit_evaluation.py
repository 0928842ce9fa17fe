"""Edits of clips nobody trained on, beside the simulator's own render of what was asked for and trivial baselines."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from worldmodel import metrics
from worldmodel.contracts import ClipSpec, Future, Observation, Pair
from worldmodel.data.pairs import Link, PairDataset, collate_pairs
from worldmodel.data.shards import ShardReader
from worldmodel.editing import composite, reference_pictures, through_plane
from worldmodel.figures import summarise
from worldmodel.holdout import Clip, check_unseen
from worldmodel.metrics import Rows, Sums

PALETTE = 200
"""Training pairs that mean colours and mean pictures are taken from."""
REQUESTS = {"words": (True, False, True), "picture": (False, True, True), "words_and_shades": (True, False, False)}
"""How an element is asked for: by an instruction, by a picture, and whether the old one is blanked out."""


class Editor(Protocol):
    """What the evaluation needs of a model; `worldmodel.model.WorldModel` has it."""

    spec: ClipSpec
    metadata: dict

    def edit(
        self,
        observation: Observation,
        future: Future,
        mask: Tensor,
        *,
        generator: torch.Generator,
        text: Tensor | None = None,
        reference: Tensor | None = None,
        blank: bool = True,
        steps: int | None = None,
        raw: bool = False,
    ) -> Tensor:
        """Replace an element."""
        ...

    def view(
        self,
        observation: Observation,
        future: Future,
        intrinsics: Tensor,
        path: Tensor,
        *,
        generator: torch.Generator,
        views: Tensor | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """See the clip from elsewhere."""
        ...


class Means(NamedTuple):
    """What training variants look like in the mean."""

    colours: dict[str, Tensor]  # name of a colour, or of a surface -> (3,)
    views: Tensor  # (V, 3, h, w)


def evaluate_edits(
    model: Editor,
    reader: ShardReader,
    split: str,
    *,
    clips: int = 60,
    batch_size: int = 15,
    seed: int = 0,
    steps: int | None = None,
    plane: float = 0.0,
) -> dict:
    """Evaluate `clips` pairs of each kind of a held-out split, spread over its variants.

    `plane` is that of `geometry.seen_from`, a baseline of views. Returns plain values as `evaluate_offline` does, with
    `samples` for the report and `outside`, the largest difference from the recording outside the masks. Raises
    `DataError` if the split was trained on or has no pairs.
    """
    check_unseen(model.metadata, reader, split)
    result = {"split": split, "spec": model.spec, "kinds": {}, "figures": [], "horizons": {}, "per_task": {},
              "samples": [], "outside": 0.0, "settings": {"clips": clips, "seed": seed, "steps": steps}}  # fmt: skip
    episodes: set[str] = set()
    means = training_looks(reader, model.spec, seed)
    for kind in ("element", "view"):
        pairs = PairDataset(reader, model.spec, split=split, kinds=[kind])
        chosen = choose_pairs(pairs, clips, seed)
        rows: dict[str, Rows] = {}
        groups = np.array_split(np.arange(len(chosen)), -(-len(chosen) // batch_size))
        for number, group in enumerate(tqdm(groups, desc=f"edits: {kind}", unit="batch")):
            links = [pairs.locate(chosen[i])[0] for i in group]
            batch = collate_pairs([pairs[chosen[i]] for i in group])
            with torch.inference_mode():
                if kind == "element":
                    shown, outside = _elements(model, batch, reader, links, means, rows, seed + number, steps)
                    result["outside"] = max(result["outside"], outside)
                else:
                    shown = _views(model, batch, means, rows, seed + number, steps, plane)
            if number == 0:
                result["samples"] += _samples(batch, shown, links, model.spec)
        described = [_clip(pairs, index) for index in chosen]
        episodes |= {clip.episode for clip in described}
        for name, found in summarise(rows, described, seed).items():
            result[name] = found + result[name] if isinstance(found, list) else found | result[name]
        result["kinds"][kind] = len(chosen)
    return result | {"episodes": len(episodes)}


def choose_pairs(pairs: PairDataset, count: int, seed: int) -> list[int]:
    """Numbers of pairs that have a full future, variants in turn."""
    rng, offers, first = np.random.default_rng(seed), [], 0
    for link in pairs.links:
        length = pairs.reader.entries[link.source].length
        last = max(length - pairs.spec.window, 1)
        offers.append((first + rng.permutation(last)[: -(-count // len(pairs.links))]).tolist())
        first += length
    rng.shuffle(offers)
    turns = [offer[turn] for turn in range(max(map(len, offers))) for offer in offers if turn < len(offer)]
    return turns[:count]


def training_looks(reader: ShardReader, spec: ClipSpec, seed: int) -> Means:
    """Mean colours of things and surfaces, and mean pictures, of training variants."""
    found: dict[str, list[Tensor]] = {}
    pictures = []
    pairs = PairDataset(reader, spec, split="train")
    for index in choose_pairs(pairs, PALETTE, seed):
        item, link = pairs[index], pairs.locate(index)[0]
        now = torch.from_numpy(item.target.pictures[0][-1]).float() / 255
        pictures.append(now)
        assert item.target.masks is not None
        masks = torch.from_numpy(item.target.masks[0][-1])
        for element, name in colour_names(reader, link).items():
            where = masks == pairs.clips.elements.index(element)
            if where.any():
                found.setdefault(name, []).append(now.movedim(1, -1)[where].mean(0))
    return Means({name: torch.stack(colours).mean(0) for name, colours in found.items()}, torch.stack(pictures).mean(0))


def colour_names(reader: ShardReader, link: Link) -> dict[str, str]:
    """What each changed element of a variant is called by its colour; surfaces have patterns and keep their names."""
    colours = reader.read(link.target, images=False).meta["look"]["colours"]
    return {element: colours[element]["name"] if element in colours else element for element in link.changed}


def _elements(
    model: Editor,
    pair: Pair,
    reader: ShardReader,
    links: list[Link],
    means: Means,
    rows: dict[str, Rows],
    seed: int,
    steps: int | None,
) -> tuple[Tensor, float]:
    """Score replaced elements; returns those asked for in words, and the largest difference outside."""
    observation, future = pair.source.observation, pair.source.future
    now, mask = observation.rgb.shape[1] - 1, pair.mask[:, observation.rgb.shape[1] :]
    old, truth = future.rgb.float() / 255, pair.target.future.rgb.float() / 255
    mask = mask & _valid(pair, model.spec)[..., None, None]
    flat = _painted(pair, reader, links, means)
    largest = pair.mask[:, now].flatten(2).sum(2).argmax(1)
    every = torch.arange(len(links))
    reference = reference_pictures(pair.target.observation.rgb[every, now, largest], pair.mask[every, now, largest])
    shown, outside = old, 0.0
    for name, (words, picture, blank) in REQUESTS.items():
        raw = model.edit(
            observation,
            future,
            pair.mask,
            generator=torch.Generator().manual_seed(seed),
            text=pair.text if words else None,
            reference=reference.rgb if picture else None,
            blank=blank,
            steps=steps,
            raw=True,
        )
        drawn = composite(raw, future, pair.mask[:, now + 1 :])
        shown = drawn if name == "words" else shown
        beyond = (~pair.mask[:, now + 1 :]).unsqueeze(3)
        outside = max(outside, ((drawn - old).abs() * beyond).max().item())
        score = {"source_unchanged": old, "asked_colour,_flat": flat}
        _put(rows, f"element_inside/{name}", *_against(_pixel_error, drawn, score, truth, mask))
        _put(rows, f"element_colour/{name}", *_against(_colour_error, drawn, score, truth, mask))
        seen = ~mask & _valid(pair, model.spec)[..., None, None]
        _put(rows, f"element_outside/{name}", _pixel_error(raw, old, seen), {})
    return shown, outside


def _views(
    model: Editor, pair: Pair, means: Means, rows: dict[str, Rows], seed: int, steps: int | None, plane: float
) -> Tensor:
    """Score other views, and each view made from one other recorded view; returns the former."""
    observation, future, target = pair.source.observation, pair.source.future, pair.target
    spec, truth = model.spec, target.future.rgb.float() / 255
    lens = target.observation.intrinsics[:, -1]
    path = torch.cat([target.observation.camera_to_base[:, -1:], target.future.camera_to_base], 1)
    b, v = observation.has_rgb.shape
    mean = means.views.expand_as(truth)
    results = {}
    for views in [None, *range(v)] if v > 1 else [None]:
        chosen = torch.arange(v).expand(b, v) if views is None else torch.full((b, v), views)
        drawn = model.view(
            observation,
            future,
            lens,
            path,
            generator=torch.Generator().manual_seed(seed),
            views=chosen,
            steps=steps,
        )
        results[views] = drawn
        copied = future.rgb.float()[:, :, chosen[0]] / 255
        moved = through_plane(observation, future, lens, path, chosen, stride=spec.stride, plane=plane)[0]
        baselines = {"copied_picture": copied, "plane_alone": moved[:, 1:] * 0.5 + 0.5, "mean_picture": mean}
        for camera in range(v):
            if views == camera:
                continue
            name = "view" if views is None else "across"
            mask = _valid(pair, spec) & (torch.arange(v) == camera)
            for figure, error in (("psnr", metrics.squared_error), ("ssim", metrics.ssim)):
                ours, others = _against(error, drawn, baselines, truth, mask)
                _put(rows, f"{name}_{figure}/{spec.cameras[camera]}", ours, others)
    return results[None]


def _painted(pair: Pair, reader: ShardReader, links: list[Link], means: Means) -> Tensor:
    """The recording with every changed element in the mean colour of what it is asked to be."""
    out = pair.source.future.rgb.float() / 255
    assert pair.source.masks is not None
    for i, link in enumerate(links):
        for element, name in colour_names(reader, link).items():
            where = pair.source.masks.future[i] == pair.source.masks.elements.index(element)
            colour = means.colours.get(name, torch.full((3,), 0.5))
            out[i] = torch.where(where.unsqueeze(2), colour[:, None, None], out[i])
    return out


def _pixel_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Sums:
    return metrics.masked_sums((predicted - target).square().mean(3), mask)


def _colour_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Sums:
    """Distance of mean colours under the mask (B, T, V, h, w) of the whole clip."""
    inside = mask.unsqueeze(3)
    difference = ((predicted - target) * inside).sum((1, 2, 4, 5)) / inside.sum((1, 2, 4, 5)).clamp(min=1)
    return Sums(difference.norm(dim=-1, keepdim=True).double(), mask.flatten(1).any(1, keepdim=True).double())


def _against(
    error: Callable[[Tensor, Tensor, Tensor], Sums],
    drawn: Tensor,
    baselines: dict[str, Tensor],
    truth: Tensor,
    mask: Tensor,
) -> tuple[Sums, dict[str, Sums]]:
    return error(drawn, truth, mask), {name: error(value, truth, mask) for name, value in baselines.items()}


def _put(rows: dict[str, Rows], name: str, ours: Sums, baselines: dict[str, Sums]) -> None:
    rows.setdefault(name, Rows()).add(ours, **baselines)


def _valid(pair: Pair, spec: ClipSpec) -> Tensor:
    """Which future pictures count, (B, F*R, V)."""
    has = pair.source.observation.has_rgb & pair.target.observation.has_rgb
    return pair.target.future.valid.repeat_interleave(spec.stride, 1)[:, :, None] & has[:, None]


def _samples(pair: Pair, drawn: Tensor, links: list[Link], spec: ClipSpec, count: int = 6) -> list[dict]:
    shown = (drawn.clamp(0, 1) * 255).round().to(torch.uint8)
    parts = (pair.source.future.rgb, shown, pair.target.future.rgb)
    return [
        {
            "asked": links[i].edit,
            "key": pair.key[i],
            "video": {camera: [part[i, :, v].numpy() for part in parts] for v, camera in enumerate(spec.cameras)},
        }
        for i in range(min(count, len(links)))
    ]


def _clip(pairs: PairDataset, index: int) -> Clip:
    link, step = pairs.locate(index)
    entry, spec = pairs.reader.entries[link.source], pairs.spec
    nothing = torch.zeros(spec.action)
    points = torch.zeros(spec.points, dtype=torch.bool)
    return Clip(index, entry.key, entry.task, link.edit, step, points, nothing.bool(), nothing)
