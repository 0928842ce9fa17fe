"""Offline evaluation on a small dataset, with a model that answers exactly what the baselines answer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import one
from torch import Tensor

from worldmodel import metrics
from worldmodel.conditioning import Flags
from worldmodel.contracts import ClipSpec, Future, Observation, Prediction, Understanding
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.errors import DataError
from worldmodel.evaluation import evaluate_offline, unread
from worldmodel.evaluation_given import another_motion
from worldmodel.figures import FIGURES, text_table
from worldmodel.geometry import compose_se3, intrinsics_to_fov, invert_se3
from worldmodel.holdout import check_unseen, choose_clips, training_means
from worldmodel.report import absent_instructions

torch.set_num_threads(1)


class Copycat:
    """Answers the newest observation in every mode, or the truth where `oracle` says so; records what it was asked."""

    def __init__(self, reader: ShardReader, spec: ClipSpec, oracle: bool = False) -> None:
        self.spec, self.oracle = spec, oracle
        train = [entry for entry in reader.entries if entry.split == "train"]
        record = {"episodes": [e.key for e in train], "tasks": sorted({e.task for e in train})}
        self.metadata = {"training": record}
        self.asked: list[tuple[str, bool, int | None, str | None]] = []
        self.senses: list[dict[str, bool]] = []

    @property
    def givable(self) -> tuple[str, ...]:
        return ("camera", "points")

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
        if given is None:
            self.asked.append((mode, future is not None, steps, coupling))
        spec, rows = self.spec, observation.text.shape[0]
        actions = torch.zeros(rows, spec.chunk, spec.action)
        rgb = metrics.copy_last_frame(observation, spec.window)
        if future is not None and self.oracle:
            actions = future.actions if mode == "inverse_dynamics" else actions
            # Pictures that follow the actions: right for those that were executed, grey for any others.
            level = future.actions.mean((1, 2)).view(-1, 1, 1, 1, 1, 1)
            rgb = rgb * 0 + level if mode == "forward_dynamics" else rgb
            rgb = future.rgb.float() / 255 if given is not None else rgb
        return Prediction(
            rgb=rgb,
            camera_to_base=metrics.constant(observation.camera_to_base[:, -1], spec.future),
            points=metrics.constant(observation.points[:, -1], spec.future),
            wrench=metrics.constant(observation.wrench[:, -1].mean(1), spec.future),
            actions=actions,
        )

    def understand(self, observation: Observation) -> Understanding:
        self.senses.append(
            {n: bool(getattr(observation, n).any()) for n in Observation._fields if n.startswith("has_")}
        )
        pose = observation.camera_to_base[:, -1]
        fov = intrinsics_to_fov(observation.intrinsics[:, -1], self.spec.height)
        return Understanding(pose, fov, observation.points[:, -1], observation.wrench[:, -1].mean(1))

    def reconstruct(self, rgb: Tensor) -> Tensor:
        assert rgb.shape[1] == 1 + self.spec.window
        return rgb.float() / 255 + 0.1


@pytest.fixture(scope="module")
def reader(tiny_dataset: Path) -> ShardReader:
    return ShardReader(tiny_dataset)


@pytest.fixture(scope="module")
def model(reader: ShardReader) -> Copycat:
    return Copycat(reader, ClipSpec())


@pytest.fixture(scope="module")
def result(model: Copycat, reader: ShardReader) -> dict:
    return evaluate_offline(model, reader, "heldout_episodes", clips_per_episode=3, batch_size=2, sampler_steps=2)


def figure(result: dict, name: str) -> dict:
    return next(f for f in result["figures"] if f["name"] == name)


def test_all_streams_modes_and_senses_are_measured(result: dict, model: Copycat) -> None:
    measured = {f["name"].split("/")[0] for f in result["figures"]}
    heads = {name for name, figure in FIGURES.items() if figure.stream == "motion"}  # this model has none for it
    assert measured >= set(FIGURES) - heads - {"trajectory_moving"}
    assert {mode for mode, *_ in model.asked} == {
        "video_prediction", "policy", "forward_dynamics", "inverse_dynamics", "joint",
    }  # fmt: skip
    assert {steps for mode, _, steps, _ in model.asked if mode == "policy"} == {None}
    assert {steps for mode, _, steps, _ in model.asked if mode == "video_prediction"} == {2}
    assert all(given for mode, given, *_ in model.asked if mode.endswith("dynamics"))
    assert not any(given for mode, given, *_ in model.asked if not mode.endswith("dynamics"))


def test_each_head_answers_without_the_sense_it_reads_out(result: dict, model: Copycat) -> None:
    assert result["clips"]
    single, unaided, numb = model.senses[:3]
    assert [name for name, present in single.items() if present] == ["has_rgb"]
    assert not unaided["has_points"] and unaided["has_camera"] and unaided["has_wrench"]
    assert not numb["has_wrench"] and not numb["has_taxels"] and numb["has_points"]


def test_a_model_equal_to_its_baseline_beats_nothing(result: dict) -> None:
    for name in ("video_psnr", "video_ssim", "trajectory_ade", "trajectory_fde", "camera_path_translation/wrist"):
        entry = figure(result, name)
        baseline = entry["baselines"][0]
        assert entry["ours"]["value"] == pytest.approx(baseline["value"]), name
        assert baseline["difference"]["value"] == 0 and not baseline["beaten"] and not baseline["clearly"], name
        assert entry["beats_all"] is False or not entry["applicable"], name
    last = next(b for b in figure(result, "force_future")["baselines"] if b["name"] == "last force")
    assert figure(result, "force_future")["ours"]["value"] == pytest.approx(last["value"])


def test_known_errors(result: dict) -> None:
    assert figure(result, "tokeniser")["ours"]["value"] < 20.5  # 0.1 everywhere but where white clips
    for name in ("camera_translation/wrist", "camera_rotation/front", "object_position", "force_now"):
        assert figure(result, name)["ours"]["value"] == pytest.approx(0, abs=0.05)
        assert figure(result, name)["beats_all"], name


def test_a_camera_that_never_moves_has_nothing_to_learn(result: dict) -> None:
    entry = figure(result, "camera_path_translation/front")
    assert not entry["applicable"] and entry["beats_all"] is None


def test_horizons_have_one_value_per_step(result: dict) -> None:
    assert len(result["horizons"]["video_psnr"]["ours"]) == ClipSpec().window
    assert len(result["horizons"]["action"]["hold pose"]) == ClipSpec().chunk
    assert "trajectory_fde" not in result["horizons"]


def test_samples_are_the_worst_and_the_median_of_each_task(result: dict) -> None:
    assert {(s.clip.task, s.kind) for s in result["samples"]} == {
        (task, kind) for task in result["tasks"] for kind in ("worst", "median")
    }


def test_same_seed_same_numbers(model: Copycat, reader: ShardReader, result: dict) -> None:
    again = evaluate_offline(model, reader, "heldout_episodes", clips_per_episode=3, batch_size=2, sampler_steps=2)
    assert repr(again["figures"]) == repr(result["figures"])
    assert "Predicted video, PSNR [dB]" in text_table([result, again])


def test_dynamics_that_follow_the_actions_show(reader: ShardReader) -> None:
    oracle = Copycat(reader, ClipSpec(), oracle=True)
    result = evaluate_offline(oracle, reader, "heldout_episodes", clips_per_episode=2, batch_size=4)
    assert figure(result, "action_inverse")["ours"]["value"] == 0
    names = [b["name"] for b in figure(result, "video_given_actions")["baselines"]]
    assert names == ["copy last frame", "not given", "shuffled actions"]
    shuffled = figure(result, "video_given_actions")["baselines"][2]
    assert not shuffled["trivial"] and shuffled["difference"]["value"] != 0


def test_another_motion_is_asked_for_from_where_things_are(reader: ShardReader) -> None:
    dataset = ClipDataset(reader, ClipSpec(), split="heldout_episodes")
    batch = collate([dataset[i] for i in (0, 5, 10)])
    asked = another_motion(batch.observation, batch.future)
    now, then = batch.observation.camera_to_base[:, -1:], batch.future.camera_to_base
    moves = compose_se3(invert_se3(now), then).roll(1, 0)
    half = compose_se3(invert_se3(now), asked.camera_to_base)
    torch.testing.assert_close(half[..., :3, 3], 0.5 * moves[..., :3, 3])
    torch.testing.assert_close(compose_se3(half, half)[..., :3, :3], moves[..., :3, :3], atol=1e-2, rtol=0)
    start = batch.observation.points[:, -1:]
    torch.testing.assert_close(asked.points - start, 0.5 * (batch.future.points - start).roll(1, 0))
    assert torch.equal(asked.rgb, batch.future.rgb)


def test_trained_episodes_and_tasks_are_refused(model: Copycat, reader: ShardReader) -> None:
    record = model.metadata["training"]
    held = next(e for e in reader.entries if e.split == "heldout_episodes")
    with pytest.raises(DataError, match=f"{held.key}.*was trained on"):
        check_unseen({"training": {**record, "episodes": [held.key]}}, reader, "heldout_episodes")
    task = next(e.task for e in reader.entries if e.split == "heldout_tasks")
    with pytest.raises(DataError, match=f"{task}.*were trained on"):
        check_unseen({"training": {**record, "tasks": [task]}}, reader, "heldout_tasks")
    with pytest.raises(DataError, match="does not say what it was trained on"):
        check_unseen({}, reader, "heldout_tasks")
    with pytest.raises(DataError, match="no episode of split 'test'"):
        check_unseen(model.metadata, reader, "test")


def test_instructions_that_the_model_does_not_read_are_counted(
    reader: ShardReader, model: Copycat, result: dict
) -> None:
    clips = choose_clips(ClipDataset(reader, model.spec, split="heldout_tasks"), 1, 4, 0)
    said = sorted({clip.instruction for clip in clips})
    metadata = {"config": {"normaliser": {"known_text_only": True}}, "statistics": {"instructions": ["Go.", said[0]]}}
    assert (
        unread(metadata, clips) == said[1:] and unread({**metadata, "statistics": {"instructions": []}}, clips) == said
    )
    assert result["unread"] == [] and not absent_instructions(result)
    assert "1 of its instructions" in absent_instructions({**result, "unread": ["Go."]})


def test_a_training_start_under_another_name_is_refused(model: Copycat, tiny_dataset: Path) -> None:
    reader = ShardReader(tiny_dataset)
    trained = next(e for e in reader.entries if e.split == "train")
    reader.entries = [
        replace(e, initial_state=trained.initial_state) if e.split == "heldout_episodes" else e for e in reader.entries
    ]
    with pytest.raises(DataError, match="starts exactly like a training episode"):
        check_unseen(model.metadata, reader, "heldout_episodes")


def test_clips_have_a_full_future_and_are_spread_over_tasks(reader: ShardReader) -> None:
    spec = ClipSpec()
    dataset = ClipDataset(reader, spec, split="heldout_episodes")
    clips = choose_clips(dataset, clips_per_episode=4, max_clips=3, seed=0)
    assert len({clip.task for clip in clips}) == 2 and len(clips) == 3
    for clip in choose_clips(dataset, clips_per_episode=99, max_clips=999, seed=0):
        item = dataset[clip.item]
        assert one(item).future.valid.all() and one(item).future.action_valid.all()
        assert clip.step % spec.stride == 0
        episode = reader.read(dataset.locate(clip.item)[0], images=False)
        assert episode.action is not None
        assert clip.movable.tolist()[: len(episode.meta["point_names"])] == [
            name != "goal" for name in episode.meta["point_names"]
        ]
        expected = episode.action[clip.step - 1].tolist() if clip.step else [0.0] * 4
        assert clip.last_action[:4].tolist() == pytest.approx(expected)
        assert clip.gripper.tolist() == [False] * 3 + [True] + [False] * 4


def test_training_means_are_those_of_the_train_split(reader: ShardReader) -> None:
    means = training_means(reader, ClipSpec())
    numbers = [i for i, e in enumerate(reader.entries) if e.split == "train" and e.success]
    actions = torch.cat([torch.from_numpy(reader.read(i, images=False).action) for i in numbers])
    assert torch.allclose(means.actions[0, :4], actions.mean(0), atol=1e-5)
    assert (means.actions[0, 4:] == 0).all()
    assert means.camera_to_base.shape == (1, 2, 4, 4)
    assert torch.linalg.det(means.camera_to_base[0, :, :3, :3]).tolist() == pytest.approx([1, 1], abs=1e-4)
    assert means.points.shape == (1, ClipSpec().points, 3)


def test_every_setting_of_eval_can_be_set_by_name():
    """Hydra takes `data=x` for a choice between folders where the search path has one of that name."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    root = Path(__file__).parent.parent / "configs" / "eval"
    names = [name for name in OmegaConf.load(root / "eval.yaml") if name not in ("defaults", "hydra")]
    assert {"checkpoint", "data", "policies"} <= set(names)
    with initialize_config_dir(str(root), version_base="1.3"):
        config = compose("eval", [f"{name}=null" for name in names])
    assert all(config[name] is None for name in names)
