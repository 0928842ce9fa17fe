"""Distillation: what an exact student loses, who learns, what a resumed phase finds, what is refused."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file, save_file
from test_conditioning import clip_of
from test_model import draws, generator

from worldmodel.checkpoint import build_model, describe, load_model, make_spec, save_model
from worldmodel.contracts import MODES, Batch
from worldmodel.curriculum import train
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics, statistics_hash
from worldmodel.distillation import Distillation, distillation_loss, make_teacher
from worldmodel.errors import ConfigError
from worldmodel.phases import Phase, make_phases
from worldmodel.synthesis.sampler import sampling_sigmas
from worldmodel.training import PhaseModule

PHASE = {
    "objective": "distill",
    "trains": ["denoiser", "expert"],
    "steps": 1,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "mixture": [{"mode": "video_prediction", "weight": 1.0}],
    "distillation": {"teacher_steps": 4, "student_steps": [1, 2]},
}
HOW = Distillation(teacher_steps=4, student_steps=(1, 2))


def batch_of(model) -> Batch:
    o, f = clip_of(model)
    return Batch(o, f, torch.zeros(2, model.spec.history, dtype=torch.long), ["a", "b"])


def loss(student, teacher, settings=HOW, mode="video_prediction", seed=0, **more) -> dict[str, torch.Tensor]:
    batch = batch_of(student)
    rest = {"drop": (), "dropout": {}, "draws": 1, "weights": {}, "insulate": False, "huber": None}
    rest |= {"given": {}, "absent": 0.0} | more
    latents = student.history_latents(batch.observation)
    return distillation_loss(student, teacher, batch, latents, draws(2, seed), settings=settings, mode=mode, **rest)


@pytest.mark.parametrize("mode", MODES)
def test_an_exact_student_loses_nothing_and_another_does(tiny_model, mode):
    """A model that always answers its guess samples it in any number of steps, so it is its own exact student."""
    how = Distillation(teacher_steps=4, student_steps=(1, 2, 4))
    for head in [*tiny_model.denoiser.embed_out.values(), tiny_model.expert.embed_out]:
        torch.nn.init.zeros_(head.weight)
    teacher = make_teacher(tiny_model, ("denoiser", "expert"), None)
    assert loss(tiny_model, teacher, how, mode)["loss"] < 1e-8
    for head in [*tiny_model.denoiser.embed_out.values(), tiny_model.expert.embed_out]:
        torch.nn.init.normal_(head.weight, std=0.2)
    found = loss(tiny_model, teacher, how, mode)
    expected = {"policy": {"actions"}, "inverse_dynamics": {"actions"}}.get(
        mode, {"video", "camera", "points", "force"}
    )
    expected = expected | {"actions"} if mode == "joint" else expected
    parts = {name: value for name, value in found.items() if not name.startswith("noise/")}
    assert set(parts) == {"loss", *(f"{mode}/{name}" for name in expected)}
    assert all(value > 1e-3 for value in parts.values())


@pytest.mark.parametrize(("predicts", "coupling"), [("clean", "history_only"), ("velocity", "joint")])
def test_a_teacher_of_one_step_is_its_own_student_but_for_guidance(tiny_model, predicts, coupling):
    tiny_model.predicts, tiny_model.coupling = predicts, coupling
    teacher = make_teacher(tiny_model, ("denoiser",), None)
    alone = Distillation(teacher_steps=1, student_steps=(1,))
    guided = Distillation(teacher_steps=1, student_steps=(1,), guidance={"text": 3.0})
    assert loss(tiny_model, teacher, alone, "joint")["loss"] < 1e-6
    assert loss(tiny_model, teacher, guided, "joint")["loss"] > 1e-4
    assert loss(tiny_model, teacher, guided, "policy")["loss"] < 1e-6, "actions are sampled unguided"


def test_the_target_is_the_sample_that_the_teacher_predicts(tiny_model):
    """From the same noise: `predict` in four steps, seen through the error of a student that answers its guess."""
    teacher = make_teacher(tiny_model, ("denoiser",), None)
    for head in tiny_model.denoiser.embed_out.values():
        torch.nn.init.zeros_(head.weight)
    how = Distillation(teacher_steps=4, student_steps=(1,))
    given = {"camera": 1.0}
    batch = batch_of(tiny_model)
    found = loss(tiny_model, teacher, how, given=given)["video_prediction/points"]
    drawn = draws(2)
    drawn.rand(2)  # of the rate
    senses = teacher.normaliser(batch.observation, teacher.grid)
    state = teacher.future_state(senses, batch.future, teacher.future_latents(batch.observation, batch.future))
    noise = {name: drawn.randn(*getattr(state, name).shape) for name in teacher.denoiser.streams}
    answer = teacher.predict(
        batch.observation,
        batch.future,
        "video_prediction",
        generator=generator(),
        steps=4,
        given={"camera": True},
        noise=noise,
    )
    points = teacher.future_points(teacher.normaliser(batch.observation, teacher.grid), answer.points)
    square = points.square()[batch.observation.has_points[:, None].expand(-1, teacher.spec.future, -1)].mean()
    torch.testing.assert_close(found, square, rtol=1e-3, atol=1e-5)


def test_guidance_moves_only_the_rows_that_were_given_the_condition(tiny_model):
    for parameter in tiny_model.denoiser.conditions.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    teacher = make_teacher(tiny_model, ("denoiser",), None)
    guided = Distillation(teacher_steps=1, student_steps=(1,), guidance={"camera": 3.0})
    assert loss(tiny_model, teacher, guided, given={"camera": 1.0})["loss"] > 1e-4
    assert loss(tiny_model, teacher, guided, given={"camera": 0.0})["loss"] < 1e-6


def test_only_what_a_phase_trains_learns_and_the_teacher_does_not(tiny_model):
    module = PhaseModule(model=tiny_model, phase=make_phases({"p": PHASE})[0], seed=0)
    teacher = module.teacher
    assert teacher is not None and teacher.encoder is tiny_model.encoder and teacher.denoiser is not tiny_model.denoiser
    before = copy.deepcopy(teacher.state_dict())
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module.losses(batch_of(tiny_model))["loss"].backward()
    optimiser.step()
    touched = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"denoiser"}, "no actions, no gradient of the action transformer"
    after = teacher.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(p, q) for p, q in zip(tiny_model.denoiser.parameters(), teacher.denoiser.parameters()))  # noqa: B905


def test_students_answer_where_they_sample():
    how = Distillation(teacher_steps=8, student_steps=(1, 4))
    level = how.levels(4000, 3.0, draws(4000))
    path = sampling_sigmas(4, 3.0)[:-1]
    rates = [(level - sigma).abs().lt(1e-6).float().mean().item() for sigma in path]
    assert rates == pytest.approx([0.5 + 0.125, 0.125, 0.125, 0.125], abs=0.03)


def test_a_checkpoint_can_teach_if_its_samples_mean_the_same(tiny_model, statistics, tmp_path):
    config = compose("experiment=kairos_tiny")["model"]
    tiny_model.metadata = describe(config, tiny_model.spec, statistics, statistics_hash(statistics), {})
    folder = str(save_model(tiny_model, tmp_path / "teacher"))
    teacher = make_teacher(tiny_model, (), folder)
    assert teacher.encoder is not tiny_model.encoder
    assert not any(p.requires_grad for p in teacher.parameters())
    assert loss(tiny_model, teacher, Distillation(teacher_steps=1, student_steps=(1,)))["loss"] < 1e-6
    with torch.no_grad():
        next(tiny_model.autoencoder.parameters()).add_(1.0)
    with pytest.raises(ConfigError, match=r"teacher .*: its synthesis.autoencoder is not that of the student"):
        make_teacher(tiny_model, (), folder)


def test_mistakes_are_named():
    def phase(**changes):
        how = PHASE["distillation"] | changes.pop("distillation", {})
        return make_phases({"p": {**PHASE, "distillation": how, **changes}})

    for changes, message in (
        ({"distillation": {"student_steps": [8]}}, r"student_steps \[8\] of a teacher of 4 steps"),
        ({"distillation": {"student_steps": []}}, r"one or more numbers from 1 to teacher_steps"),
        ({"distillation": {"guidance": {"colour": 2.0}}}, r"guidance.colour is none of text"),
        ({"distillation": {"guidance": {"actions": 2.0}}}, r"guidance.actions guides by what the phase never gives"),
        ({"distillation": {"stepz": 2}}, r"phase 'p': .*stepz"),
        ({"mixture": [{"mode": "proposal", "weight": 1.0}]}, r"mode 'proposal' samples nothing"),
        ({"mixture": []}, r"a mixture of modes belongs to objectives `world` and `distill`"),
        ({"objective": "world"}, r"`distillation` belongs to objective `distill`"),
        ({"chunks": 2}, r"more than 1 for objective `world` alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            phase(**changes)
    assert isinstance(phase(distillation={"guidance": {"text": 2.0}})[0], Phase)


@pytest.fixture(scope="module")
def teacher_run(tiny_dataset, tmp_path_factory) -> Path:
    """Random weights that say they were trained on the train split."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny")
    spec, statistics = make_spec(config["data"]["spec"]), load_statistics(tiny_dataset)
    model = build_model(config["model"], spec, statistics)
    for head in [*model.denoiser.embed_out.values(), model.expert.embed_out]:
        torch.nn.init.normal_(head.weight, std=0.2)
    trained = [e for e in ShardReader(tiny_dataset).entries if e.split == "train"]
    record = {"episodes": [e.key for e in trained], "tasks": sorted({e.task for e in trained})}
    record["data_root"] = str(tiny_dataset)  # pyright: ignore[reportArgumentType]
    metadata = describe(config["model"], spec, statistics, statistics_hash(statistics), record)
    return save_model(model, tmp_path_factory.mktemp("runs") / "teacher", metadata)


def short(dataset: Path, init: Path, run: Path) -> dict:
    """A run of seconds."""
    rows = {"steps": 4, "batch_size": 3, "warmup": 1, "distillation.teacher_steps": 4}
    return compose(
        "experiment=kairos_tiny_distilled",
        f"data.root={dataset}",
        f"init={init}",
        f"run_dir={run}",
        "wandb.mode=disabled",
        "trainer.threads=1",
        "trainer.save_every=2",
        "phases.distill.mixture=[{mode: joint, weight: 1.0}]",
        *(f"phases.distill.{name}={value}" for name, value in rows.items()),
    )


@pytest.fixture(scope="module")
def student_run(tiny_dataset, teacher_run, tmp_path_factory) -> Path:
    return train(short(tiny_dataset, teacher_run, tmp_path_factory.mktemp("runs") / "student"))


def test_a_phase_leaves_a_student_with_its_own_number_of_steps(teacher_run, student_run):
    student, teacher = load_model(student_run), load_model(teacher_run)
    assert (student.stream_steps, student.action_steps) == (1, 1)
    assert not any(name.startswith("teacher.") for name in student.state_dict())
    ours, theirs = student.state_dict(), teacher.state_dict()
    moved = {name.split(".")[0] for name in ours if not torch.equal(ours[name], theirs[name])}
    assert moved == {"denoiser", "expert"}, "what a student answers is in the units of its teacher"


def test_a_resumed_phase_has_the_same_teacher(tiny_dataset, teacher_run, student_run, tmp_path, monkeypatch):
    """Even if the weights that it started from were replaced meanwhile."""
    init, step = tmp_path / "init.safetensors", PhaseModule.training_step
    shutil.copy(teacher_run / "model.safetensors", init)
    settings = short(tiny_dataset, init, tmp_path / "run")

    def stopped(self, batch, number):
        if self.global_step == 3:
            raise KeyError("power cut")
        return step(self, batch, number)

    monkeypatch.setattr(PhaseModule, "training_step", stopped)
    with pytest.raises(KeyError, match="power cut"):
        train(settings)
    monkeypatch.undo()
    assert (tmp_path / "run" / "phases" / "0-distill" / "last.ckpt").is_file()
    save_file({n: v + 1 if n.startswith(("denoiser", "expert")) else v for n, v in load_file(init).items()}, init)
    resumed, whole = (load_file(run / "model.safetensors") for run in (train(settings), student_run))
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], msg=name)


def test_the_benchmark_compares_students_with_their_teacher(teacher_run, student_run, tmp_path):
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from benchmarks.distillation import arguments, run, table

    words = f"{teacher_run} {student_run} --teacher-steps 1 2 --steps 1 --clips 4 --batch 2 --ticks 2 --trials 1"
    words += f" --trial-steps 1 --tasks drawer-close-v3 --workers 0 --out {tmp_path / 'rows.json'}"
    rows, head = run(arguments().parse_args(words.split()))
    assert [(row["model"], row["steps"]) for row in rows] == [("teacher", 1), ("teacher", 2), ("student", 1)]
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert not any("agreement" in name for name in rows[1]["figures"]), "nobody agrees with himself by merit"
    for row in (rows[0], rows[2]):
        assert row["figures"]["action/agreement"]["value"] > 0
        assert row["closed_loop"]["tasks"][0]["trials"] == 1
    lines = table(rows, head).splitlines()
    assert len(lines) == 4 + len(rows) and len({line.count("|") for line in lines[2:]}) == 1
