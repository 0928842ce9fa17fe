"""Fine-tuning: a model out of a checkpoint's description, adapters, few demonstrations, new robots and cameras."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_COUNTS, compose
from safetensors.torch import load_file, save_file
from synthetic import made_up_dataset
from test_model import draws, future_of, generator, observation_of

from worldmodel.adapters import ADAPTERS, Lora, apply_adapters, inject, merge, save_adapters, wrapped_layers
from worldmodel.averaging import MovingAverage
from worldmodel.checkpoint import build_model, describe, load_model, make_spec, save_model
from worldmodel.contracts import Batch
from worldmodel.curriculum import train
from worldmodel.data.few import few_demonstrations
from worldmodel.data.generate import generate
from worldmodel.data.sections import Entry
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics, statistics_hash
from worldmodel.errors import ConfigError, DataError
from worldmodel.finetune import in_order_of, plan_model
from worldmodel.holdout import check_unseen
from worldmodel.phases import Phase, make_phases
from worldmodel.run_folder import training_record
from worldmodel.training import PhaseModule

RECIPES = ("finetune_full", "finetune_lora", "finetune_frozen")


@pytest.fixture(scope="module")
def init(tiny_dataset, tmp_path_factory) -> Path:
    """A checkpoint of `kairos_tiny` on the tiny dataset, none of whose weights was trained."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny", f"data.root={tiny_dataset}", "run_dir=nowhere")
    spec, statistics = make_spec(config["data"]["spec"]), load_statistics(tiny_dataset)
    model = build_model(config["model"], spec, statistics)
    for layer in [*model.denoiser.embed_out.values(), model.expert.embed_out]:
        torch.nn.init.normal_(layer.weight, std=0.2)
    record = training_record(config, [ShardReader(tiny_dataset)])
    model.metadata = describe(config["model"], spec, statistics, statistics_hash(statistics), record)
    return save_model(model, tmp_path_factory.mktemp("init"))


@pytest.fixture(scope="module")
def new_task(tmp_path_factory) -> Path:
    """Demonstrations of a task that the tiny dataset holds out."""
    out = tmp_path_factory.mktemp("new") / "task"
    settings: dict[str, Any] = {**TINY_COUNTS, "episodes": 3, "seed": 1, "workers": 1, "progress": False}
    return generate("metaworld", out, tasks=["drawer-open-v3"], heldout_tasks=[], **settings)


def short(recipe: str, init: Path, root: Path, run: Path, *more: str) -> dict[str, Any]:
    """The configuration of a run of seconds."""
    places = [f"init={init}", f"data.root={root}", f"run_dir={run}", "wandb.mode=disabled", "trainer.threads=1"]
    return compose(f"experiment={recipe}", *places, "phases.adapt.steps=4", "phases.adapt.batch_size=3", *more)


def batch_of(spec) -> Batch:
    return Batch(observation_of(spec), future_of(spec), torch.zeros(2, spec.history, dtype=torch.int64), ["a", "b"])


def act(model) -> torch.Tensor:
    spec = model.spec
    with torch.no_grad():
        return model.act(observation_of(spec), torch.randn(2, spec.chunk, spec.action, generator=generator()))


def shaken(model) -> None:
    """Gives the adapters something to say."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator(len(name)))


def test_adapters_change_nothing_at_first_and_merge_into_the_same_outputs(tiny_model):
    names = list(tiny_model.state_dict())
    before = act(tiny_model)
    inject(tiny_model, ("denoiser", "expert"), Lora(rank=4), seed=0)
    torch.testing.assert_close(act(tiny_model), before)
    shaken(tiny_model)
    unmerged = act(tiny_model)
    assert not torch.allclose(unmerged, before, atol=1e-3)
    merge(tiny_model)
    torch.testing.assert_close(act(tiny_model), unmerged, atol=2e-5, rtol=1e-4)
    assert list(tiny_model.state_dict()) == names


def test_the_default_targets_are_attention_and_feed_forward(tiny_model):
    inject(tiny_model, ("denoiser", "expert"), Lora(), seed=0)
    names = {name for name, _ in wrapped_layers(tiny_model)}
    for i in range(4):
        inner = ["mix.qkv", "mix.out"] if i == 3 else [f"mix.{part}" for part in ("q", "k", "v", "out")]
        inner += [f"cross.{part}" for part in ("q", "k", "v", "out")] + ["feed_forward.0", "feed_forward.2"]
        assert {f"denoiser.blocks.{i}.{part}" for part in inner} <= names
        assert {f"expert.blocks.{i}.{part}" for part in ("q", "k", "v", "out", "cross.q", "feed_forward.2")} <= names
    assert {"expert.state.layers.embed", "expert.state.layers.blocks.0.feed_forward.2", "expert.state.out"} <= names
    assert not any(name.startswith(("encoder", "autoencoder")) for name in names)


def test_only_adapters_and_what_is_whole_have_gradients_optimiser_and_average(tiny_model):
    tiny_model.train()
    lora = Lora(rank=2, targets=("q", "v"), whole=("embodiment",))
    phase = Phase(
        name="adapt", objective="world", trains=("denoiser", "expert"), steps=1, batch_size=2, learning_rate=1e-3,
        mixture=make_phases(compose("experiment=kairos_tiny")["phases"])[-1].mixture[1:2], lora=lora,
    )  # fmt: skip
    module = PhaseModule(model=tiny_model, phase=phase, seed=0)
    batch = batch_of(tiny_model.spec)
    module.world_step(batch, draws())["loss"].backward()
    moved = {name for name, p in tiny_model.named_parameters() if p.grad is not None}
    assert all(".lora_" in name or name.endswith("embodiment.weight") for name in moved)
    assert {"expert.blocks.0.q.lora_B.default.weight", "expert.embodiment.weight"} <= moved
    trained = {id(p) for name, p in tiny_model.named_parameters() if ".lora_" in name or "embodiment" in name}
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for p in group["params"]} == trained
    average = MovingAverage(decay=0.9)
    average.on_fit_start(None, module)  # pyright: ignore[reportArgumentType]
    assert len(average.shadow) == len(trained)


def test_the_adapters_of_a_file_make_the_tuned_model_of_its_base_and_of_no_other(tiny_model, tmp_path):
    base = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    lora = Lora(rank=3, alpha=6.0, targets=("q", "feed_forward.0"), whole=("expert.position",))
    inject(tiny_model, ("expert",), lora, seed=0)
    shaken(tiny_model)
    with torch.no_grad():
        tiny_model.expert.position.add_(0.1)
    path = save_adapters(tiny_model, lora, ("expert",), tmp_path)
    merge(tiny_model)
    tuned = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    assert path.stat().st_size < 200_000
    tiny_model.load_state_dict(base)
    apply_adapters(tiny_model, path)
    assert all(torch.equal(value, tuned[name]) for name, value in tiny_model.state_dict().items())
    with pytest.raises(DataError, match="belong to other weights"):
        apply_adapters(tiny_model, path)
    assert all(torch.equal(value, tuned[name]) for name, value in tiny_model.state_dict().items())
    save_file(load_file(path), path, metadata={"schema_version": "99"})
    with pytest.raises(DataError, match=r"schema_version is '99', this version reads"):
        apply_adapters(tiny_model, path)


def test_mistakes_in_adapters_and_parts_are_named(tiny_model):
    for lora, message in (
        (Lora(targets=("query",)), r"\['query'\] are no linear layers of \['expert'\], whose names end in .*'cross.k'"),
        (Lora(whole=("embodimnt",)), r"lora.whole: \['embodimnt'\] are no parameters"),
    ):
        with pytest.raises(ConfigError, match=message):
            inject(tiny_model, ("expert",), lora, seed=0)
        merge(tiny_model)
    with pytest.raises(ConfigError, match="rank 0 must be 1 or more"):
        Lora(rank=0)
    base = {"objective": "understanding", "steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    (phase,) = make_phases({"p": {**base, "trains": ["expert.head"]}})
    with pytest.raises(ConfigError, match=r"trains 'expert.head', but 'head' is none of .*embed_out"):
        PhaseModule(model=tiny_model, phase=phase, seed=0)
    (phase,) = make_phases({"p": {**base, "trains": ["expert.blocks.3", "expert.embed_out"]}})
    PhaseModule(model=tiny_model, phase=phase, seed=0)
    trained = {name for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("expert.blocks.3.", "expert.embed_out.")) for name in trained)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_compose_build_and_train_what_they_say(recipe, init, new_task, tmp_path):
    config = short(recipe, init, new_task, tmp_path / "run", "data.episodes=2")
    folder = train(config)
    before, after = load_file(init / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {name.split(".")[0] for name in moved}
    assert parts == ({"expert"} if recipe == "finetune_frozen" else {"denoiser", "expert"})
    adapters = folder / "phases" / "0-adapt" / ADAPTERS
    assert adapters.is_file() == (recipe == "finetune_lora")
    if recipe == "finetune_lora":
        assert "expert.embed_in.weight" not in moved
        model = load_model(init)
        apply_adapters(model, adapters)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, after[name], msg=name)
    reader = ShardReader(new_task, episodes=2)
    metadata = load_model(folder).metadata
    assert {e.key for e in reader.entries if e.split == "train"} < set(metadata["training"]["episodes"])
    assert len(metadata["training"]["episodes"]) == 4 + 2
    before, new = json.loads((init / "model.json").read_text())["statistics"], load_statistics(new_task)
    said = sorted({*before["instructions"], *new["instructions"]})
    assert metadata["statistics"] == {**before, "instructions": said} and len(said) == 3


def test_eyes_learn_the_new_task_before_the_hand(init, new_task, tmp_path):
    few = [f"phases.{name}.{key}=3" for name in ("locate", "behaviour") for key in ("steps", "batch_size")]
    folder = train(short("finetune_images", init, new_task, tmp_path / "run", "data.episodes=2", *few))
    stages = [init, folder / "phases" / "0-locate", folder / "phases" / "1-behaviour", folder]
    weights = [load_file(stage / "model.safetensors") for stage in stages]
    moved = [{name for name in a if not torch.equal(a[name], b[name])} for a, b in itertools.pairwise(weights)]
    assert moved[0] and all(name.startswith("encoder.points_head.") for name in moved[0])
    assert [{name.split(".")[0] for name in names} for names in moved[1:]] == [{"expert"}, {"denoiser", "expert"}]


def test_what_was_fine_tuned_on_a_held_out_task_is_refused_there(init, new_task, tiny_dataset, tmp_path):
    metadata = load_model(train(short("finetune_frozen", init, new_task, tmp_path / "run"))).metadata
    check_unseen(load_model(init).metadata, ShardReader(tiny_dataset), "heldout_tasks")
    with pytest.raises(DataError, match=r"tasks \['drawer-open-v3'\] were trained on"):
        check_unseen(metadata, ShardReader(tiny_dataset), "heldout_tasks")
    check_unseen(metadata, ShardReader(new_task), "heldout_episodes")
    assert metadata["training"]["started_from"]["folder"] == str(init)


def test_a_run_that_breaks_in_a_phase_with_adapters_ends_as_an_undisturbed_one(init, new_task, tmp_path, monkeypatch):
    adapters = "+phases.adapt.lora={rank: 4, dropout: 0.2, whole: [embodiment]}"
    more = [adapters, "trainer.save_every=1"]
    whole = train(short("finetune_frozen", init, new_task, tmp_path / "whole", *more))
    step = PhaseModule.training_step

    def breaking(self, batch, batch_idx):
        if self.global_step == 2:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PhaseModule, "training_step", breaking)
    config = short("finetune_frozen", init, new_task, tmp_path / "broken", *more)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config)
    monkeypatch.setattr(PhaseModule, "training_step", step)
    torch.randn(3)  # whatever else happened to the global generator
    last = torch.load(tmp_path / "broken" / "phases" / "0-adapt" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    names = {*last["callbacks"]["MovingAverage"]["shadow"]}
    assert names and all(".lora_" in name or "embodiment" in name for name in names)
    broken = train(config)
    first, second = (load_file(run / "model.safetensors") for run in (whole, broken))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_mode_that_trains_nothing_is_named(init, new_task, tmp_path):
    mixture = "phases.adapt.mixture=[{mode: video_prediction, weight: 1.0}]"
    with pytest.raises(ConfigError, match=r"video_prediction/camera.* trains nothing of \['expert.embed_out'\]"):
        train(short("finetune_frozen", init, new_task, tmp_path, mixture, "phases.adapt.trains=[expert.embed_out]"))


def entry(task: str, number: int, **more: Any) -> Entry:
    values = {"shard": "s", "offset": 0, "size": 9, "crc32": 0, "length": 5, "split": "train", "success": True}
    names = {"key": f"{task}-{number}", "episode_id": f"{task}-{number}", "task": task, "embodiment": "sawyer"}
    return Entry(**{**values, **names, "initial_state": "", **more})


def test_few_demonstrations_are_nested_and_follow_from_the_seed_alone():
    entries = [entry(task, number) for task in ("push", "pull") for number in range(50)]
    entries += [entry("push", 100, success=False), entry("lift", 0, split="heldout_tasks")]
    entries += [entry("push", 200 + n, variant_of=f"push-{n}", variant=1) for n in range(50)]
    chosen = {n: {e.key for e in few_demonstrations(entries, n, seed=3)} for n in (1, 5, 10, 50)}
    assert chosen[1] < chosen[5] < chosen[10] < chosen[50]
    for count, keys in chosen.items():
        assert "lift-0" in keys and "push-100" not in keys
        assert len([k for k in keys if k.startswith("pull")]) == count
        motions = {k for k in keys if k.startswith("push") and int(k[5:]) < 100}
        assert {f"push-{200 + int(k[5:])}" for k in motions} == {k for k in keys if k.startswith("push-2")} - motions
    assert chosen[5] == {e.key for e in few_demonstrations(entries[::-1], 5, seed=3)}
    others = [e for e in entries if e.task != "pull"]
    assert {e.key for e in few_demonstrations(others, 5, seed=3)} == {k for k in chosen[5] if not k.startswith("pull")}
    assert chosen[5] != {e.key for e in few_demonstrations(entries, 5, seed=4)}
    with pytest.raises(DataError, match=r"51 demonstrations .* fewer are there: \{'push by sawyer': 50"):
        few_demonstrations(entries, 51, seed=3)
    with pytest.raises(ConfigError, match="is 0; it is a number of demonstrations per task"):
        few_demonstrations(entries, 0, seed=3)


def test_a_robot_with_other_cameras_and_sizes_is_added_to_those_that_the_checkpoint_knows(init, tmp_path):
    root = made_up_dataset(tmp_path / "panda", {("panda", "lift"): 2}, length=12, pixels=64)
    more = ["model.from_init.cameras={front: wrist, wrist: null}", "phases.adapt.lora.whole=[embodiment]"]
    with pytest.raises(DataError, match=r"cameras \['wrist'\] are missing: the data have \['front'\]") as raised:
        train(short("finetune_lora", init, root, tmp_path / "run"))
    assert "'model.from_init.cameras={wrist: null}'" in str(raised.value)
    with pytest.raises(ConfigError, match="gives two cameras one name"):
        train(short("finetune_lora", init, root, tmp_path / "run", "model.from_init.cameras={front: wrist}"))
    more[0] = "model.from_init.cameras={front: null, wrist: front2}"
    with pytest.raises(DataError, match=r"set 'model.from_init.cameras=\{front2: front\}'"):
        train(short("finetune_lora", init, root, tmp_path / "run", more[0]))
    more[0] = "model.from_init.cameras={wrist: null}"
    folder = train(short("finetune_lora", init, root, tmp_path / "run", *more))
    model, old = load_model(folder), load_model(init)
    assert model.spec.embodiments == ("sawyer", "panda")
    assert model.spec.absent_cameras == ("wrist",)
    known = model.normaliser.get_buffer("proprio_mean")
    assert torch.equal(known[0], old.normaliser.get_buffer("proprio_mean")[0])
    fields = load_statistics(root)["embodiments"]["panda"]
    torch.testing.assert_close(known[1], torch.tensor(fields["proprio"]["mean"], dtype=torch.float32))
    table, before = model.expert.embodiment, old.expert.embodiment
    assert table is not None and before is not None
    assert table.weight.shape[0] == 2 and not torch.equal(table.weight[1], before.weight[0])
    clip = observation_of(model.spec)._replace(embodiment=torch.tensor([0, 1]))
    clip = clip._replace(has_rgb=torch.tensor([[True, False]] * 2))
    noise = torch.randn(2, model.spec.chunk, model.spec.action, generator=generator())
    with torch.no_grad():
        actions = model.act(clip, noise)
    assert torch.isfinite(actions).all()


def test_a_robot_that_does_not_fit_is_refused_with_the_reason(init, tmp_path):
    def plan(root: Path, *more: str, cameras: str = "{wrist: null}") -> Any:
        config = short("finetune_full", init, root, tmp_path / "run", f"model.from_init.cameras={cameras}", *more)
        return plan_model(config, [ShardReader(root)])

    aloha = made_up_dataset(tmp_path / "aloha", {("aloha", "lift"): 1}, pixels=64)
    with pytest.raises(ConfigError, match=r"'aloha': action is 14 wide, but init has room for 8"):
        plan(aloha)
    small = made_up_dataset(tmp_path / "small", {("panda", "lift"): 1}, pixels=32)
    with pytest.raises(ConfigError, match=r"pictures of front have 32 × 32 pixels, init reads 64 × 64"):
        plan(small)
    panda = made_up_dataset(tmp_path / "panda", {("panda", "lift"): 1}, pixels=64)
    with pytest.raises(ConfigError, match=r"statistics 'mine' is none of checkpoint, data"):
        plan(panda, "model.from_init.statistics=mine")
    with pytest.raises(ConfigError, match=r"names \['left'\], which are none of init's: \['front', 'wrist'\]"):
        plan(panda, cameras="{left: x}")
    with pytest.raises(ConfigError, match="set init=RUN_FOLDER"):
        plan(panda, "init=null")
    assert plan(panda).spec.embodiments == ("sawyer", "panda")


def test_statistics_of_a_known_robot_are_kept_unless_asked_otherwise(init, new_task, tmp_path):
    for source, folder in (("checkpoint", init), ("data", None)):
        config = short("finetune_full", init, new_task, tmp_path, f"model.from_init.statistics={source}")
        found = plan_model(config, [ShardReader(new_task)]).statistics["embodiments"]
        other = json.loads((init / "model.json").read_text())["statistics"] if folder else load_statistics(new_task)
        assert found == other["embodiments"]


def test_touch_statistics_follow_the_sensors_of_the_model(init, tiny_dataset):
    spec, reader = load_model(init).spec, ShardReader(tiny_dataset)
    fields = load_statistics(tiny_dataset)["embodiments"]["sawyer"]
    episode = reader.read(0, images=False)
    assert in_order_of(spec, episode, fields) == fields
    episode.meta["sensor_names"] = ["right_finger", "foot", "wrist"]
    moved = in_order_of(spec, episode, fields)["wrench"]
    assert moved["mean"] == [fields["wrench"]["mean"][2], [0.0] * 6, fields["wrench"]["mean"][0]]
    assert moved["std"][1] == [1.0] * 6 and moved["floored"][1] == [False] * 6
    assert moved["count"] == fields["wrench"]["count"]


def test_held_out_tasks_can_be_named_for_generation(new_task, tmp_path):
    reader = ShardReader(new_task)
    assert {(e.split, e.task) for e in reader.entries} == {
        ("train", "drawer-open-v3"),
        ("heldout_episodes", "drawer-open-v3"),
    }
    assert reader.heldout_tasks == ()
    with pytest.raises(ConfigError, match=r"held-out tasks \['reach-v3'\] are not among the tasks"):
        generate("metaworld", tmp_path / "x", tasks=["drawer-open-v3"], heldout_tasks=["reach-v3"])
