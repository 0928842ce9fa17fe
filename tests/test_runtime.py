"""The robot side: what it feeds the graph, what it refuses, and that it stands alone."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import ROBOTS, SPEC, FakeModel, action_path, fake_clips, fake_moments

from export.build import BuildOptions, build_artefact
from export.drive import OnnxPolicyFactory
from export.envelope import Envelope
from export.runtime import OnnxPolicy, RuntimeContractError, encode_instruction, load_manifest
from worldmodel.data.live import observation_from_history

torch.set_num_threads(1)

PROPRIO, POINTS = 5, 3


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "fake"
    options = BuildOptions(paths=("policy",), formats=("onnx",))
    build_artefact(FakeModel(), out, fake_moments(1), fake_clips(), ROBOTS, options)
    return out


def observation(step: int, images: bool = True, points: int = POINTS) -> dict[str, Any]:
    """One control step whose every value tells the step."""
    pose = np.eye(4, dtype=np.float32)
    pose[:3, 3] = step
    result: dict[str, Any] = {
        "points": np.full((points, 3), step, np.float32),
        "visible": np.ones(points, bool),
        "wrench": np.full((3, 6), step, np.float32),
        "taxels": np.full((3, 2, 2, 2), step, np.float32),
        "proprio": np.full(PROPRIO, step, np.float32),
        "instruction": "go",
    }
    for camera in SPEC.cameras if images else ():
        result[f"rgb.{camera}"] = np.full((8, 8, 3), step, np.uint8)
        result[f"intrinsics.{camera}"] = np.diag([8.0, 8.0, 1.0]).astype(np.float32)
        result[f"camera_to_base.{camera}"] = pose
    return result


def run_to(policy: OnnxPolicy, last: int) -> None:
    """Observes steps 0 to last, with images every stride only."""
    policy.reset()
    for step in range(last + 1):
        policy.observe(observation(step, images=(last - step) % SPEC.stride == 0 or step == 0))


@pytest.mark.parametrize(
    ("now", "frames"), [(0, [0, 0, 0]), (3, [0, 0, 3]), (4, [0, 0, 4]), (8, [0, 4, 8]), (30, [22, 26, 30])]
)
def test_history_is_that_of_the_training_clips(artefact: Path, now: int, frames: list[int]) -> None:
    policy = OnnxPolicy(artefact)
    run_to(policy, now)
    feed = policy.inputs()
    for name in ("rgb", "points", "taxels", "proprio"):
        assert feed[name][0].reshape(3, -1)[:, 0].tolist() == frames, name
    assert feed["camera_to_base"][0, :, 1, 0, 3].tolist() == frames
    # Before the start the oldest frame repeats, and so does the series that ends at it.
    assert feed["wrench"][0, :, :, 0, 0].tolist() == [
        [max(0, frame - back) for back in (3, 2, 1, 0)] for frame in frames
    ]
    assert all(feed[name].all() for name in feed if name.startswith("has_"))


@pytest.mark.parametrize("now", [0, 2, 5, 8, 21])
def test_inputs_are_those_of_the_eager_model(artefact: Path, now: int) -> None:
    history = []
    for step in range(now + 1):
        one = observation(step, images=(now - step) % SPEC.stride == 0 or step == 0, points=2)
        history.append(one | {"has_taxels": np.array([False, True, True])})
    policy = OnnxPolicy(artefact)
    for one in history:
        policy.observe(one)
    expected = observation_from_history(history[-SPEC.history * SPEC.stride :], SPEC)
    feed = policy.inputs()
    for name, tensor in expected._asdict().items():
        assert feed[name].dtype == tensor.numpy().dtype, name
        np.testing.assert_array_equal(feed[name], tensor.numpy(), err_msg=name)


def test_reset_forgets_the_episode(artefact: Path) -> None:
    policy = OnnxPolicy(artefact)
    run_to(policy, 0)
    first = policy.act()
    run_to(policy, 12)
    policy.act()
    run_to(policy, 0)
    np.testing.assert_array_equal(policy.act(), first)
    assert np.abs(policy.act() - first).max() > 0, "each call draws its own noise"


def test_actions_equal_the_graph_and_have_the_robots_dimensions(artefact: Path) -> None:
    policy = OnnxPolicy(artefact)
    run_to(policy, 9)
    noise = np.random.default_rng(0).standard_normal((SPEC.chunk, SPEC.action)).astype(np.float32)
    feed = policy.inputs()
    assert feed["proprio"][0, -1, :3].tolist() == [9, 9, 9]
    before = (np.zeros((1, 2, SPEC.action), np.float32), np.zeros((1, 2), bool))
    free = (np.zeros((1, SPEC.chunk, SPEC.action), np.float32), np.zeros((1, SPEC.chunk), bool))
    inputs = [torch.from_numpy(value) for value in [*feed.values(), noise[None], *before, *free]]
    path = action_path(FakeModel())
    path.envelope = Envelope(SPEC, path.model.statistics)
    expected = path(*inputs)[0].detach().numpy()[0, :, :4]
    actions = policy.act(noise=noise)
    assert actions.shape == (SPEC.chunk, 4) and policy.action_names == ["x", "y", "z", "grip"]
    np.testing.assert_allclose(actions, expected, atol=1e-5)


def test_a_chunk_begins_with_what_is_decided_and_follows_from_it(artefact: Path) -> None:
    policy = OnnxPolicy(artefact)
    run_to(policy, 9)
    noise = np.random.default_rng(0).standard_normal((SPEC.chunk, SPEC.action)).astype(np.float32)
    free = policy.act(noise)
    decided = np.linspace(-0.1, 0.1, 12, dtype=np.float32).reshape(3, 4)
    held = policy.act_after(decided, noise)
    # The arm is outside its box, so that limits hold its motion, but not its gripper.
    np.testing.assert_allclose(held[:3, 3], decided[:, 3], atol=1e-6)
    assert np.abs(held[3:] - free[3:]).max() > 1e-3, "the rest follows from it"
    np.testing.assert_array_equal(policy.act_after(decided[:0], noise), free)
    for wrong in (np.zeros((9, 4)), np.zeros((2, 3)), np.full((2, 4), np.nan)):
        with pytest.raises(RuntimeContractError, match="decided: "):
            policy.act_after(wrong)


def test_fewer_points_and_fewer_sensors_are_masked(artefact: Path) -> None:
    policy = OnnxPolicy(artefact)
    flags = np.array([False, True, True])
    policy.observe(observation(0, points=2) | {"has_taxels": flags})
    feed = policy.inputs()
    assert feed["has_points"].tolist() == [[True, True, False]]
    assert feed["has_taxels"].tolist() == [flags.tolist()] and feed["has_wrench"].all()


def test_absent_senses_are_masked_where_the_model_allows_it(artefact: Path) -> None:
    policy = OnnxPolicy(artefact)
    keep = ("rgb.front", "rgb.wrist", "proprio")
    policy.observe({key: value for key, value in observation(0).items() if key in keep})
    feed = policy.inputs()
    present = {name for name in feed if name.startswith("has_") and feed[name].any()}
    assert present == {"has_rgb", "has_proprio"}
    assert np.isfinite(policy.act()).all()


def test_mask_hides_senses_that_are_observed(artefact: Path) -> None:
    policy, plain = OnnxPolicy(artefact, mask=("camera", "points", "touch")), OnnxPolicy(artefact)
    for one in (policy, plain):
        one.observe(observation(1))
    hidden = {name for name, value in policy.inputs().items() if name.startswith("has_") and not value.any()}
    assert hidden == {"has_camera", "has_points", "has_wrench", "has_taxels"}
    assert np.abs(policy.act() - plain.act()).max() > 0


def test_a_blind_camera_reaches_the_policy_neither_as_image_nor_as_pose(artefact: Path) -> None:
    policy, sighted = OnnxPolicyFactory(artefact, blind=("wrist",))(), OnnxPolicyFactory(artefact)()
    run_to(policy, 4)
    run_to(sighted, 4)
    feed, whole = policy.inputs(), sighted.inputs()
    assert feed["has_rgb"].tolist() == feed["has_camera"].tolist() == [[True, False]]
    assert not feed["rgb"][:, :, 1].any() and (feed["camera_to_base"][:, :, 1] == np.eye(4)).all()
    np.testing.assert_array_equal(feed["rgb"][:, :, 0], whole["rgb"][:, :, 0])
    np.testing.assert_array_equal(feed["points"], whole["points"])


def test_missing_camera_is_an_error_unless_allowed(artefact: Path) -> None:
    without = {key: value for key, value in observation(0).items() if not key.endswith(".front")}
    policy = OnnxPolicy(artefact)
    policy.observe(without)
    with pytest.raises(RuntimeContractError, match=r"rgb\.front: missing now, expected uint8 \[8, 8, 3\].*'front'"):
        policy.act()
    tolerant = OnnxPolicy(artefact, allow_missing={"front"})
    tolerant.observe(without)
    assert tolerant.inputs()["has_rgb"].tolist() == [[False, True]]
    assert tolerant.inputs()["has_camera"].tolist() == [[False, True]]


def test_image_missing_from_the_history_says_when(artefact: Path) -> None:
    policy = OnnxPolicy(artefact)
    for step in range(13):
        policy.observe(observation(step, images=step in (4, 12)))
    with pytest.raises(RuntimeContractError, match=r"rgb\.front: missing 4 steps ago \(needed every 4 steps\)"):
        policy.act()


BAD = {
    "unknown name": ({"rgb.frnot": np.zeros((8, 8, 3), np.uint8)}, r"rgb\.frnot: unknown; did you mean 'rgb\.front'"),
    "shape": (
        {"rgb.front": np.zeros((8, 9, 3), np.uint8)},
        r"rgb\.front: got uint8 \[8, 9, 3\], expected uint8 \[8, 8",
    ),
    "dtype": ({"rgb.front": np.zeros((8, 8, 3), np.float32)}, r"rgb\.front: got float32 .* expected uint8"),
    "integers": ({"proprio": np.zeros(5, np.int64)}, r"proprio: got int64 \[5\], expected float32 \[5\]"),
    "not a number": ({"wrench": np.full((3, 6), np.nan, np.float32)}, r"wrench: non-finite value at \[0, 0\]"),
    "too many points": (
        {"points": np.zeros((4, 3), np.float32)},
        r"points: got float32 \[4, 3\], expected float32 \[3",
    ),
    "points alone": ({"points": np.zeros((3, 3), np.float32)}, "points, visible: expected both"),
    "scaled rotation": (
        {"camera_to_base.front": np.diag([2.0, 2, 2, 1])},
        r"camera_to_base\.front: not a rigid transform .* expected det \+1",
    ),
    "mirror": ({"camera_to_base.wrist": np.diag([-1.0, 1, 1, 1])}, r"camera_to_base\.wrist: .* det -1\.000"),
    "focal length": ({"intrinsics.front": np.zeros((3, 3))}, r"intrinsics\.front: focal lengths 0, 0"),
    "long instruction": ({"instruction": "x" * 33}, "instruction: 33 bytes, expected at most 32"),
    "instruction type": ({"instruction": b"go"}, "instruction: got bytes, expected str"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_observation_is_refused_by_name(artefact: Path, case: str) -> None:
    values, message = BAD[case]
    policy = OnnxPolicy(artefact)
    with pytest.raises(RuntimeContractError, match=message):
        policy.observe(values)
    with pytest.raises(RuntimeContractError, match="nothing observed yet"):
        policy.act()


def test_bad_arguments_are_refused_by_name(artefact: Path) -> None:
    with pytest.raises(RuntimeContractError, match=r"mask: unknown name 'smell', expected some of \['rgb'"):
        OnnxPolicy(artefact, mask=("smell",))
    with pytest.raises(RuntimeContractError, match="mask: got the text 'touch'"):
        OnnxPolicy(artefact, mask="touch")
    with pytest.raises(RuntimeContractError, match="allow_missing: unknown name 'rear'"):
        OnnxPolicy(artefact, allow_missing={"rear"})
    with pytest.raises(RuntimeContractError, match=r"embodiment: got 'panda', expected one of \['sawyer'\]"):
        OnnxPolicy(artefact, embodiment="panda")
    policy = OnnxPolicy(artefact)
    policy.observe(observation(0))
    with pytest.raises(RuntimeContractError, match=r"noise: got float64 \[2, 2\], expected float32 \[8, 6\]"):
        policy.act(noise=np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("policy.onnx", b"truncated", r"policy\.onnx: altered since export: 9 bytes"),
        ("golden.npz", None, r"golden\.npz: missing"),
        ("manifest.json", b"{", "not valid JSON"),
        ("manifest.json", b'{"schema_version": 99}', "schema_version is 99, this runtime reads 3"),
        ("manifest.json", b'{"schema_version": 3}', r"manifest\.json: has no \['control'.*'paths'"),
        ("manifest.json", None, r"no manifest\.json"),
    ],
)
def test_damaged_artefact_is_refused(
    artefact: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artefact, copy)
    (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
    with pytest.raises(RuntimeContractError, match=message):
        OnnxPolicy(copy)


def test_file_outside_the_folder_is_refused(artefact: Path, tmp_path: Path) -> None:
    manifest = load_manifest(artefact)
    manifest["graphs"] = []
    manifest["files"] = {"../policy.onnx": {"bytes": 0, "sha256": ""}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RuntimeContractError, match="does not lie in the artefact folder"):
        OnnxPolicy(tmp_path)


def test_instruction_encoding() -> None:
    assert encode_instruction("aé", 5).tolist() == [98, 0xC3 + 1, 0xA9 + 1, 0, 0]


@pytest.mark.parametrize(("sentences", "warned"), [(None, 0), (["stay", "go"], 0), (["go on", "stay"], 1)])
def test_an_instruction_that_counts_as_absent_is_said_once(artefact, caplog, sentences, warned) -> None:
    policy = OnnxPolicy(artefact)
    policy.manifest["instruction"]["known"] = sentences
    for step in range(3):
        policy.observe(observation(step))
        policy.inputs()
    said = [record.getMessage() for record in caplog.records if "counts as absent" in record.getMessage()]
    assert len(said) == warned and all("'go' is none of the 2" in one and "'go on'" in one for one in said)


def test_the_folder_runs_alone_without_torch_and_without_this_repository(artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "robot"
    shutil.copytree(artefact, folder)
    script = """
        import sys
        for name in ("torch", "worldmodel", "export", "onnx", "omegaconf"):
            sys.modules[name] = None
        import numpy as np
        from runtime import OnnxPolicy
        policy = OnnxPolicy(".", instruction="go", mask=("camera", "points", "touch"))
        policy.observe({
            "rgb.front": np.zeros((8, 8, 3), np.uint8),
            "rgb.wrist": np.zeros((8, 8, 3), np.uint8),
            "proprio": np.zeros(5),
        })
        print(policy.act().shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(8, 4)"
