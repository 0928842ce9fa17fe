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
from worldmodel.errors import ConfigError
from worldmodel.joint import Memory
from worldmodel.losses import action_mask, asked_slots, distance, draw_flags, masked_mean
from worldmodel.model import DENOISED, WorldModel
from worldmodel.nn import repeat_rows
from worldmodel.synthesis.conditions import Given
from worldmodel.synthesis.flow import add_noise, clean_to_velocity, expand_as
from worldmodel.synthesis.sampler import integrate, sampling_sigmas

METHODS = ("endpoint", "consistency")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a phase distils: the teacher's samples of `teacher_steps`, into a student of any of `student_steps`.

    `guidance` has the scales at which the teacher's streams follow their conditions; the student follows them as far
    with one pass. Actions are distilled unguided, as a policy samples them. `teacher` is a checkpoint folder; None is
    the model as the phase found it.

    Methods: `endpoint` regresses, from the line between a noise and the teacher's sample of it, onto that sample
    (reflow, Liu et al. 2022, arXiv 2209.03003, section 2.2, and its distillation where the line begins). `consistency`
    makes the student's answers at two neighbouring points of the teacher's path agree (Song et al. 2023, arXiv
    2303.01469, algorithm 2, without a moving average, after Song & Dhariwal 2023, arXiv 2310.14189, section 3.2).
    """

    teacher_steps: int
    student_steps: tuple[int, ...]
    method: str = "endpoint"
    guidance: Mapping[str, float] = field(default_factory=dict)
    teacher: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"distillation.method {self.method!r} is none of {', '.join(METHODS)}")
        if not self.student_steps or min(self.student_steps) < 1 or max(self.student_steps) > self.teacher_steps:
            raise ConfigError(
                f"distillation: student_steps {list(self.student_steps)} of a teacher of {self.teacher_steps} steps; "
                "they are one or more numbers from 1 to teacher_steps"
            )
        if unknown := sorted(set(self.guidance) - set(GUIDABLE)):
            raise ConfigError(f"distillation.guidance.{unknown[0]} is none of {', '.join(GUIDABLE)}")
        if self.method == "consistency" and any(self.teacher_steps % n for n in self.student_steps):
            raise ConfigError(
                f"distillation: consistency needs student_steps that divide teacher_steps, {self.teacher_steps}; "
                f"they are {list(self.student_steps)}"
            )

    def levels(self, rows: int, shift: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random noise levels (rows,) at which the student answers, and those (rows,) that the teacher goes to next.

        `endpoint`: levels at which a student of any of `student_steps` samples, each number of steps as often as the
        others. `consistency`: levels of the teacher's path.
        """
        counts = self.student_steps if self.method == "endpoint" else (self.teacher_steps,)
        paths = [torch.tensor(sampling_sigmas(count, shift), dtype=torch.float32) for count in counts]
        weights = torch.cat([torch.full((count,), 1 / count) for count in counts])
        pick = torch.multinomial(weights, rows, replacement=True, generator=generator)
        return torch.cat([p[:-1] for p in paths])[pick], torch.cat([p[1:] for p in paths])[pick]


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


def lesson(
    settings: Distillation,
    guide: GuidedFlow,
    student: GuidedFlow,
    data: Mapping[str, Tensor],
    shift: float,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Noisy values, their noise levels, one per row, and the clean values that the student should see behind them.

    `data` has what happened, of which `endpoint` uses the shapes alone.
    """
    noise = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in data.items()}
    first = next(iter(data.values()))
    level, then = (x.to(first) for x in settings.levels(first.shape[0], shift, generator))
    if settings.method == "endpoint":
        target = integrate(guide, noise, sampling_sigmas(settings.teacher_steps, shift))
        return {name: add_noise(value, noise[name], level) for name, value in target.items()}, level, target
    noisy = {name: add_noise(value, noise[name], level) for name, value in data.items()}
    step = guide(noisy, level)
    near = {name: z + expand_as(then - level, z) * step[name] for name, z in noisy.items()}
    answer = student(near, then)
    return noisy, level, {name: z - expand_as(then, z) * answer[name] for name, z in near.items()}


def distillation_loss(
    model: WorldModel,
    teacher: WorldModel,
    batch: Batch,
    latents: Tensor | None,
    generator: torch.Generator,
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
            target = model.future_state(s, future, model.future_latents(observation, future))
        clean = {name: getattr(target, name) for name in model.denoiser.streams}
        flags, lacks = draw_flags(model, mode, s.text.shape[0], generator, given, absent, s.text.device)
    if mode != "video_prediction":
        actions = model.normaliser.standardise("action", future.actions, s.embodiment)
        clean["actions"] = repeat_rows(actions, draws)
    data = {name: value for name, value in clean.items() if (do_actions if name == "actions" else do_streams)}
    fixed = {name: value for name, value in clean.items() if name not in data}

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
        shift = model.stream_shift if do_streams else model.action_shift
        noisy, level, target = lesson(settings, guide, student, data, shift, generator)
    answer = student(noisy, level)
    losses: dict[str, Tensor] = {}
    for name, goal in target.items():
        error = answer[name] - clean_to_velocity(goal, noisy[name], level)
        error = model.loss_weight(name, level, error) * error
        if name == "actions":
            losses[name] = masked_mean(error.square(), repeat_rows(action_mask(future), draws))
        else:
            losses[name] = masked_mean(distance(error, huber), asked_slots(memory, known, future, name))
    total = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
    return {"loss": total, **{f"{mode}/{name}": value for name, value in losses.items()}}


def rowwise(flag: Tensor) -> Tensor:
    """Whether anything is given in a row (B,), of flags per row or per slot."""
    return flag if flag.dim() == 1 else flag.any(1)
