"""The report is complete, self-contained and well-formed; its videos decode."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from page_checks import check_page

from worldmodel.contracts import ClipSpec
from worldmodel.errors import ContractError
from worldmodel.figures import FIGURES, SampleClip, summarise, worst_and_median
from worldmodel.holdout import Clip
from worldmodel.metrics import Rows, Sums
from worldmodel.plots import interval_chart, line_chart, number, scene, ticks
from worldmodel.report import render, write_report
from worldmodel.trials import wilson_interval
from worldmodel.viz import encode_mp4, side_by_side, video_data_uri

torch.set_num_threads(1)
SPEC = ClipSpec()
VIEWED = (
    "camera_path_translation",
    "camera_path_rotation",
    "camera_translation",
    "camera_rotation",
    "camera_fov",
    "camera_given_actions",
)
NASTY = 'push <b>"it"</b> & stop'


def sample(task: str, psnr: float, rng: np.random.Generator) -> SampleClip:
    clip = Clip(0, f"{task}-000", task, NASTY, 4, torch.ones(4).bool(), torch.zeros(8).bool(), torch.zeros(8))
    rgb = rng.integers(0, 255, (2, SPEC.window, 2, 3, 64, 64), dtype=np.uint8)
    poses = np.tile(np.eye(4, dtype=np.float32), (SPEC.future, 2, 1, 1))
    return SampleClip(
        clip, "", psnr, rgb[0], rgb[1], np.array([0.8, 1.2]), poses[0], poses + 0.01, poses,
        rng.normal(size=(3, 4, 3)), rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 4, 3)), np.ones(4, bool),
        rng.normal(size=(3, 3, 6)), rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 3, 6)), np.ones(3, bool),
        {"another's <path>": rgb[0]}, {"another's <path>": rng.uniform(0, 64, (SPEC.window, 2, 6, 2))},
    )  # fmt: skip


def offline(split: str, tasks: list[str], factor: float) -> dict:
    rng = np.random.default_rng(0)
    samples = [sample(task, psnr, rng) for task in tasks for psnr in (20.0, 25.0, 30.0)]
    rows = {}
    for name, kind in FIGURES.items():
        for full in [f"{name}/{view}" for view in SPEC.cameras] if name in VIEWED else [name]:
            ours = torch.tensor(rng.uniform(0.1, 0.2, (len(samples), 4)))
            base = ours * (1 if name == "force_now" else factor)
            base = base / factor**2 if kind.higher and not kind.decibel else base
            weight = torch.ones_like(ours)
            rows[full] = Rows()
            rows[full].add(Sums(ours, weight), **{} if name == "tokeniser" else {"mean_pose": Sums(base, weight)})
    clips = [s.clip for s in samples]
    counts = {"clips": len(clips), "episodes": len(clips), "tasks": tasks, "seconds": 1.0, "settings": {"seed": 0}}
    return {
        "split": split, "spec": SPEC, **counts, **summarise(rows, clips, 0), "samples": worst_and_median(samples),
    }  # fmt: skip


def closed(policy: str, successes: int) -> dict:
    low, high = wilson_interval(successes, 20)
    task = {
        "task": "reach-v3",
        "trials": 20,
        "successes": successes,
        "success": successes / 20,
        "interval": [low, high],
    }
    video = video_data_uri(np.zeros((2, 3, 64, 64)), np.zeros((2, 3, 64, 64)))
    return {
        "policy": policy, "observes": "everything", "mean_success": successes / 20, "interval": [low, high], "seed": 7,
        "replan": 2, "ensemble": 0.1, "max_steps": 125, "tasks": [task],
        "rollouts": {"reach-v3": [{"success": False, "video": video}]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict:
    return {
        "title": "tiny <run>",
        "stamp": {"git_revision": "abc123", "versions": {"torch": "2"}, "config": {"seed": 0, "note": float("nan")}},
        "offline": [
            offline("heldout_episodes", ["reach-v3", "push-v3"], 2),
            offline("heldout_tasks", ["door-v3"], 0.5),
        ],
        "closed_loop": [closed("ONNX, all senses", 19), closed("Behaviour-cloning MLP", 17)],
    }


@pytest.fixture(scope="module")
def page(results: dict) -> str:
    return render(results)


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    check_page(page)


def test_page_escapes_what_the_data_say(page: str) -> None:
    assert NASTY not in page and "push &lt;b&gt;" in page and "tiny &lt;run&gt;" in page


def test_every_stream_figure_and_split_is_shown(page: str, results: dict) -> None:
    for kind in FIGURES.values():
        assert kind.label in page
    for result in results["offline"]:
        for figure in result["figures"]:
            assert number(figure["ours"]["value"]) in page
        for task in result["tasks"]:
            assert task in page
    for words in (
        "Held-out episodes of training tasks",
        "Held-out tasks",
        "abc123",
        "Behaviour-cloning MLP",
        "19 / 20",
    ):
        assert words in page


def test_verdicts_follow_the_direction_of_each_figure(results: dict) -> None:
    seen, unseen = ({f["name"]: f for f in r["figures"]} for r in results["offline"])
    assert all(f["beats_all"] for name, f in seen.items() if f["baselines"] and name != "force_now")
    assert not any(f["beats_all"] for f in unseen.values())
    assert seen["force_now"]["beats_all"] is False  # a tie is no win
    assert seen["video_psnr"]["baselines"][0]["difference"]["value"] == pytest.approx(10 * math.log10(2))


def test_json_is_strict_and_free_of_pictures(results: dict, tmp_path: Path) -> None:
    data, page = write_report(results, tmp_path / "new" / "folder")
    text = data.read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["offline"][0]["figures"] and read["closed_loop"][0]["mean_success"] == 0.95
    assert read["stamp"]["config"]["note"] is None
    assert read["offline"][0]["samples"][0]["task"] == "push-v3"
    assert "data:video" not in text and "data:video" in page.read_text()


def test_led_pictures_stand_beside_the_unled_and_the_true(page: str, results: dict) -> None:
    count = sum(len(result["samples"]) for result in results["offline"])
    assert page.count("nothing given | another&#x27;s &lt;path&gt; | true") == count * len(SPEC.cameras)


def test_page_without_closed_loop_or_samples(results: dict) -> None:
    bare = [{**result, "samples": []} for result in results["offline"]]
    page = render({**results, "closed_loop": [], "offline": bare})
    assert 'id="closed-loop"' not in page and "No clips in this report" in page
    assert "No offline evaluation" in render({**results, "closed_loop": [], "offline": []})


def test_videos_of_the_page_decode(page: str) -> None:
    uris = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert len(uris) == 3 * 2 * 2 * len(SPEC.cameras) + 2  # each clip without and with given futures
    frames = decode(base64.b64decode(uris[-1]))
    assert len(frames) == SPEC.window


def decode(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_video_shows_predicted_left_and_true_right() -> None:
    predicted, target = np.zeros((5, 3, 64, 64)), np.ones((5, 3, 64, 64))
    data = base64.b64decode(video_data_uri(predicted, target).split(",", 1)[1])
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads
    frames = decode(data)
    assert len(frames) == 5 and frames[0].shape == (192, 392, 3)
    assert frames[2][:, :180].max() < 30 and frames[2][:, 212:].min() > 225


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 47), (240, 320)])
def test_enlarged_sides_are_even(height: int, width: int) -> None:
    shown = side_by_side(np.zeros((1, 3, height, width)), np.zeros((1, 3, height, width)))
    assert shown.shape[1] % 2 == shown.shape[2] % 2 == 0 and shown.shape[1] >= 192


def test_frames_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ContractError, match="in all clips"):
        side_by_side(np.zeros((1, 3, 8, 8)), np.zeros((2, 3, 8, 8)))
    three = side_by_side(*(np.full((1, 3, 8, 8), value) for value in (0.0, 0.5, 1.0)), least=8)
    assert three.shape == (1, 8, 40, 3) and three[0, 0, ::16, 0].tolist() == [0, 128, 255]
    with pytest.raises(ContractError, match="even sides"):
        encode_mp4(np.zeros((1, 7, 8, 3), np.uint8))


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in ((0.0, 3e-5), (-7.0, 2.0), (21.3, 29.9), (5.0, 5.0)):
        found = ticks(low, high)
        assert found and all(low - 1e-9 <= t <= high + 1e-9 for t in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (27.613, "27.6"),
        (0.00591, "0.00591"),
        (0, "0"),
        (-1.5, "−1.50"),
        (-2.9e-7, "−2.9e-07"),
        (1234.6, "1235"),
        (math.nan, "–"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_charts_survive_missing_values() -> None:
    assert "nan" not in line_chart([1, 2, 3], {"a": [1.0, math.nan, 2.0]}, "x", "y")
    assert "Nothing was measured" in line_chart([1], {"a": [math.nan]}, "x", "y")
    assert "Nothing" not in line_chart([1], {"a": [0.0]}, "x", "y")
    assert "nan" not in scene({"true": [(np.full((4, 4), np.nan), 1.0)]}, {"true": [np.zeros((3, 3))]}, "c")
    assert "No pose" in scene({}, {}, "c")
    assert interval_chart({"a": {"p": (0.5, 0.2, 0.8)}}, ["p"]).count("<circle") == 1


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["--help"], "python eval.py checkpoint=runs/", 0),
        ([], "which checkpoint", 1),
        (["checkpoint=nowhere"], "nowhere", 1),
    ],
)
def test_command_line(arguments: list[str], words: str, status: int) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "eval.py", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == status and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
