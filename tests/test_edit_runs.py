"""Edits from data to film: a phase on generated variants, its evaluation with the report, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import compose
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from page_checks import check_page
from PIL import Image
from test_data_variants import SETTINGS

from worldmodel.checkpoint import load_model, make_spec
from worldmodel.contracts import Pair
from worldmodel.curriculum import train
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.data.generate import generate
from worldmodel.data.pairs import PairDataset
from worldmodel.data.shards import ShardReader
from worldmodel.edit import edit
from worldmodel.edit_evaluation import choose_pairs, evaluate_edits
from worldmodel.errors import ConfigError
from worldmodel.report import write_report

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def varied(tmp_path_factory) -> Path:
    """One episode for training and one held out, with an element and the view changed; treat it as read-only."""
    out = tmp_path_factory.mktemp("edits") / "varied"
    return generate("metaworld", out, **SETTINGS, vary=[["element"], ["view"]])


@pytest.fixture(scope="module")
def trained(varied, tmp_path_factory) -> Path:
    """Two steps of an edit phase."""
    run = tmp_path_factory.mktemp("runs") / "edit"
    sizes = [f"phases.{phase}.{key}=2" for phase in ("words", "edit") for key in ("steps", "batch_size")]
    sizes += ["init=null", "wandb.mode=disabled", "trainer.threads=1"]
    return train(compose("experiment=kairos_tiny_edit", f"data.root={varied}", f"run_dir={run}", *sizes))


def settings(checkpoint: Path, out: Path, **changes) -> dict:
    with initialize_config_dir(str(CONFIGS / "edit"), version_base="1.3"):
        config = hydra_compose(
            "edit", [f"checkpoint={checkpoint}", "episode=none", f"out={out}", "sampler_steps=1", "threads=1"]
        )
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()} | changes


def test_pairs_are_drawn_as_often_as_asked_and_resume_where_they_stopped(varied):
    spec = make_spec(compose("experiment=kairos_tiny_edit")["data"]["spec"])

    def module(**changes) -> ClipDataModule:
        options = {
            "root": str(varied),
            "spec": spec,
            "batch_size": 8,
            "seed": 0,
            "pairs": {"element": 3.0, "view": 1.0},
        }
        return ClipDataModule(**options | changes)

    def take(data: ClipDataModule, count: int) -> list[Pair]:
        batches = iter(data.train_dataloader())
        found = [next(batches) for _ in range(count)]
        assert all(isinstance(batch, Pair) for batch in found)
        return found  # pyright: ignore[reportReturnType]

    first = module()
    kinds = np.concatenate([batch.kind.numpy() for batch in take(first, 6)])
    assert 0.5 < 1 - kinds.mean() < 0.95 and first.realised["element"] == pytest.approx(1 - kinds.mean())
    whole = [batch.key for batch in take(module(), 4)]
    half = module()
    assert [batch.key for batch in take(half, 2)] == whole[:2]
    rest = module()
    rest.load_state_dict(half.state_dict())
    assert [batch.key for batch in take(rest, 2)] == whole[2:]
    with pytest.raises(ConfigError, match="leave `mixture`"):
        module(on_error="skip")


def test_a_checkpoint_that_edits_is_evaluated_and_reported(trained, varied, tmp_path):
    model, reader = load_model(trained), ShardReader(varied)
    result = evaluate_edits(model, reader, "heldout_episodes", clips=4, batch_size=2, steps=1, plane=0.05)
    names = {figure["name"] for figure in result["figures"]}
    assert {"element_inside/words", "element_colour/picture", "view_psnr/front", "across_ssim/wrist"} <= names
    assert result["outside"] == 0.0 and result["kinds"] == {"element": 4, "view": 4} and result["episodes"] == 1
    across = [figure["name"] for figure in result["figures"] if figure["name"].startswith("across_psnr")]
    assert across == ["across_psnr/wrist", "across_psnr/front"]
    inside = next(figure for figure in result["figures"] if figure["name"] == "element_inside/words")
    assert [b["name"] for b in inside["baselines"]] == ["source unchanged", "asked colour, flat"]
    report = {"title": "edits", "stamp": {}, "offline": [], "closed_loop": [], "edits": result}
    data, page = write_report(report, tmp_path)
    html = page.read_text()
    check_page(html)
    assert html.count("<video") == 2 * len(result["samples"]) and "asked colour, flat" in html
    assert json.loads(data.read_text())["edits"]["outside"] == 0


def test_evaluated_pairs_have_a_future_and_take_turns(varied):
    spec = make_spec(compose("experiment=kairos_tiny_edit")["data"]["spec"])
    pairs = PairDataset(ShardReader(varied), spec, split="train")
    chosen = [pairs.locate(index) for index in choose_pairs(pairs, 6, seed=0)]
    assert len({link.target for link, _ in chosen[:2]}) == 2 and len(set(chosen)) == 6
    assert all(step + spec.window < pairs.reader.entries[link.source].length for link, step in chosen)


def test_the_command_writes_a_film_and_a_sheet(trained, varied, tmp_path, capsys):
    reader = ShardReader(varied)
    episode = next(e for e in reader.entries if e.split == "heldout_episodes" and reader.variants(e.episode_id))
    call = lambda **changes: edit(settings(trained, tmp_path, episode=episode.key, **changes))  # noqa: E731
    film, sheet = call(like=1)
    asked = reader.read(reader.variants(episode.episode_id)[0], images=False).meta["edit"]
    assert asked in capsys.readouterr().out and film.stat().st_size > 1000
    assert np.asarray(Image.open(sheet)).shape == (2 * 3 * 128, 6 * 128, 3)
    Image.new("RGB", (80, 40), (200, 30, 30)).save(tmp_path / "red.png")
    _, sheet = call(elements=["table"], reference=str(tmp_path / "red.png"))
    assert np.asarray(Image.open(sheet)).shape == (2 * 2 * 128, 6 * 128, 3)
    call(camera="front", azimuth=20.0)
    call(only="front")
    for wrong, message in (
        ({}, "say what to change by one of"),
        ({"like": 1, "camera": "front"}, "say what to change by one of"),
        ({"like": 7}, r"no variant 7 .* has \[1, 2\]"),
        ({"elements": ["table"]}, "by `instruction`, by `reference` or both"),
        ({"elements": ["moon"], "instruction": "x"}, r"unknown \['moon'\]; the masks have background"),
        ({"elements": ["table"], "reference": "none.png"}, "there is no file none.png"),
        ({"camera": "top"}, "unknown camera 'top'; one of front, wrist"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(**wrong)
    with pytest.raises(ConfigError, match="episode: no 'none'"):
        edit(settings(trained, tmp_path))
