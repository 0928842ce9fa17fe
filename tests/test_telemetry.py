"""What a run logs: averages, losses by noise level, FLOPs, speed; and the page of its curves."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_model import future_of, generator, observation_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from worldmodel.contracts import Batch
from worldmodel.curves import POINTS, filled, main, read_log, thinned, write_curves
from worldmodel.errors import ConfigError
from worldmodel.flops import Meter, matmul_peak, measure_cost
from worldmodel.losses import by_level, masked_mean
from worldmodel.phases import Ingredient, Phase
from worldmodel.run_folder import keep_log
from worldmodel.telemetry import Averages, head
from worldmodel.training import PhaseModule


def trainer(ranks: int = 1) -> Any:
    """As far as telemetry needs one; every rank says the same."""
    gather = lambda values: values.expand(ranks, -1) if ranks > 1 else values  # noqa: E731
    return SimpleNamespace(strategy=SimpleNamespace(all_gather=gather, root_device=torch.device("cpu")))


@pytest.mark.parametrize("ranks", [1, 3])
def test_averages_are_over_the_steps_that_had_a_value(ranks):
    averages = Averages()
    for step in range(4):
        averages.add({"loss": torch.tensor(float(step)), "part": torch.tensor(2.0 if step == 1 else torch.nan)})
    averages.add({"other": torch.tensor(5.0), "loss": torch.tensor(9.0)})
    assert averages.take(trainer(ranks)) == {"loss": 3.0, "part": 2.0, "other": 5.0}
    assert averages.take(trainer(ranks)) == {}


def test_quarters_of_the_noise_level_together_are_the_loss():
    g = generator()
    error, mask, level = (
        torch.rand(32, 3, 5, generator=g),
        torch.rand(32, 3, generator=g) < 0.7,
        torch.rand(32, generator=g),
    )
    level[:8] = torch.tensor([0.0, 0.1, 0.24, 0.25, 0.5, 0.74, 0.75, 1.0])
    found = by_level("video", error, mask, level)
    assert list(found) == [f"noise/video/{end}" for end in (25, 50, 75, 100)]
    total = torch.zeros(())
    for i, mean in enumerate(found.values()):
        rows = (level >= i / 4) & ((level < (i + 1) / 4) | (i == 3))
        torch.testing.assert_close(mean, masked_mean(error[rows], mask[rows]))
        total += mean * mask[rows].sum() / mask.sum()
    torch.testing.assert_close(total, masked_mean(error, mask))
    assert by_level("video", error[:1], mask[:1], level[:1])["noise/video/100"].isnan()


def test_the_meter_counts_what_forward_and_backward_do():
    """Against torch's counter over both, with a frozen layer, an input without gradient, and a part without any."""
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16).requires_grad_(False), nn.Conv1d(16, 4, 1))
    x = torch.randn(3, 8)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            known = net[0](x)
        h = net[1](net[0](x) + known)
        return (net[2](h[..., None])[..., 0] @ torch.randn(4, 2)).sum()

    with Meter() as meter:
        loss()
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    assert meter.total == counter.get_total_flops() > 0


def test_a_step_costs_its_rows_and_reads_their_tokens(tiny_model):
    """Twice the rows are twice the FLOPs and tokens; the model computes afterwards what it did before."""
    model = tiny_model.train()
    phase = Phase(
        name="p", objective="world", trains=("denoiser", "expert"), steps=1, batch_size=2, learning_rate=1e-3,
        mixture=(Ingredient(mode="joint", weight=1.0),),
    )  # fmt: skip
    module = PhaseModule(model=model, phase=phase, seed=0)
    batch = Batch(observation_of(model.spec), future_of(model.spec), torch.zeros(2, 3, dtype=torch.int64), ["a", "b"])
    before = module.losses(batch)["loss"]
    whole = measure_cost(module, model, lambda: module.losses(batch))
    one = head(batch, 1)
    assert one.key == ["a"] and one.observation.rgb.shape[0] == 1
    half = measure_cost(module, model, lambda: module.losses(one))
    assert whole.flops == pytest.approx(2 * half.flops, rel=1e-3)
    frames = model.spec.history + model.spec.future
    assert half.tokens == {n: frames * c for n, c in model.denoiser.counts.items()} | {"actions": model.spec.chunk}
    assert whole.tokens == {name: 2 * count for name, count in half.tokens.items()}
    torch.testing.assert_close(module.losses(batch)["loss"], before)


def test_the_peak_is_measured_once_and_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    peak = matmul_peak(torch.device("cpu"), torch.float32, 64)
    assert peak > 1e6 and matmul_peak(torch.device("cpu"), torch.float32, 64) == peak
    assert torch.equal(torch.get_rng_state(), state)


def write_log(run: Path, rows: list[dict[str, float]]) -> None:
    (run / "csv").mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(run / "csv" / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def made_up(steps: range, shift: float = 0.0) -> list[dict[str, float]]:
    return [
        {
            "step": s,
            "world/loss": shift + 1 / (s + 1),
            "world/joint/video": 2.0,
            "world/noise/video/25": 0.1,
            "mfu": 0.4,
        }
        | {"data_wait": 0.01, "gradient_norm": 1.0}
        for s in steps
    ]


def test_a_log_is_read_over_all_attempts(tmp_path):
    write_log(tmp_path, [{"step": 9, "first/loss": 3.0}, *made_up(range(9, 50, 10))])
    keep_log(tmp_path / "csv")
    write_log(tmp_path, made_up(range(39, 80, 10), shift=5.0))
    log = read_log(tmp_path)
    assert list(log) == ["first", "world"]
    assert list(log["world"]["loss"]) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert log["world"]["loss"][40] > 5 > log["world"]["loss"][30], "what was trained again counts once"
    assert log["world"]["noise/video/25"][10] == 0.1


def test_a_page_has_every_curve_of_every_run(tmp_path, capsys):
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        write_log(run, made_up(range(19, 400, 20)))
    main([*map(str, runs), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for text in ("Loss", "joint/video", "video: loss by noise level, two", "share of the measured peak", "Waiting"):
        assert text in page, text
    assert page.count('<polyline class="s1"') >= 5, "the second run lies over the first"
    with pytest.raises(ConfigError, match="5 runs, but a chart tells 4 apart"):
        write_curves([runs[0]] * 5, tmp_path / "page.html")
    with pytest.raises(SystemExit, match="is it a run folder"):
        main([str(tmp_path / "none")])


def test_long_lines_are_averaged_and_lines_with_steps_of_their_own_have_no_gaps():
    thin = thinned({step: float(step) for step in range(1000)})
    assert len(thin) <= POINTS and all(x == y for x, y in thin)
    assert filled([0, 1, 2, 3], {1: 1.0, 3: 3.0})[1:] == [1.0, 2.0, 3.0]
    assert filled([0, 1], {1: 1.0})[0] != filled([0, 1], {1: 1.0})[0], "nothing before its first point"
