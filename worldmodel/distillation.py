"""Distillation: a student learns to reach in a few sampling steps what its guided teacher reaches in many."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from worldmodel.checkpoint import load_model
from worldmodel.conditioning import GUIDABLE, GuidedFlow, give
from worldmodel.contracts import Batch
from worldmodel.data.transforms import hide, modality_dropout
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError
from worldmodel.joint import Memory
from worldmodel.losses import action_mask, asked_slots, by_level, distance, draw_flags, masked_mean
from worldmodel.model import DENOISED, WorldModel
from worldmodel.nn import repeat_rows
from worldmodel.synthesis.conditions import Given
from worldmodel.synthesis.flow import add_noise, clean_to_velocity
from worldmodel.synthesis.sampler import integrate, sampling_sigmas


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a phase distils: the teacher's samples of `teacher_steps`, into a student of any of `student_steps`.

    `guidance` has the scales at which the teacher's streams follow their conditions; the student follows them as far
    with one pass. Mode `policy` is distilled unguided, as it is deployed. `teacher` is a checkpoint folder; None is the
    model as the phase found it.

    From the line between a noise and the teacher's sample of it the student answers with that sample: reflow (Liu et
    al. 2022, arXiv 2209.03003, section 2.2), and its distillation where the line begins.
    """

    teacher_steps: int
    student_steps: tuple[int, ...]
    guidance: Mapping[str, float] = field(default_factory=dict)
    teacher: str | None = None

    def __post_init__(self) -> None:
        if not self.student_steps or min(self.student_steps) < 1 or max(self.student_steps) > self.teacher_steps:
            raise ConfigError(
                f"distillation: student_steps {list(self.student_steps)} of a teacher of {self.teacher_steps} steps; "
                "they are one or more numbers from 1 to teacher_steps"
            )
        if unknown := sorted(set(self.guidance) - set(GUIDABLE)):
            raise ConfigError(f"distillation.guidance.{unknown[0]} is none of {', '.join(GUIDABLE)}")

    def levels(self, rows: int, shift: float, generator: Draws) -> Tensor:
        """Random noise levels (rows,) at which a student of any of `student_steps` samples, each number as often."""
        paths = [torch.tensor(sampling_sigmas(count, shift)[:-1], dtype=torch.float32) for count in self.student_steps]
        weights = torch.cat([torch.full((count,), 1 / count) for count in self.student_steps])
        return torch.cat(paths)[generator.categorical(weights, rows)]


def make_teacher(model: WorldModel, trains: tuple[str, ...], folder: str | None) -> WorldModel:
    """The model as it is now, whatever becomes of the parts that a phase trains; or the checkpoint in a folder.

    Parts that are not trained are shared. Raises `ConfigError` for a checkpoint whose samples mean something else to
    `model`: of another spec, other statistics, another tokeniser or other streams.
    """
    if folder is None:
        shared = [part for name, part in model.named_children() if name not in trains]
        teacher = copy.deepcopy(model, {id(part): part for part in shared})
        for name in trains:
            getattr(teacher, name).requires_grad_(False)
        return teacher
    teacher = load_model(Path(folder)).requires_grad_(False)
    ours, theirs = (m.autoencoder.state_dict() for m in (model, teacher))
    same = {
        "data.spec": teacher.spec == model.spec,
        "statistics": teacher.statistics_hash == model.statistics_hash,
        "synthesis.autoencoder": ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours),
        "synthesis.denoiser.streams": teacher.denoiser.streams == model.denoiser.streams,
    }
    if other := [name for name, equal in same.items() if not equal]:
        raise ConfigError(f"distillation.teacher {folder}: its {other[0]} is not that of the student")
    return teacher


def distillation_loss(
    model: WorldModel,
    teacher: WorldModel,
    batch: Batch,
    latents: Tensor | None,
    generator: Draws,
    *,
    settings: Distillation,
    mode: str,
    drop: tuple[str, ...],
    dropout: Mapping[str, float],
    draws: int,
    weights: Mapping[str, float],
    insulate: bool,
    huber: float | None,
    given: Mapping[str, float],
    absent: float,
) -> dict[str, Tensor]:
    """Distance of the student's answers from the teacher's samples of whatever `mode` denoises.

    All but `settings` is as in `losses.clip_loss`, and errors are measured as there.
    """
    observation, _ = modality_dropout(hide(batch.observation, drop), dropout, generator)
    future = batch.future
    s = model.normaliser(observation, model.grid)
    policy = mode == "policy"
    do_streams, do_actions = DENOISED[mode]
    draws = draws if policy else 1
    clean: dict[str, Tensor] = {}
    flags: dict[str, Tensor] = {}
    lacks: dict[str, Tensor] = {}
    if not policy:
        with torch.no_grad():
            truth = model.future_state(s, future, model.future_latents(observation, future))
        clean = {name: getattr(truth, name) for name in model.denoiser.streams}
        flags, lacks = draw_flags(model, mode, s.text.shape[0], generator, given, absent, s.text.device)
    if mode != "video_prediction":
        actions = model.normaliser.standardise("action", future.actions, s.embodiment)
        clean["actions"] = repeat_rows(actions, draws)
    like = {name: value for name, value in clean.items() if (do_actions if name == "actions" else do_streams)}
    fixed = {name: value for name, value in clean.items() if name not in like}

    def conditions(of: WorldModel, without: str | None = None) -> Given | None:
        if policy:
            return None
        denied = {} if without in (None, "text") else {without: False}
        # Only rows that were given the condition lack it now; the others are not guided by it.
        lacking = {} if without not in flags else {without: rowwise(flags[without]) | lacks.get(without, False)}
        views = clean.get("video")
        return give(of, observation, s, future, flags | denied, lacks=lacks | lacking, latents=views)

    memory = model.remember(s, latents, read_only=insulate and policy)
    known = conditions(model)
    student = GuidedFlow(model, {None: memory}, {None: known}, fixed, {}, model.coupling)
    with torch.no_grad():
        told = (*flags, "text", "embodiment") if do_streams else ()
        scales = {name: scale for name, scale in settings.guidance.items() if name in told}
        memories: dict[str | None, Memory] = {None: teacher.remember(s, latents)}
        if "text" in scales:
            memories["text"] = teacher.remember(s._replace(has_text=torch.zeros_like(s.has_text)), latents)
        asked = {name: conditions(teacher, name) for name in (None, *scales)}
        guide = GuidedFlow(teacher, memories, asked, fixed, scales, model.coupling)
        shift = model.shift() if do_streams else model.action_shift
        noise = {name: generator.randn(*value.shape).to(value) for name, value in like.items()}
        level = settings.levels(s.text.shape[0] * draws, shift, generator).to(s.points)
        target = integrate(guide, noise, sampling_sigmas(settings.teacher_steps, shift))
        noisy = {name: add_noise(value, noise[name], level) for name, value in target.items()}
    answer = student(noisy, level)
    losses: dict[str, Tensor] = {}
    levelled: dict[str, Tensor] = {}
    for name, goal in target.items():
        error = answer[name] - clean_to_velocity(goal, noisy[name], level)
        error = model.loss_weight(name, level, error) * error
        if name == "actions":
            error, asked = error.square(), repeat_rows(action_mask(future), draws)
        else:
            error, asked = distance(error, huber), asked_slots(memory, known, future, name)
        losses[name] = masked_mean(error, asked)
        levelled |= by_level(name, error, asked, level)
    total = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
    return {"loss": total, **{f"{mode}/{name}": value for name, value in losses.items()}, **levelled}


def rowwise(flag: Tensor) -> Tensor:
    """Whether anything is given in a row (B,), of flags per row or per slot."""
    return flag if flag.dim() == 1 else flag.any(1)
