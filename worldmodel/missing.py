"""Offline evaluation with senses missing at test time: what one checkpoint loses with each of them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from worldmodel.conditioning import Flags
from worldmodel.contracts import Future, Observation, Prediction, Separation, Understanding
from worldmodel.data.shards import ShardReader
from worldmodel.data.transforms import PRESENCE, hide
from worldmodel.errors import ConfigError
from worldmodel.evaluation import Evaluated, counted, measure
from worldmodel.figures import summarise
from worldmodel.metrics import Rows, Sums, bootstrap, resampling_counts, summary
from worldmodel.model import WorldModel
from worldmodel.trials import row_name

ONE_CAMERA = "one_camera"
"""Stands for a row per camera, with that one alone."""
NOTHING = "nothing"
NAMES = {
    "rgb": "images",
    "camera": "camera poses",
    "points": "3D points and trajectories",
    "touch": "touch",
    "proprio": "proprioception",
    "text": "instruction",
}

ROOTED = {
    "rgb": ("video_psnr", "video_ssim", "video_joint", "video_given_actions", "video_given_camera",
            "video_given_points", "object_given_points"),
    "camera": ("camera_path_translation", "camera_path_rotation", "camera_given_actions", "camera_followed",
               "video_given_camera"),
    "points": ("trajectory_ade", "trajectory_fde", "trajectory_moving", "trajectory_given_actions",
               "points_followed", "video_given_points", "object_given_points"),
}  # fmt: skip
"""Figures of what is predicted as a change of what is sensed now, by the sense: without it nothing can be asked."""


@dataclass(frozen=True)
class Absent:
    """What is not there: whole senses, and cameras with their images and poses."""

    senses: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()


def absences(missing: Sequence[str], cameras: Sequence[str]) -> dict[str, Absent]:
    """What each row of the table lacks, by its name: senses, and with `one_camera` all cameras but one, for each.

    Raises ConfigError for an unknown name.
    """
    found: dict[str, Absent] = {}
    for name in missing:
        if name == ONE_CAMERA:
            for kept in cameras if len(cameras) > 1 else ():
                found[f"all cameras but {kept}"] = Absent(cameras=tuple(c for c in cameras if c != kept))
        elif name in PRESENCE:
            found[NAMES[name]] = Absent(senses=(name,))
        else:
            raise ConfigError(f"missing: unknown {name!r}; valid: {', '.join([*PRESENCE, ONE_CAMERA])}")
    return found


class Without:
    """A model that is not shown what is absent; what its answers are held against stays.

    Presence masks are cleared and contents replaced by what data without the sense hold there: predictions start from
    what is sensed now, so that a mask alone would let it through.
    """

    def __init__(self, model: Evaluated, absent: Absent) -> None:
        self.model, self.absent = model, absent
        self.spec, self.metadata = model.spec, model.metadata
        self.motion = getattr(model, "motion", None)
        self._kept = torch.tensor([camera not in absent.cameras for camera in self.spec.cameras])

    @property
    def givable(self) -> Sequence[str]:
        """Which conditions its synthesis can be given."""
        return self.model.givable

    def shown(self, observation: Observation) -> Observation:
        """What is left of an observation."""
        left = hide(observation, self.absent.senses)
        left = left._replace(has_rgb=left.has_rgb & self._kept, has_camera=left.has_camera & self._kept)
        posed = left.has_camera[:, None, :, None, None]
        tracked, felt = left.has_points[:, None], left.has_wrench[:, None, None, :, None]
        return left._replace(
            rgb=left.rgb * left.has_rgb[:, None, :, None, None, None],
            intrinsics=torch.where(posed, left.intrinsics, torch.eye(3)),
            camera_to_base=torch.where(posed, left.camera_to_base, torch.eye(4)),
            points=left.points * tracked[..., None],
            visible=left.visible & tracked,
            wrench=left.wrench * felt,
            taxels=left.taxels * left.has_taxels[:, None, :, None, None, None],
            proprio=left.proprio * left.has_proprio[:, None, None],
            text=left.text * left.has_text[:, None],
        )

    def recorded(self, left: Observation, future: Future) -> Future:
        """What is left of a future that conditions a prediction."""
        posed = left.has_camera[:, None, :, None, None]
        return future._replace(
            rgb=future.rgb * left.has_rgb[:, None, :, None, None, None],
            camera_to_base=torch.where(posed, future.camera_to_base, torch.eye(4)),
            points=future.points * left.has_points[:, None, :, None],
            visible=future.visible & left.has_points[:, None],
            wrench=future.wrench * left.has_wrench[:, None, :, None],
        )

    def predict(
        self,
        observation: Observation,
        future: Future | None,
        mode: str,
        *,
        generator: torch.Generator,
        steps: int | None = None,
        coupling: str | None = None,
        given: Flags | None = None,
    ) -> Prediction:
        """Answer one of the five modes from what is left."""
        left = self.shown(observation)
        known = None if future is None else self.recorded(left, future)
        return self.model.predict(left, known, mode, generator=generator, steps=steps, coupling=coupling, given=given)

    def understand(self, observation: Observation) -> Understanding:
        """Read the heads of stage 1 from what is left."""
        return self.model.understand(self.shown(observation))

    def separate(self, observation: Observation, future: Future) -> Separation:
        """Separate what moves from what stands; only a model with `motion` does."""
        left = self.shown(observation)
        return cast(WorldModel, self.model).separate(left, self.recorded(left, future))

    def reconstruct(self, rgb: Tensor) -> Tensor:
        """Send clips through the tokeniser and back: it sees pictures alone, whatever else is absent."""
        return self.model.reconstruct(rgb)


def evaluate_missing(
    model: Evaluated,
    reader: ShardReader,
    split: str,
    missing: Mapping[str, Absent],
    *,
    clips_per_episode: int,
    batch_size: int,
    seed: int,
    sampler_steps: int | None,
    max_clips: int,
) -> dict[str, Any]:
    """Every offline figure with each of `missing`, by its name, hidden from the model, on the same clips and noise.

    The truth and the clips that count stay those of nothing missing. Returns plain values: `complete` (the figures with
    nothing missing) and `rows`, each with `missing` and per figure its value with interval, and the `difference` to
    nothing missing with its paired interval over episodes. Raises as `evaluate_offline` does.
    """
    started = time.perf_counter()
    settings: dict[str, Any] = {
        "clips_per_episode": clips_per_episode,
        "batch_size": batch_size,
        "seed": seed,
        "sampler_steps": sampler_steps,
        "max_clips": max_clips,
    }
    full = measure(model, reader, split, **settings)
    complete = summarise({name: Rows(row.ours) for name, row in full.rows.items()}, full.clips, seed)["figures"]
    rows = []
    for name, absent in missing.items():
        less = measure(Without(model, absent), reader, split, **settings).rows
        paired = {figure: Rows(row.ours, {NOTHING: full.rows[figure].ours}) for figure, row in less.items()}
        figures = summarise(paired, full.clips, seed)["figures"]
        rows.append({"missing": name, "figures": {figure["name"]: _paired(figure) for figure in figures}})
    kept = ("name", "stream", "label", "unit", "higher_is_better", "headline", "ours")
    return {
        "split": split,
        **counted(full.clips),
        "settings": settings,
        "seconds": round(time.perf_counter() - started, 1),
        "complete": [{key: figure[key] for key in kept} for figure in complete],
        "rows": rows,
    }


def _paired(figure: dict[str, Any]) -> dict[str, Any]:
    (whole,) = figure["baselines"]
    return figure["ours"] | {"difference": whole["difference"], "better": whole["beaten"], "clearly": whole["clearly"]}


def compare_success(
    results: Sequence[Mapping[str, Any]], lesser: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Closed-loop success without each sense: `lesser` by what is missing, beside the first of `results`.

    The difference is over the start states that both policies met, with its 95 % bootstrap interval over them.
    """
    rows = []
    for name, result in lesser.items():
        met = {row_name(task): task["outcomes"] for task in results[0]["tasks"]}
        pairs = [
            (f"{row_name(task)} {trial}", float(ours), float(theirs))
            for task in result["tasks"]
            for trial, (ours, theirs) in enumerate(zip(task["outcomes"], met[row_name(task)], strict=False))
        ]
        counts, owner = resampling_counts([start for start, *_ in pairs], config["seed"])
        ours, theirs = (
            bootstrap(Sums(column[:, None], torch.ones_like(column[:, None])), counts, owner)
            for column in torch.tensor([pair[1:] for pair in pairs], dtype=torch.float64).unbind(1)
        )
        difference = summary(ours - theirs)
        rows.append(
            {
                "missing": name,
                "mean_success": result["mean_success"],
                "interval": result["interval"],
                "trials": len(pairs),
                "difference": difference._asdict(),
                "better": difference.value > 0,
                "clearly": difference.low > 0 or difference.high < 0,
            }
        )
    return rows


def drop_rootless(result: dict[str, Any], hidden: Sequence[str]) -> dict[str, Any]:
    """An offline result without the figures of displacements that have no place to start from (see `ROOTED`)."""
    gone = {name for sense in hidden for name in ROOTED.get(sense, ())}

    def stays(name: str) -> bool:
        return name.split("/")[0] not in gone

    return result | {
        "figures": [figure for figure in result["figures"] if stays(figure["name"])],
        **{part: {name: v for name, v in result[part].items() if stays(name)} for part in ("horizons", "per_task")},
    }
