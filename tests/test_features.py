"""Features of frozen networks made once: training on them gives the same numbers and runs no network."""

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import compose
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from synthetic import made_up_dataset
from test_model import draws, generator, observation_of

from worldmodel.checkpoint import build_model, load_model, make_spec
from worldmodel.curriculum import train
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics, merge_statistics
from worldmodel.encoders.conditioner import Conditioner
from worldmodel.encoders.feature_store import FeatureStore, describe, key_of, part_path, write_part
from worldmodel.encoders.pretrained import attach_features
from worldmodel.encoders.vision import VisionBackbone
from worldmodel.encoders.vision_language import VisionLanguageConditioner
from worldmodel.errors import ConfigError, DataError
from worldmodel.features import main, make_features
from worldmodel.losses import world_loss
from worldmodel.model import WorldModel

SEEING = ("encoders/image=vision", "encoders/text=vision_language", "encoders.gives=both")
DINOV3 = ("encoders.image.config.model_type=dinov3_vit", "encoders.image.pixels=[32,32]")


def settings(dataset: Path, run: Path, *more: str) -> list[str]:
    """A run of seconds: two steps of stage 1, which hide the instruction of some rows and change no picture."""
    return [
        "experiment=kairos_tiny",
        f"data.root={dataset}",
        f"run_dir={run}",
        "wandb.mode=disabled",
        "trainer.threads=1",
        *(f"~phases.{name}" for name in ("tokeniser", "locate", "compositor", "synthesis", "behaviour", "policy")),
        "phases.understanding.steps=2",
        "phases.understanding.batch_size=3",
        "phases.understanding.lens=1.0",
        "phases.understanding.patches=0",
        "phases.understanding.dropout.text=0.5",
        *more,
    ]


@dataclass
class Counted:
    """Which frozen networks ran, and on how many rows."""

    calls: list[str] = field(default_factory=list)
    rows: int = 0

    def wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, counted."""

        def run(own: Any, what: Any, *rest: Any) -> Any:
            self.calls.append(name)
            self.rows += len(what)
            return method(own, what, *rest)

        return run


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    for owner, name in ((VisionBackbone, "run"), (Conditioner, "run"), (VisionLanguageConditioner, "look")):
        monkeypatch.setattr(owner, name, counted.wrap(f"{owner.__name__}.{name}", getattr(owner, name)))
    return counted


def losses(run: Path) -> list[float]:
    """Every logged loss of a run, in order."""
    with open(run / "csv" / "metrics.csv") as file:
        return [float(v) for row in csv.DictReader(file) for k, v in row.items() if k.endswith("/loss") and v]


@pytest.mark.parametrize("tuned", ["image", "text"])
def test_backbones_train_save_load_and_predict(tiny_dataset, tmp_path, tuned):
    """One network of the run is tuned, the other frozen: the weights of that one do not move."""
    kind = DINOV3 if tuned == "image" else ()
    options = (*SEEING, *kind, f"encoders.{tuned}.frozen=false")
    run = train(compose(*settings(tiny_dataset, tmp_path / "run", *options)))
    trained, model = load_file(run / "model.safetensors"), load_model(run)
    fresh = untrained(tiny_dataset, tmp_path, options)
    networks = {
        part: {name for name in trained if name.startswith(f"encoder.{part}.") and ".net." in name}
        for part in ("image", "text")
    }
    assert all(networks.values())
    moved = {name for name in trained if not torch.equal(trained[name], fresh[name])}
    assert [part for part, names in networks.items() if names & moved] == [tuned]
    assert {"encoder.image.position", "encoder.register"} <= moved
    with torch.no_grad():
        predicted = model.predict(observation_of(model.spec), None, "joint", generator=generator(), steps=1)
    assert all(torch.isfinite(value).all() for value in predicted)


def untrained(dataset: Path, folder: Path, options: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The weights that such a run begins with."""
    config = compose(*settings(dataset, folder / "fresh", *options))
    L.seed_everything(config["seed"], verbose=False)
    statistics = merge_statistics([load_statistics(dataset)])
    return dict(build_model(config["model"], make_spec(config["data"]["spec"]), statistics).state_dict())


def test_training_on_features_gives_the_same_numbers_without_a_network(tiny_dataset, tmp_path, counted):
    plain = train(compose(*settings(tiny_dataset, tmp_path / "plain", *SEEING)))
    assert {"VisionBackbone.run", "Conditioner.run", "VisionLanguageConditioner.look"} == set(counted.calls)
    keep = f"data.features={tmp_path / 'features'}"
    config = compose(*settings(tiny_dataset, tmp_path / "cached", *SEEING, keep))
    folders = make_features(config, progress=False)
    assert sorted(f.name.split("-")[0] for f in folders) == ["image", "text"]
    counted.calls.clear()
    cached = train(config)
    assert not counted.calls
    assert losses(plain) and losses(cached) == pytest.approx(losses(plain), rel=1e-4)
    a, b = (load_file(run / "model.safetensors") for run in (plain, cached))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=2e-3, msg=name)
    model = load_model(plain)
    found = [policy_loss(model, tiny_dataset)]
    counted.calls.clear()
    digest = hashlib.sha256((tiny_dataset / "index.json").read_bytes()).hexdigest()
    attach_features(model.encoder, tmp_path / "features", {"data": digest})
    found.append(policy_loss(model, tiny_dataset))
    assert not counted.calls
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def policy_loss(model: WorldModel, dataset: Path) -> torch.Tensor:
    """Of some clips, the instruction of some of them hidden, images of none."""
    clips = ClipDataset(ShardReader(dataset), model.spec, split="train", future=False)
    batch = collate([clips[i] for i in range(0, len(clips), len(clips) // 5)])
    losses = world_loss(
        model,
        batch,
        model.history_latents(batch.observation),
        draws(len(batch.key)),
        mode="policy",
        drop=(),
        dropout={"text": 0.5},
        draws=1,
        weights={},
        insulate=False,
        huber=None,
        given={},
        absent=0.0,
    )
    return losses["loss"].detach()


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Two shards of noise pictures of 32 pixels from one camera."""
    groups = {("sawyer", "reach-v3"): 2, ("sawyer", "push-v3"): 1}
    return made_up_dataset(tmp_path_factory.mktemp("noise") / "data", groups, pixels=32)


def small(dataset: Path, features: Path | str, *more: str) -> dict[str, Any]:
    """Settings of the noise: the second camera is not there."""
    size = ["data.spec.height=32", "data.spec.width=32", "data.spec.cameras=[front]"]
    keep = f"data.features={features}"
    return compose("experiment=kairos_tiny", f"data.root={dataset}", "encoders/image=vision", keep, *size, *more)


def attached(config: dict[str, Any], dataset: Path, name: str = "data") -> Any:
    """Stage 1 of a configuration, reading its features."""
    encoder = instantiate(config["model"]["encoder"], _convert_="all")
    digest = hashlib.sha256((dataset / "index.json").read_bytes()).hexdigest()
    attach_features(encoder, Path(config["data"]["features"]), {name: digest})
    return encoder


def test_what_is_not_there_is_computed(noise, tmp_path, counted):
    """Pictures that training changed, views that are absent, rows of both kinds in one batch."""
    config = small(noise, tmp_path)
    make_features(config, progress=False)
    counted.calls.clear()
    encoder, plain = attached(config, noise), instantiate(config["model"]["encoder"], _convert_="all").image.backbone
    reader = ShardReader(noise)
    stored = torch.from_numpy(reader.pictures(0, "front", [0, 3]))
    strange = torch.randint(0, 256, (2, 3, 32, 32), generator=generator(1), dtype=torch.uint8)
    rgb = torch.stack([stored[0], strange[0], torch.zeros_like(strange[0]), stored[1], strange[1]]).float() / 127.5 - 1
    counted.rows = 0
    found = encoder.image.backbone(rgb)
    assert counted.rows == 2, "the two that nobody stored"
    torch.testing.assert_close(found, plain(rgb), atol=1e-5, rtol=1e-5)


def test_an_interrupted_call_goes_on_where_it_stopped(noise, tmp_path, counted):
    config = small(noise, tmp_path)
    (folder,) = make_features(config, progress=False)
    first, second = sorted(folder.glob("*.safetensors"))
    kept, lost = first.stat().st_mtime_ns, load_file(second)
    second.unlink()
    with pytest.raises(ConfigError, match=r"is unfinished, 1 of 2 shards lack"):
        attached(config, noise)
    counted.rows = 0
    make_features(config, progress=False)
    assert counted.rows == len(lost["keys"])
    assert first.stat().st_mtime_ns == kept
    assert all(torch.equal(value, lost[name]) for name, value in load_file(second).items())
    counted.rows = 0
    make_features(config, progress=False)
    assert counted.rows == 0, "what is there is not made again"


def test_features_of_another_network_or_other_data_are_refused_by_name(noise, tmp_path):
    config = small(noise, tmp_path / "features")
    make_features(config, progress=False)
    with pytest.raises(ConfigError, match=r"no features of encoders\.image \(dinov3_vit .*only of siglip_vision_model"):
        attached(small(noise, tmp_path / "features", *DINOV3), noise)
    with pytest.raises(ConfigError, match=r"no features of encoders\.image .*only of siglip_vision_model"):
        attached(small(noise, tmp_path / "features", "encoders.image.pixels=[32,32]"), noise)
    other = made_up_dataset(tmp_path / "other", {("sawyer", "reach-v3"): 1}, pixels=32)
    with pytest.raises(ConfigError, match=rf"for other \([0-9a-f]{{16}}\), only of siglip_vision_model .* on {noise}"):
        attached(config, other, "other")
    with pytest.raises(ConfigError, match="none of any other"):
        attached(small(noise, tmp_path / "nothing"), noise)
    with pytest.raises(ConfigError, match="no network of stage 1 is frozen"):
        attached(small(noise, tmp_path / "features", "encoders/image=tiny"), noise)
    with pytest.raises(ConfigError, match=r"data\.features is null"):
        make_features(small(noise, "null"), progress=False)


def test_damaged_features_are_refused(noise, tmp_path):
    config = small(noise, tmp_path)
    (folder,) = make_features(config, progress=False)
    path = part_path(folder, "shard-000001.tar")
    held = load_file(path)
    save_file({**held, "ends": held["ends"][:-1]}, path)
    with pytest.raises(DataError, match=rf"{path}: keys, ends and tokens do not fit"):
        attached(config, noise)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=rf"{path}: no file of features"):
        attached(config, noise)
    notes = folder / "features.json"
    notes.write_text(notes.read_text().replace('"schema_version": 1', '"schema_version": 0'))
    with pytest.raises(DataError, match=rf"{notes}: schema_version is 0, this version reads 1"):
        attached(config, noise)


def test_stores_find_what_was_written(tmp_path):
    """Sequences of any length, over several files."""
    rows = {key_of(str(i).encode()): torch.randn(i % 4, 3, generator=generator(i)) for i in range(40)}
    parts = [dict(list(rows.items())[:25]), dict(list(rows.items())[25:]), {}]
    shards = [f"shard-{i:06d}.tar" for i in range(3)]
    describe(tmp_path, part="text", backbone={}, dataset="0" * 64, name="data", shards=shards)
    for shard, part in zip(shards, parts, strict=True):
        write_part(tmp_path, shard, part)
    store = FeatureStore([tmp_path])
    assert len(store) == 40
    for key, value in rows.items():
        found = store.find(key)
        assert found is not None
        torch.testing.assert_close(found, value)
    assert store.find(key_of(b"40")) is None
    assert key_of(b"ab", b"c") != key_of(b"a", b"bc")


def test_command_line(noise, tmp_path, capsys):
    assert main(["--help"]) == 0
    assert "data.features=DIR" in capsys.readouterr().out
    words = ["experiment=kairos_tiny", f"data.root={noise}"]
    assert main(words) == 2
    assert "data.features is null" in capsys.readouterr().err
    assert main([*words, "data.featurez=x"]) == 2
    size = ["data.spec.height=32", "data.spec.width=32", "data.spec.cameras=[front]"]
    more = ["encoders/image=vision", "encoders/text=language", f"data.features={tmp_path}", "batch=4"]
    assert main([*words, *size, *more]) == 0
    folders = sorted(tmp_path.iterdir())
    assert [folder.name.split("-")[0] for folder in folders] == ["image", "text"]
    shown = capsys.readouterr().out
    assert all(f"features: {folder} (" in shown for folder in folders)
    sentences = sum(len(load_file(path)["keys"]) for path in folders[1].glob("*.safetensors"))
    assert sentences == 2 * 2, "one instruction a shard, and none"
