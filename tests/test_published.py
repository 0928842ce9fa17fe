"""Protocols are what they demand, and a result is the same when it is run again from its stamp."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY_TASKS
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from worldmodel import published
from worldmodel.checkpoint import describe, save_model
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.registry import SOURCES
from worldmodel.data.statistics import statistics_hash
from worldmodel.errors import ConfigError, DataError
from worldmodel.model_card import compose_card
from worldmodel.protocol import evaluate
from worldmodel.rerun import differences, read_report, rerun

CONFIGS = Path(__file__).parent.parent / "configs" / "eval"
PROTOCOLS = sorted(path.stem for path in (CONFIGS / "protocol").glob("*.yaml"))


def settings(*overrides: str, resolve: bool = True) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(hydra_compose("eval", ["checkpoint=run", *overrides]), resolve=resolve)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items() if key not in ("rerun", "compare")}


@pytest.fixture(scope="module")
def reader(tiny_dataset: Path) -> ShardReader:
    return ShardReader(tiny_dataset)


def training(reader: Any) -> dict[str, Any]:
    train = [entry for entry in reader.entries if entry.split == "train"]
    seen = {"tasks": sorted({e.task for e in train}), "robots": sorted({e.embodiment for e in train})}
    return seen | {"episodes": [e.key for e in train]}


def tiny(**changes: Any) -> dict[str, Any]:
    """Settings of a protocol that the tiny dataset and what was trained on it fulfil, but for `changes`."""
    config = settings()
    demands = {
        "name": "tiny", "generated": {"source": "metaworld", "episodes": {"heldout_tasks": 1}},
        "train_tasks": TINY_TASKS[:2], "heldout_tasks": TINY_TASKS[2:], "demonstrations": 2,
    }  # fmt: skip
    config["protocol"] |= demands | changes
    return config


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_settles_all_settings_and_its_tasks_exist(name: str) -> None:
    config = settings(f"protocol={name}")
    protocol = config["protocol"]
    assert set(protocol) == {"name", *published.SETTINGS, *published.DEMANDS}
    assert all(config[key] == protocol[key] for key in published.SETTINGS)
    assert published.stamp(config)["departures"] == {} and protocol["name"] == (None if name == "free" else name)
    if name != "free":
        source = SOURCES[protocol["generated"]["source"]]
        benchmark = source.benchmarks[protocol["generated"]["benchmark"]]
        assert set(protocol["train_tasks"]) == set(config["tasks"]) <= set(benchmark.train_tasks)
        assert name == "robosuite_arms" or set(protocol["train_tasks"]) == set(benchmark.train_tasks)
        assert set(protocol["heldout_tasks"]) == set(benchmark.heldout_tasks)
        assert ("heldout_tasks" in config["splits"]) == bool(benchmark.heldout_tasks)
        assert protocol["trials"] >= 50
        arms = [*(protocol["train_robots"] or ()), *(protocol["heldout_robots"] or ())]
        assert set(arms) <= set(source.robots) and (protocol["robots"] or []) == arms


def published_data(name: str, demonstrations: int) -> Any:
    """What a reader of the data of a protocol knows: two demonstrations of every task but one, which has more."""
    protocol = settings(f"protocol={name}")["protocol"]
    counts = dict.fromkeys(protocol["train_tasks"], 2) | {protocol["train_tasks"][0]: demonstrations}
    arms = protocol["train_robots"] or ["sawyer"]
    made = [(task, arm, "train", n) for task, count in counts.items() for arm in arms for n in range(count)]
    made += [(task, arms[0], "heldout_tasks", 0) for task in protocol["heldout_tasks"]]
    made += [(protocol["train_tasks"][0], arm, "heldout_robots", 0) for arm in protocol["heldout_robots"] or ()]
    entries = [
        SimpleNamespace(key=f"{task}-{arm}-{split}-{n}", task=task, split=split, embodiment=arm, variant_of=None)
        for task, arm, split, n in made
    ]
    return SimpleNamespace(root=Path("data"), index={"generated": protocol["generated"]}, entries=entries)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "free"])
def test_protocols_accept_their_data_and_no_more_demonstrations_than_they_say(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # no simulator need be there
    config: dict[str, Any] = {**settings(f"protocol={name}"), "closed_loop": True}
    most = config["protocol"]["demonstrations"]
    assert most == (200 if name == "pusht" else 10 if name.endswith("_few") else 50)
    enough, more = published_data(name, most), published_data(name, most + 1)
    published.check(config, training(enough), enough)
    with pytest.raises(DataError, match=rf"by \w+': {most + 1}.*data.episodes={most}"):
        published.check(config, training(more), more)
    more.index["generated"] = {**more.index["generated"], "benchmark": "ml1"}
    asked = config["protocol"]["generated"]["benchmark"]
    with pytest.raises(DataError, match=f"benchmark is 'ml1', not '{asked}'.*--benchmark {asked}"):
        published.check(config, training(more), more)


def test_departures_are_stamped() -> None:
    config = settings("protocol=metaworld_ml10", "trials=2")
    assert published.stamp(config)["departures"] == {"trials": "2, not 50"}
    assert published.stamp(config)["sha256"] == published.stamp(settings("protocol=metaworld_ml10"))["sha256"]
    assert published.stamp(config)["sha256"] != published.stamp(settings("protocol=metaworld_ml10_few"))["sha256"]
    assert published.stamp(settings("trials=2")) | {"sha256": ""} == {"name": "free", "sha256": "", "departures": {}}


def test_what_fulfils_a_protocol_passes(reader: ShardReader) -> None:
    published.check(tiny(), training(reader), reader)
    published.check(settings(), training(reader), reader)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"generated": {"source": "robosuite"}},
            DataError,
            "source is 'metaworld', not 'robosuite'.*generate robosuite",
        ),
        ({"generated": {"episodes": {"heldout_tasks": 8}}}, DataError, "episodes.heldout_tasks is 1, not 8"),
        ({"train_tasks": ["reach-v3"]}, DataError, r"must be trained on \['reach-v3'\], it was on"),
        ({"heldout_tasks": ["reach-v3"]}, DataError, r"must hold \['reach-v3'\], it holds \['drawer-open-v3'\]"),
        ({"demonstrations": 1}, DataError, "drawer-close-v3 by sawyer': 2.*data.episodes=1"),
        ({"speed": 1}, ConfigError, r"\['speed'\] must not be missing or added"),
    ],
)
def test_what_does_not_is_refused(reader: ShardReader, changes: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        published.check(tiny(**changes), training(reader), reader)


def test_demonstrations_of_another_dataset_cannot_be_counted(reader: ShardReader) -> None:
    with pytest.raises(DataError, match="cannot be counted: 1 training episodes, elsewhere the first"):
        published.check(tiny(), training(reader) | {"episodes": ["elsewhere"]}, reader)


def test_the_closed_loop_refuses_what_the_simulator_lacks(reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {**tiny(), "closed_loop": True}
    with pytest.raises(ConfigError, match=r"'fold-shirt-v3'.* are not simulated here; reach-v3"):
        published.check(config | {"tasks": ["fold-shirt-v3"]}, training(reader), reader)
    with pytest.raises(ConfigError, match="unknown sense 'smell'"):
        published.check(config | {"senses": ["smell"]}, training(reader), reader)
    config["protocol"]["generated"] = {}
    published.check(config, training(reader), reader)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'worldmodel\[sim\]'"):
        published.check(config, training(reader), reader)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, reader: ShardReader) -> Path:
    """A run folder of an untrained model."""
    import torch
    from conftest import compose

    from worldmodel.checkpoint import build_model, make_spec

    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny")
    statistics = json.loads((reader.root / "stats.json").read_text())
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics)
    record = training(reader) | {"data_root": str(reader.root), "seed": 0, "phases": {}, "index_sha256": ""}
    spec = make_spec(config["data"]["spec"])
    digest = statistics_hash(statistics)
    folder = tmp_path_factory.mktemp("runs") / "untrained"
    return save_model(model, folder, describe(config["model"], spec, statistics, digest, record))


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    overrides = ["splits=[heldout_episodes]", "max_clips=2", "missing=[touch]", "missing_clips=2", "threads=1"]
    return evaluate(settings(f"checkpoint={run}", "sampler_steps=1", *overrides, resolve=False))[0]


def test_a_result_is_the_same_when_run_again_from_its_stamp(report: Path, tmp_path: Path) -> None:
    """Of all numbers only one that was written otherwise is found to differ."""
    said = json.loads(report.read_text())
    value = said["offline"][0]["figures"][0]["ours"]["value"]
    said["offline"][0]["figures"][0]["ours"]["value"] = value + 1e-6
    (tmp_path / "report.json").write_text(json.dumps(said))
    (line,) = rerun(tmp_path, {"out": str(tmp_path / "again")})
    assert line == f"offline[heldout_episodes].figures[video_psnr].ours.value: {value + 1e-6} before, {value} now"
    assert (tmp_path / "again" / "report.html").is_file()


def test_a_rerun_refuses_other_weights_data_and_settings(report: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['seed'\] come from the stamp; only checkpoint, data"):
        rerun(report, {"seed": 1})
    said = json.loads(report.read_text())
    for name in ("weights_sha256", "data_index_sha256"):
        (tmp_path / "report.json").write_text(json.dumps(said | {"stamp": said["stamp"] | {name: "0" * 64}}))
        with pytest.raises(DataError, match="is not what the report is of"):
            rerun(tmp_path, {})
    with pytest.raises(DataError, match=r"is missing; checkpoint=FOLDER"):
        rerun(report, {"checkpoint": str(tmp_path)})
    (tmp_path / "report.json").write_text('{"stamp": {}, "offline": [], "closed_loop": []}')
    with pytest.raises(DataError, match="its stamp has no"):
        rerun(tmp_path, {})
    (tmp_path / "report.json").write_text("[")
    with pytest.raises(DataError, match="not a report"):
        read_report(tmp_path)
    with pytest.raises(DataError, match=r"no report\.json here"):
        read_report(tmp_path / "nowhere")


def test_differences_name_the_number() -> None:
    before = {"a": [{"name": "x", "v": 1.0, "seconds": 3}], "b": None}
    assert differences(before, {"a": [{"name": "x", "v": 1.0, "seconds": 4}], "b": None}, "r") == []
    assert differences(before, {"a": [{"name": "x", "v": 2.0}], "b": 1}, "r") == [
        "r.a[x].v: 1.0 before, 2.0 now", "r.b: None before, 1 now",
    ]  # fmt: skip
    assert differences(before, {"a": [], "b": None}, "r")


def test_stamp_card_and_page_say_what_was_done(report: Path, run: Path) -> None:
    said = json.loads(report.read_text())
    assert said["stamp"]["protocol"]["name"] == "free" and said["stamp"]["config"]["protocol"]["trials"] == 20
    assert said["missing"][0]["rows"][0]["missing"] == "touch"
    card = (report.parent / "MODEL_CARD.md").read_text()
    assert card == compose_card(said)
    assert "# Model card: untrained" in card and "4 training episodes of 2 tasks" in card
    assert "not tried in the closed loop" in card and "without touch (2 clips)" in card
    failed = [f["label"] for f in said["offline"][0]["figures"] if f["headline"] and f["beats_all"] is False]
    limits = card.split("## Limits")[1]
    assert failed and all(label in limits for label in failed)
    assert 'id="missing"' in (report.parent / "report.html").read_text()
