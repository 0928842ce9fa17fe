"""`serve` and `replay`: an artefact and recorded episodes behind the server, also where nothing else is installed."""

import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import SPEC
from server_fakes import WireClient, made_up_artefact, running
from synthetic import made_up_dataset
from websockets.exceptions import ConnectionClosed

from export.__main__ import main
from export.onnx_source import OnnxSource
from export.replay import ReplaySource
from export.runtime import OnnxPolicy, RuntimeContractError
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError

torch.set_num_threads(1)

EXPORT = Path(__file__).parent.parent / "export"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_artefact(tmp_path_factory.mktemp("artefacts") / "fake")


def observation(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = {"proprio": rng.normal(size=5), "wrench": rng.normal(size=(3, 6)).astype(np.float32)}
    for camera in SPEC.cameras:
        result[f"rgb.{camera}"] = rng.integers(0, 256, (8, 8, 3), np.uint8)
    return result | {"instruction": f"go {seed % 3}"}


def episode(policy: OnnxPolicy, seeds: range) -> list[np.ndarray]:
    policy.reset()
    rows = []
    for seed in seeds:
        policy.observe(observation(seed))
        rows.append(policy.act())
    return rows


def test_metadata_tells_all_that_a_client_has_to_know(artefact: Path) -> None:
    with running(OnnxSource(artefact, instruction="go", allow_missing=("wrist",))) as port, WireClient(port) as client:
        metadata = client.metadata
    assert metadata["observations"]["rgb.front"] == {
        "shape": [8, 8, 3],
        "dtype": "uint8",
        "unit": "0..255",
        "frame": "image",
        "required": True,
    }
    required = {name for name, entry in metadata["observations"].items() if entry["required"]}
    assert required == {"rgb.front", "proprio"}
    assert set(metadata["observations"]) == set(OnnxPolicy(artefact).shapes)
    assert metadata["observations"]["proprio"]["names"] == list("abcde")
    assert metadata["actions"]["shape"] == [SPEC.chunk, 4] and metadata["actions"]["names"] == ["x", "y", "z", "grip"]
    assert (metadata["rate_hz"], metadata["horizon"], metadata["stride"]) == (SPEC.fps, SPEC.chunk, SPEC.stride)
    assert metadata["cameras"] == list(SPEC.cameras) and metadata["embodiment"] == "sawyer"
    assert metadata["instruction"] == {"name": "instruction", "max_bytes": 32, "required": False, "default": "go"}
    everything = sum(
        int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize for entry in metadata["observations"].values()
    )
    assert metadata["limits"]["message_bytes"] > 2 * everything


def test_sessions_over_one_network_answer_as_policies_of_their_own(artefact: Path) -> None:
    alone = OnnxPolicy(artefact)
    expected = [episode(alone, range(10 * i, 10 * i + 10)) for i in range(8)]
    answers: list[list[np.ndarray]] = [[] for _ in range(8)]

    def drive(i: int) -> None:
        with WireClient(port) as client:
            barrier.wait(20)
            for seed in range(10 * i, 10 * i + 10):
                answers[i].append(client.infer(observation(seed))["actions"])

    barrier = threading.Barrier(8)
    with running(OnnxSource(artefact), workers=2) as port:
        threads = [threading.Thread(target=drive, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(8):
        np.testing.assert_array_equal(answers[i], expected[i])


def test_a_fork_shares_the_network_and_nothing_else(artefact: Path) -> None:
    policy = OnnxPolicy(artefact)
    first = episode(policy, range(5))
    policy.observe(observation(5))
    fork = policy.fork()
    np.testing.assert_array_equal(episode(fork, range(5)), first)
    fresh = OnnxPolicy(artefact)
    episode(fresh, range(5))
    fresh.observe(observation(5))
    np.testing.assert_array_equal(policy.act(), fresh.act())


BAD = {
    "name": ({"rgb.frnot": np.zeros((8, 8, 3), np.uint8)}, r"rgb\.frnot: unknown; did you mean 'rgb\.front'"),
    "shape": ({"proprio": np.zeros(4)}, r"proprio: got float64 \[4\], expected float32 \[5\]"),
    "dtype": ({"rgb.front": np.zeros((8, 8, 3), np.int64)}, r"rgb\.front: got int64 .* expected uint8 \[8, 8, 3\]"),
    "not a number": ({"proprio": np.full(5, np.nan)}, r"proprio: non-finite value at \[0\]"),
    "overflow": ({"proprio": np.full(5, 1e300)}, r"proprio: non-finite value at \[0\]"),
    "text": ({"proprio": np.array(["a"] * 5)}, "proprio: got <U1"),
    "missing": ({"proprio": np.zeros(5)}, r"rgb\.front: missing now, expected uint8 \[8, 8, 3\]"),
    "instruction": ({"instruction": "x" * 40}, "instruction: 40 bytes, expected at most 32"),
}


@pytest.fixture(scope="module")
def port(artefact: Path) -> Iterator[int]:
    with running(OnnxSource(artefact)) as number:
        yield number


@pytest.mark.parametrize("case", BAD)
def test_bad_observations_are_refused_by_field(port: int, case: str) -> None:
    values, message = BAD[case]
    with WireClient(port) as client, pytest.raises(RuntimeError, match=message):
        client.infer(values)


@contextmanager
def robot_server(folder: Path, *words: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """`python -m export serve` where this repository, torch and Hydra are not installed; yields its port."""
    script = """
        import sys
        for name in ("torch", "worldmodel", "onnx", "omegaconf", "yaml", "hydra", "lightning"):
            sys.modules[name] = None
        sys.path.insert(0, ".")
        from export.__main__ import main
        sys.exit(main(sys.argv[1:]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), "serve", "artefact", *words]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next(
            (m for line in process.stderr if (m := re.search(r"serving on ws://127\.0\.0\.1:(\d+)", line))), None
        )
        assert found is not None
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


def test_the_server_runs_alone_and_comes_back_after_a_kill(artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(artefact, tmp_path / "artefact")
    shutil.copytree(EXPORT, tmp_path / "export", ignore=shutil.ignore_patterns("__pycache__"))
    expected = episode(OnnxPolicy(artefact), range(2))
    with robot_server(tmp_path, "--port", "0") as (process, port), WireClient(port) as client:
        np.testing.assert_array_equal(client.infer(observation(0))["actions"], expected[0])
        process.send_signal(signal.SIGKILL)
        with pytest.raises((ConnectionClosed, ConnectionError)):
            client.infer(observation(1))
    with robot_server(tmp_path, f"port={port}", "max_clients=3") as (process, same), WireClient(same) as client:
        assert same == port and client.metadata["limits"]["clients"] == 3
        for seed in range(2):
            np.testing.assert_array_equal(client.infer(observation(seed))["actions"], expected[seed])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        with pytest.raises(ConnectionClosed) as closed:
            client.infer(observation(0))
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "{}/nowhere"], "no manifest.json"),
        (["serve", "{}", "mask=smell"], "mask: unknown name 'smell'"),
        (["serve", "{}", "embodiment=panda"], "embodiment: got 'panda'"),
        (["serve", "{}", "max_clients=0"], "max_clients: got 0"),
        (["serve", "{}", "--api-key-file", "{}/nowhere"], "No such file"),
        (["replay", "{}"], "index.json"),
    ],
)
def test_commands_refuse_by_name(
    artefact: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main([word.format(artefact) for word in words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["serve"], ["serve", "x", "colour=red"], ["replay", "x", "port=high"]])
def test_wrong_words_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: python -m export" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("replay") / "data"
    return made_up_dataset(root, {("toy", "lift"): 2, ("toy", "push"): 1})


def test_replay_answers_what_was_recorded(shards: Path) -> None:
    reader = ShardReader(shards)
    with running(ReplaySource(shards, horizon=3)) as port:
        for i in range(4):
            recorded = reader.read(i % 3)
            action = recorded.action
            assert action is not None
            with WireClient(port) as client:
                assert client.metadata["actions"]["shape"] == [3, 4] and client.metadata["policy"] == "replay"
                for step in range(len(action) + 2):
                    shown = {"rgb.front": recorded.rgb["front"][min(step, len(action) - 1)], "instruction": "go"}
                    answer = client.infer(shown)
                    rows = np.minimum(np.arange(step, step + 3), len(action) - 1)
                    np.testing.assert_array_equal(answer["actions"], action[rows])
                    assert answer["episode"] == reader.entries[i % 3].key
                    assert answer["finished"] == (step >= len(action)) and answer["step"] == step
                answer = client.infer({"reset": True, "proprio": np.zeros(4, np.float32)})
                np.testing.assert_array_equal(answer["actions"], action[:3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rgb.side": np.zeros((16, 16, 3), np.uint8)}, r"rgb\.side: not recorded.*\['proprio', 'rgb\.front', 'instr"),
        (
            {"rgb.front": np.zeros((8, 8, 3), np.uint8)},
            r"rgb\.front: got uint8 \[8, 8, 3\], expected uint8 \[16, 16, 3\]",
        ),
        ({"proprio": np.zeros(4, np.int64)}, r"proprio: got int64 \[4\], expected float32 \[4\]"),
        ({"proprio": np.full(4, np.inf)}, "proprio: non-finite"),
        ({"instruction": np.zeros(3)}, "instruction: not recorded, or not of that type"),
    ],
)
def test_replay_checks_observations(shards: Path, values: dict[str, Any], message: str) -> None:
    with running(ReplaySource(shards)) as port, WireClient(port) as client, pytest.raises(RuntimeError, match=message):
        client.infer(values)


def test_replay_refuses_what_it_cannot_answer(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"no episode of split 'test'; there are \['train'\]"):
        ReplaySource(shards, split="test")
    with pytest.raises(ConfigError, match="horizon: got 0"):
        ReplaySource(shards, horizon=0)


def test_source_passes_the_artefacts_errors_on(artefact: Path) -> None:
    with pytest.raises(RuntimeContractError, match="allow_missing: unknown name 'rear'"):
        OnnxSource(artefact, allow_missing=("rear",))
