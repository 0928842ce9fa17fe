"""Closed loop and protocol of several arms, one of them held out, on a made-up simulator in robosuite's place."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arm_fakes import HELDOUT, TASKS, TRAINED, Arm, Arms
from conftest import compose
from synthetic import made_up_episode
from test_model import generator, observation_of
from test_published import settings, tiny

from export.__main__ import main
from worldmodel import published
from worldmodel.baselines import BCMLPPolicy, gather_samples, load_bc_mlp, train_bc_mlp
from worldmodel.checkpoint import build_model, describe, load_model, make_spec, save_model
from worldmodel.closed_loop import Rollout, SourceScenes, run_closed_loop, trial_generator
from worldmodel.contracts import Policy
from worldmodel.controllers import CheckpointFactory, ExpertFactory
from worldmodel.data.shard_writer import write_index, write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.collect import collect_episode
from worldmodel.data.sources.registry import SOURCES, simulated
from worldmodel.data.statistics import load_statistics, merge_statistics, statistics_hash, write_statistics
from worldmodel.errors import ConfigError, ContractError, DataError
from worldmodel.holdout import check_unseen
from worldmodel.protocol import evaluate
from worldmodel.run_folder import training_record

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """Two demonstrations of each task by each trained arm, and held-out episodes of all three."""
    root = tmp_path_factory.mktemp("arms") / "data"
    root.mkdir()
    shards = []
    plan = (("train", TRAINED, 2), ("heldout_episodes", TRAINED, 1), ("heldout_robots", [HELDOUT], 1))
    for split, robots, count in plan:
        for task in TASKS:
            for robot in robots:
                samples = []
                for i in range(count):
                    rng = np.random.default_rng([len(shards), i])
                    episode = collect_episode(Arm(task, robot, 64, ("front", "wrist")), rng)  # pyright: ignore
                    key = f"arms-{task}-{robot}-{split}-{i}"
                    episode.meta |= {"episode_id": key, "split": split}
                    samples.append((key, episode))
                shards.append(write_shard(root / f"shard-{len(shards):06d}.tar", samples))
    write_index(root, shards, [], {"generated": {"source": "robosuite"}})
    write_statistics(root)
    return ShardReader(root)


@pytest.fixture(scope="module")
def run(reader: ShardReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of an untrained model that knows the trained arms."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny", f"data.root={reader.root}", f"data.spec.embodiments={TRAINED}")
    spec, statistics = make_spec(config["data"]["spec"]), load_statistics(reader.root)
    model = build_model(config["model"], spec, statistics)
    for layer in [*model.denoiser.embed_out.values(), model.expert.embed_out]:
        torch.nn.init.normal_(layer.weight, std=0.2)
    record = training_record(config, [reader])
    digest = statistics_hash(statistics)
    folder = tmp_path_factory.mktemp("runs") / "arms"
    return save_model(model, folder, describe(config["model"], spec, statistics, digest, record))


def test_start_states_differ_between_robots_and_from_recorded_episodes() -> None:
    def state(rng: np.random.Generator) -> int:
        return int(rng.integers(2**62))

    trials = [
        state(trial_generator(0, task, trial, 0, robot))
        for task in TASKS
        for trial in range(10)
        for robot in (None, *TRAINED, HELDOUT)
    ]
    episodes = [
        state(np.random.default_rng(np.random.SeedSequence([0, split, task, number, robot])))
        for split in range(4)
        for task in range(7)
        for number in range(10)
        for robot in range(5)
    ]
    assert len({*trials, *episodes}) == len(trials) + len(episodes)


def test_success_is_counted_per_task_and_robot_by_policies_built_for_it() -> None:
    built: list[str] = []

    def make(robot: str) -> Policy:
        built.append(robot)
        return ExpertFactory()(robot)

    robots = ["panda", "ur5e"]
    how: dict[str, Any] = {"trials": 3, "replan": 1, "image_every": 0, "record": 1, "progress": False}
    result = run_closed_loop(make, list(TASKS), robots=robots, workers=0, make_scene=Arms(), **how)
    assert built == robots
    assert [row.name for row in result.tasks] == [f"{task} by {robot}" for robot in robots for task in TASKS]
    assert all(row.successes == 3 for row in result.tasks) and set(result.frames) == {row.name for row in result.tasks}
    said = json.loads(json.dumps(result.to_json()))
    assert said["max_steps"] == TASKS
    rows = [(row["robot"], row["trials"], row["success"]) for row in said["robots"]]
    assert rows == [("panda", 6, 1), ("ur5e", 6, 1)]
    assert "| all tasks by ur5e | 100% |" in result.table()
    alone = run_closed_loop(make, ["Stack"], robots=["ur5e"], workers=0, make_scene=Arms(), **how)
    assert alone.tasks == result.tasks[3:], "a trial is the same whichever other robots run"
    spawned = run_closed_loop(ExpertFactory(), list(TASKS), robots=robots, workers=2, make_scene=Arms(), **how)
    assert spawned.to_json() == result.to_json()


def test_a_trial_ends_after_the_tasks_own_steps_and_holds_with_the_robots_own_action() -> None:
    class Still:
        def reset(self) -> None: ...

        def observe(self, observation: dict[str, Any]) -> None: ...

        def act(self) -> np.ndarray:
            return np.zeros((8, 7))

    scene = Arm("Stack", "ur5e", 64, ("front",))
    trial = Rollout(delay=2)(scene, Still(), "Stack", 0, "ur5e")
    assert (trial.steps, trial.max_steps, trial.success) == (TASKS["Stack"], TASKS["Stack"], False)
    assert Rollout(max_steps=5)(scene, Still(), "Stack", 0, "ur5e").steps == 5
    with pytest.raises(ConfigError, match="0 robots"):
        run_closed_loop(ExpertFactory(), ["Lift"], robots=[], workers=0, make_scene=Arms())


def test_scenes_and_simulators_come_from_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "robosuite", replace(SOURCES["robosuite"], make_scene=Arm))  # pyright: ignore
    scene = SourceScenes(32, ("wrist",), "robosuite")("Lift", "iiwa")
    assert isinstance(scene, Arm) and (scene.embodiment, scene.pixels, scene.cameras) == ("iiwa", 32, ("wrist",))
    assert simulated(["human", "ur5e", "panda"]) == (SOURCES["robosuite"], ["ur5e", "panda"])
    assert SOURCES["metaworld"].told_apart(["sawyer"]) == (None,)
    assert SOURCES["robosuite"].told_apart(["iiwa"]) == ("iiwa",)
    with pytest.raises(ConfigError, match=r"\['gr1'\] are not simulated here \(metaworld: sawyer; robosuite: panda"):
        simulated(["gr1"])


def test_a_robot_that_was_not_trained_on_is_the_mean_of_those_alike(run: Path, reader: ShardReader) -> None:
    known, model = load_model(run), load_model(run, [HELDOUT, "panda", "iiwa"])
    assert model.spec.embodiments == (*TRAINED, HELDOUT, "iiwa") and known.spec.embodiments == tuple(TRAINED)
    # panda alone has seven joints too.
    fields = load_statistics(reader.root)["embodiments"]
    assert model.statistics[HELDOUT] == fields["panda"] and model.statistics["ur5e"] == fields["ur5e"]
    assert known.expert.embodiment is not None and model.expert.embodiment is not None
    torch.testing.assert_close(model.expert.embodiment.weight[2], known.expert.embodiment.weight[0], rtol=0, atol=0)
    observation = observation_of(known.spec)._replace(embodiment=torch.tensor([0, 1]))
    noise = torch.randn(2, known.spec.chunk, known.spec.action, generator=generator())
    with torch.no_grad():
        before, after = known.act(observation, noise), model.act(observation, noise)
        new = model.act(observation._replace(embodiment=torch.tensor([2, 1])), noise)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(new[0], before[0])
    with pytest.raises(ConfigError, match=r"'aloha'.*trained on \['panda', 'ur5e'\].*none of them has its state"):
        load_model(run, ["aloha"])


def test_statistics_of_several_robots_alike_are_their_union(run: Path, reader: ShardReader, tmp_path: Path) -> None:
    config = json.loads((run / "model.json").read_text())
    fields = config["statistics"]["embodiments"]
    state = fields["panda"]["proprio"]
    fields["iiwa"] = fields["panda"] | {"proprio": state | {"mean": [value + 2 for value in state["mean"]]}}
    fields.pop("ur5e")
    config["spec"]["embodiments"] = ["panda", "iiwa"]
    config["statistics_hash"] = statistics_hash(config["statistics"])
    (tmp_path / "model.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    known, model = load_model(tmp_path), load_model(tmp_path, [HELDOUT])
    several = [{"embodiments": {HELDOUT: fields[name]}} for name in ("panda", "iiwa")]
    assert model.statistics[HELDOUT] == merge_statistics(several)["embodiments"][HELDOUT]
    mean = np.array(model.statistics[HELDOUT]["proprio"]["mean"]) - fields["panda"]["proprio"]["mean"]
    np.testing.assert_allclose(mean, 1, atol=1e-3)
    assert known.expert.embodiment is not None and model.expert.embodiment is not None
    torch.testing.assert_close(model.expert.embodiment.weight[2], known.expert.embodiment.weight.mean(0))


def test_an_eager_policy_reads_the_state_and_answers_the_actions_of_its_robot(run: Path) -> None:
    for robot, joints in (("ur5e", 6), (HELDOUT, 7)):
        policy = CheckpointFactory(run)(robot)
        scene = Arm("Lift", robot, 64, ("front", "wrist"))
        policy.observe(scene.reset(np.random.default_rng(0)))
        assert policy.act().shape == (8, 7)
        width = 4 + 2 * joints
        policy.observe(scene.reset(np.random.default_rng(0)) | {"proprio": np.zeros(width - 1)})
        with pytest.raises(ContractError, match=rf"proprio: shape \({width - 1},\), expected \({width},\)"):
            policy.act()


def test_the_baseline_tells_robots_apart(reader: ShardReader, run: Path, tmp_path: Path) -> None:
    spec = load_model(run).spec
    samples, _, robots = gather_samples(reader, spec)
    assert robots == {"panda": 18, "ur5e": 16} and samples.state.shape[1] == 18 + 3 * spec.points
    assert (samples.robot.sum(1) == 1).all() and not samples.state[samples.robot[:, 1]][:, 16:18].any()
    train_bc_mlp(reader, spec, steps=3, batch=16, progress=False).save(tmp_path)
    model = load_bc_mlp(tmp_path)

    def answer(robot: str, body: str) -> np.ndarray:
        policy = BCMLPPolicy(model, robot)
        policy.observe(Arm("Lift", body, 64, ()).reset(np.random.default_rng(0)))
        return policy.act()

    assert answer("panda", "panda").shape == (spec.chunk, 7)
    # An arm that it does not know is all those with as wide a state.
    np.testing.assert_array_equal(answer(HELDOUT, HELDOUT), answer("panda", HELDOUT))
    with pytest.raises(ContractError, match=r"proprio: got \[16\], expected \[\[18\]\]"):
        answer("panda", "ur5e")


def test_a_baseline_of_robots_with_other_actions_is_refused(tmp_path: Path) -> None:
    samples = []
    for robot in ("panda", "sawyer"):
        episode = made_up_episode(robot, robot, "Lift", np.random.default_rng(0), length=6, pixels=16)
        episode.points, episode.visible = np.zeros((6, 1, 3), np.float32), np.ones((6, 1), bool)
        episode.meta |= {"point_names": ["object"], "absent": ["camera", "tactile"]}
        samples.append((robot, episode))
    write_index(tmp_path, [write_shard(tmp_path / "shard-000000.tar", samples)], [], {})
    with pytest.raises(DataError, match=r"actions of \[4, 7\] dimensions; .*leave it out of `policies`"):
        gather_samples(ShardReader(tmp_path), make_spec({}))


def demands(**changes: Any) -> dict[str, Any]:
    """Settings of a protocol that the made-up arms fulfil, but for `changes`."""
    fulfilled = {
        "generated": {"source": "robosuite"}, "train_tasks": [*TASKS], "heldout_tasks": [], "train_robots": TRAINED,
        "heldout_robots": [HELDOUT],
    }  # fmt: skip
    return tiny(**fulfilled | changes)


def test_a_protocol_holds_an_arm_out(run: Path, reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    training = json.loads((run / "model.json").read_text())["training"]
    assert training["robots"] == TRAINED
    published.check(demands(), training, reader)
    for changes, record, words in (
        ({"train_robots": ["panda"]}, training, r"must be trained on \['panda'\], it was on \['panda', 'ur5e'\]"),
        ({}, {k: v for k, v in training.items() if k != "robots"}, "does not say on which robots it was trained"),
        ({"heldout_robots": ["iiwa"]}, training, r"heldout_robots of .* must hold \['iiwa'\], it holds \['kinova3'\]"),
        ({"train_robots": None}, training | {"robots": [*TRAINED, HELDOUT]}, r"\['kinova3'\] must be held out"),
    ):
        with pytest.raises(DataError, match=words):
            published.check(demands(**changes), record, reader)
    check_unseen({"training": training}, reader, "heldout_robots")
    with pytest.raises(DataError, match=r"robots \['kinova3'\] were trained on"):
        check_unseen({"training": training | {"robots": [HELDOUT]}}, reader, "heldout_robots")
    driven = {**demands(), "closed_loop": True}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'worldmodel\[robosuite\]'"):
        published.check(driven, training, reader)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    published.check(driven, training, reader)
    assert published.driven(driven, training, reader) == (SOURCES["robosuite"], TRAINED)
    with pytest.raises(ConfigError, match=r"robots \['sawyer'\] are not simulated here; panda, ur5e"):
        published.check(driven | {"robots": ["sawyer"]}, training, reader)
    with pytest.raises(ConfigError, match="no robot that was trained on is simulated by robosuite"):
        published.check({**settings(), "closed_loop": True}, training | {"robots": ["sawyer"]}, reader)


def test_evaluation_drives_trained_and_held_out_arms(
    run: Path, reader: ShardReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[..., Any] = Arm
    monkeypatch.setitem(SOURCES, "robosuite", replace(SOURCES["robosuite"], make_scene=make))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    overrides = [f"checkpoint={run}", f"out={tmp_path}", "splits=[heldout_episodes,heldout_robots]", "max_clips=2"]
    overrides += ["sampler_steps=1", "missing=[]", "closed_loop=true", "trials=1", "workers=0", "baseline_steps=2"]
    config = settings(*overrides, f"robots=[panda,{HELDOUT}]", "threads=1", resolve=False)
    one, *_, baseline = config["policies"]
    eager = {"_target_": "worldmodel.controllers.CheckpointFactory", "folder": str(run)}
    expert = {"_target_": "worldmodel.controllers.ExpertFactory"}
    own = {"policy": "eager", "observes": "all", "factory": eager}
    scripted = {"policy": "expert", "observes": "the state", "images": False, "replan": 1, "factory": expert}
    config["policies"] = [own, baseline, scripted]
    report = json.loads(evaluate(config)[0].read_text())
    assert [result["split"] for result in report["offline"]] == ["heldout_episodes", "heldout_robots"]
    names = [f"{task} by {robot}" for robot in ("panda", HELDOUT) for task in sorted(TASKS)]
    for result in report["closed_loop"]:
        assert [f"{row['task']} by {row['robot']}" for row in result["tasks"]] == names
        assert [row["robot"] for row in result["robots"]] == ["panda", HELDOUT] and result["max_steps"] == TASKS
        assert set(result["rollouts"]) == set(names)
    assert report["closed_loop"][2]["mean_success"] == 1
    assert report["stamp"]["trained_on"]["robots"] == TRAINED
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "robots trained on: panda, ur5e" in card and "Offline: held-out robots" in card
    assert f"all tasks by {HELDOUT}" in (tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match="no weights"):
        evaluate(config | {"policies": [one]})


def test_an_artefact_drives_the_robots_that_it_knows(
    robot_artefact: Path, run: Path, reader: ShardReader, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert main(["drive", str(robot_artefact), f"robots=[{HELDOUT}]"]) == 1
    said = capsys.readouterr().err
    assert f"drive: robots ['{HELDOUT}']: the artefact knows ['sawyer'], robosuite has ['panda'," in said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config = settings(f"checkpoint={run}", "closed_loop=true", f"artefact={robot_artefact}", resolve=False)
    with pytest.raises(ConfigError, match=r"knows \['sawyer'\] and not \['panda', 'ur5e'\].*robots=\[panda\]"):
        evaluate(config)
