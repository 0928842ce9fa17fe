"""Egocentric human video: folders of video, camera track and hand and object tracks become episodes without actions."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from worldmodel.contracts import ClipSpec
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.formats.map_file import make_mapping
from worldmodel.data.formats.pictures import decode_video
from worldmodel.data.formats.registry import open_source
from worldmodel.data.formats.resolve import resolve
from worldmodel.data.importing import import_dataset
from worldmodel.data.shards import ShardReader
from worldmodel.data.validate import validate
from worldmodel.errors import ConfigError, DataError

STEPS, HEIGHT, WIDTH, FPS = 14, 48, 64, 15
INTRINSICS = np.array([[50.0, 0, WIDTH / 2], [0, 50.0, HEIGHT / 2], [0, 0, 1]])


def picture(step: int) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 3 + step * 4, columns * 3, np.full_like(rows, 70)], -1).astype(np.uint8)


def poses() -> np.ndarray:
    """(T, 4, 4): a head that moves sideways and looks along the world's x axis."""
    pose = np.tile(np.eye(4), (STEPS, 1, 1))
    pose[:, :3, :3] = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    pose[:, 1, 3] = np.linspace(0, 0.1, STEPS)
    return pose


def track(count: int) -> np.ndarray:
    """(T, count, 3): points a metre ahead."""
    points = np.zeros((STEPS, count, 3))
    points[..., 0], points[..., 1] = 1.0, np.linspace(-0.2, 0.2, count)
    return points + np.linspace(0, 0.05, STEPS)[:, None, None]


def write(folder: Path, *, objects: tuple[str, ...] = ("cup",), video: bool = True, split: str = "train") -> Path:
    """One episode: a video and npz tracks, or frames and a JSON track."""
    folder.mkdir(parents=True)
    annotation = {"instruction": "Pour the milk into the cup.", "split": split, "person": "p01", "success": True}
    if video:
        with av.open(str(folder / "video.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for step in range(STEPS):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(step), format="rgb24")))
            container.mux(stream.encode())
        np.savez(folder / "camera.npz", intrinsics=INTRINSICS, camera_to_world=poses())
    else:
        (folder / "frames").mkdir()
        for step in range(STEPS):  # names whose alphabetical order is not their order in time
            Image.fromarray(picture(step)).save(folder / "frames" / f"frame{step}.png")
        values = {"intrinsics": INTRINSICS.tolist(), "camera_to_world": poses().tolist()}
        (folder / "camera.json").write_text(json.dumps(values))
        annotation["fps"] = FPS
    (folder / "annotation.json").write_text(json.dumps(annotation))
    hands = track(2)
    hands[4:7, 1] = np.nan
    np.savez(folder / "hands.npz", points=hands, names=np.array(["left_wrist", "right_wrist"]))
    if objects:
        seen = np.ones((STEPS, len(objects)), bool)
        seen[0] = False
        np.savez(folder / "objects.npz", points=track(len(objects)), visible=seen, names=np.array(objects))
    return folder


def test_ego_folders_become_shards_without_actions(tmp_path: Path) -> None:
    source = tmp_path / "kitchen"
    write(source / "p01" / "take_2")
    write(source / "p01" / "take_10", objects=("jug", "cup"), video=False)
    write(source / "p02" / "take_1", objects=(), split="heldout_episodes")
    root = import_dataset("ego", source, tmp_path / "out", workers=1, progress=False)
    assert [fault for fault in validate(root) if fault.severity == "error"] == []
    reader = ShardReader(root)
    assert [entry.key for entry in reader.entries] == ["p01-take_2", "p01-take_10", "p02-take_1"]
    spec = ClipSpec(cameras=("ego",), embodiments=("human",), height=HEIGHT, width=WIDTH, fps=FPS)
    clips = ClipDataset(reader, spec, split="train")
    batch = collate([clips[i] for i in range(len(clips))])
    assert not batch.future.action_valid.any() and not batch.future.action_dims.any()
    assert batch.observation.has_camera.all() and not batch.observation.has_proprio.any()
    first, second = reader.read(0), reader.read(1)
    assert set(first.meta["absent"]) == {"tactile", "proprio", "action"} and first.action is None
    assert first.meta["point_names"] == ["left_wrist", "right_wrist", "cup"]
    assert second.meta["point_names"] == ["left_wrist", "right_wrist", "jug", "cup"]
    assert first.meta["person"] == "p01" and first.meta["base_frame"] == "world frame of the camera track"
    np.testing.assert_allclose(first.camera_to_base["ego"], poses(), atol=1e-6)
    for episode in (first, second):
        assert episode.points is not None and episode.visible is not None
        assert episode.visible[:, 1].tolist() == [True] * 4 + [False] * 3 + [True] * 7
        np.testing.assert_allclose(episode.points[4:7, 1], np.tile(track(2)[3, 1], (3, 1)), atol=1e-6)
        assert episode.visible[:, -1].tolist() == [False] + [True] * 13
        assert np.abs(episode.rgb["ego"][11].astype(int) - picture(11)).mean() < 4


def test_a_map_resizes_pictures_and_intrinsics(tmp_path: Path) -> None:
    source = open_source("ego", write(tmp_path / "take"))
    fields = source.fields()
    assert fields.mapping is not None
    small = fields.mapping | {"cameras": {"ego": {"field": "ego", "size": [24, 32]}}}
    episode = source.read(source.refs()[0], resolve(fields, make_mapping(small, "map")))
    assert episode.rgb["ego"].shape == (STEPS, 24, 32, 3)
    np.testing.assert_allclose(episode.intrinsics["ego"][0], INTRINSICS * [[0.5], [0.5], [1]])


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change_npz(name: str, array: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with np.load(folder / name) as archive:
            arrays = {key: archive[key] for key in archive.files}
        np.savez(folder / name, allow_pickle=False, **arrays | {array: change(arrays[array])})

    return apply


def annotate(**values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "annotation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return apply


FAULTS = [
    (lose("camera.npz"), r"take: no camera\.npz or camera\.json"),
    (lose("video.mp4"), r"annotation\.json: no fps"),
    (overwrite("video.mp4", b"\0" * 99), r"take: video\.mp4: not a readable video"),
    (overwrite("hands.npz", b"PK\3\4"), r"hands\.npz: not a readable file of plain arrays"),
    (overwrite("annotation.json", b"{"), r"annotation\.json: not readable JSON"),
    (annotate(fps=30), r"video\.mp4 has 15 frames per second, annotation\.json says 30"),
    (annotate(fps="fast"), r"annotation\.json: fps 'fast' must be a positive number"),
    (change_npz("camera.npz", "camera_to_world", lambda a: a[:-1]), r"camera\.npz: camera_to_world: 13 steps.* has 14"),
    (change_npz("camera.npz", "camera_to_world", lambda a: a * 2), r"camera_to_base\.ego: no rotation at step 0"),
    (change_npz("camera.npz", "intrinsics", lambda a: a[:2]), r"camera\.npz: intrinsics: float64 of shape \(2, 3\)"),
    (change_npz("hands.npz", "points", lambda a: a[:-2]), r"hands\.npz: points: 12 steps, the episode has 14"),
    (change_npz("hands.npz", "names", lambda a: a[:1]), r"hands\.npz: points: float64 of shape \(14, 2, 3\)"),
    (change_npz("objects.npz", "names", lambda a: np.array(["left_wrist"])), r"names \['left_wrist'\] are used twice"),
    (change_npz("objects.npz", "visible", lambda a: a[3:]), r"objects\.npz: visible: 11 steps, the episode has 14"),
]


@pytest.mark.parametrize(("change", "words"), FAULTS, ids=[fault[1][:30] for fault in FAULTS])
def test_each_fault_of_a_folder_is_named(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    source = open_source("ego", write(tmp_path / "take"))
    ref, mapping = source.refs()[0], resolve(source.fields())
    change(tmp_path / "take")
    with pytest.raises(DataError, match=words):
        source.read(ref, mapping)


def test_a_video_of_varying_rate_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for step in range(STEPS):
            frame = av.VideoFrame.from_ndarray(picture(step), format="rgb24")
            frame.pts, frame.time_base = step + 4 * (step > 6), Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match=r"take: video\.mp4: frame 7 is shown 0\.267 s off its time at 15 frames"):
        decode_video(path, FPS, "take", most=99)


def test_pickled_tracks_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "take")
    np.savez(folder / "hands.npz", points=np.array([{"a": 1}], object), names=np.array(["x"]))
    with pytest.raises(DataError, match=r"hands\.npz: not a readable file of plain arrays .*allow_pickle=False"):
        open_source("ego", folder).fields()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no annotation\.json below it"):
        open_source("ego", tmp_path / "empty")


def test_a_camera_or_split_that_no_map_names_stops_the_import(tmp_path: Path) -> None:
    write(tmp_path / "in" / "take")
    mapping = make_mapping({"embodiment": "human", "instruction": "Pour.", "cameras": {"head": "front"}}, "map")
    with pytest.raises(ConfigError, match=r"cameras\.head: the data has no 'front'; it has \['ego'\]"):
        import_dataset("ego", tmp_path / "in", tmp_path / "out", mapping=mapping, workers=1, progress=False)
    annotate(split="val")(tmp_path / "in" / "take")
    with pytest.raises(ConfigError, match=r"\['val'\] are no splits of ours"):
        import_dataset("ego", tmp_path / "in", tmp_path / "out", workers=1, progress=False)
