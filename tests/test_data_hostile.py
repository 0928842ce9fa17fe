"""Files made to mislead: what they ask for is refused by name, and they lead nowhere outside of their folder."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from fuzz_material import KEY, header, members, padded, place, section
from test_formats_ego import write as write_ego
from test_formats_hdf5 import ALOHA, write_aloha

from worldmodel.data.formats.map_file import load_mapping, make_mapping
from worldmodel.data.formats.registry import open_source
from worldmodel.data.formats.resolve import resolve
from worldmodel.data.plain import LARGEST_ARCHIVE, load_archive, load_array, read_json
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics, write_statistics
from worldmodel.errors import ConfigError, DataError, SampleError


def sample(root: Path, body: bytes = b"") -> Path:
    return place(root, section(members()) + body, json.loads(members()["meta.json"]))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": "\\ud800"}', "NaN", "1" * 5000])
def test_json_that_cannot_be_held_or_written_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json: "):
        read_json(tmp_path / "a.json", "a file")


def test_arrays_are_no_larger_than_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(4, np.float32))
    sound = buffer.getvalue()
    np.testing.assert_array_equal(load_array(sound), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"16 bytes of values for shape \(9,\) of float32"):
        load_array(sound.replace(b"(4,)", b"(9,)"))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", sound + b"\0" * 10_000_000)
    monkeypatch.setattr("worldmodel.data.plain.LARGEST_ARCHIVE", 1 << 20)
    assert len(bomb.getvalue()) < 20_000 < LARGEST_ARCHIVE
    with pytest.raises(ValueError, match=r"10000144 bytes of arrays, at most 1048576"):
        load_archive(bomb)


HEADERS = {
    "a size below zero": header(f"{KEY}.a".encode(), -1024),
    "a size beyond the end": header(f"{KEY}.a".encode(), 1 << 40),
    "a link": header(f"{KEY}.a".encode(), 0, b"2", b"/etc/passwd"),
    "a folder above": header(b"../a", 0),
    "a member again": header(f"{KEY}.action.npy".encode(), 3) + padded(b"abc"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_members_that_are_no_plain_files_of_the_sample(tmp_path: Path, kind: str) -> None:
    reader = ShardReader(sample(tmp_path / "data", HEADERS[kind]))
    with pytest.raises(SampleError, match=r"unexpected member|not a valid tar"):
        reader.read(0)


def test_a_chain_of_extended_headers_ends(tmp_path: Path) -> None:
    chain = (header(b"x", 9, b"x") + padded(b"9 path=a\n")) * 3000
    with pytest.raises(SampleError, match="not a valid tar section"):
        ShardReader(sample(tmp_path / "data", chain)).read(0)


INDEX: list[tuple[list[str | int], Any, str]] = [
    (["shards", 0, "name"], "../outside.tar", "must be a plain file name"),
    (["shards", 0, "name"], "..", "must be a plain file name"),
    (["shards", 0, "sha256"], "../../outside", "must be 64 hexadecimal digits"),
    (["shards", 0, "entries", 0, "length"], 1 << 40, "length 1099511627776 must be a whole number from 1"),
    (["shards", 0, "entries", 0, "length"], 5_000_000, "bytes are all that is stored of it"),
    (["shards", 0, "entries", 0, "offset"], -1, "offset -1 must be a whole number from 0"),
    (["shards", 0, "entries", 0, "task"], ["lift"], "task .* must be text"),
    (["heldout_tasks"], "lift", "heldout_tasks must be a list"),
]


@pytest.mark.parametrize(("where", "value", "words"), INDEX)
def test_an_index_that_would_mislead(tmp_path: Path, where: list[str | int], value: Any, words: str) -> None:
    root = sample(tmp_path / "data")
    index: Any = json.loads((root / "index.json").read_text())
    node = index
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=words):
        ShardReader(root)


def test_statistics_say_what_to_run(tmp_path: Path) -> None:
    root = sample(tmp_path / "data")
    stored: Any = write_statistics(root)
    of = lambda statistics: statistics["embodiments"]["toy"]["action"]  # noqa: E731
    for change, words in (
        (lambda stats: stats.pop("instructions"), "instructions must be a list of texts"),
        (lambda stats: stats.update(instructions=[1]), "instructions must be a list of texts"),
        (lambda stats: of(stats).pop("floor"), r"toy\.action: missing \['floor'\]"),
        (lambda stats: of(stats).update(std=["a"]), "not numbers"),
        (lambda stats: of(stats).update(mean=[float("nan")] * 4), "must be finite and of one shape"),
    ):
        spoilt = json.loads(json.dumps(stored))
        change(spoilt)
        (root / "stats.json").write_text(json.dumps(spoilt))
        with pytest.raises(DataError, match=rf"{words}.*python -m worldmodel\.data stats {root}"):
            load_statistics(root)


def test_hdf5_files_that_lead_into_others_are_refused(tmp_path: Path) -> None:
    for kind, words in (("link", "is a link to"), ("external", "lie in other"), ("virtual", "lie in other")):
        (folder := tmp_path / kind).mkdir()
        write_aloha(folder / "episode_0.hdf5", 0)
        source = open_source("aloha", folder)
        mapping, ref = resolve(source.fields(), make_mapping(ALOHA, "map")), source.refs()[0]
        write_aloha(tmp_path / "secret.hdf5", 1)
        (tmp_path / "secret.bin").write_bytes(b"\0" * 12 * 14 * 4)
        with h5py.File(folder / "episode_0.hdf5", "a") as file:
            del file["action"]
            if kind == "link":
                file["action"] = h5py.ExternalLink("../secret.hdf5", "/action")
            elif kind == "external":
                file.create_dataset("action", (12, 14), "<f4", external=[("../secret.bin", 0, 12 * 14 * 4)])
            else:
                layout = h5py.VirtualLayout((12, 14), "<f4")
                layout[:] = h5py.VirtualSource("../secret.hdf5", "action", (12, 14))
                file.create_virtual_dataset("action", layout)
        with pytest.raises(DataError, match=words):
            source.read(ref, mapping)


def test_values_that_were_never_written_are_not_made_up(tmp_path: Path) -> None:
    write_aloha(tmp_path / "episode_0.hdf5", 0)
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as file:
        del file["action"]
        file.create_dataset("action", (12, 1 << 36), "<f4", chunks=(1, 1024))
    with pytest.raises(DataError, match="most of which were never written"):
        open_source("aloha", tmp_path).fields()


def test_a_playlist_is_no_video(tmp_path: Path) -> None:
    outside = write_ego(tmp_path / "outside")
    inside = write_ego(tmp_path / "inside")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    (inside / "video.mp4").write_text(playlist.format(outside / "video.mp4"))
    with pytest.raises(DataError, match=r"video\.mp4: not a readable video"):
        open_source("ego", inside).fields()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("embodiment: &a [*a]", "references"),
        ("a: &a [x, x]\nb: [*a, *a]", "references"),
        ("embodiment: !!python/object/apply:os.system [ls]", "tags"),
        ("{" * 500, "deep nesting|not a readable YAML"),
        ("fps: 2001-99-99", "not a readable YAML file"),
    ],
)
def test_maps_hold_plain_values(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_mapping(tmp_path / "map.yaml")


def test_maps_take_nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "mellon")
    mapping = make_mapping({"embodiment": "x", "instruction": "Say ${oc.env:SECRET}.", "licence": "${embodiment}"}, "m")
    assert mapping.instruction.text == "Say ${oc.env:SECRET}." and mapping.licence == "${embodiment}"


@pytest.mark.parametrize("value", [1e300, 1e39, float("inf")])
def test_enormous_poses_are_named_not_computed_with(tmp_path: Path, value: float) -> None:
    folder = write_ego(tmp_path / "take")
    with np.load(folder / "camera.npz") as archive:
        arrays = dict(archive)
    arrays["camera_to_world"][2, 0, 3] = value
    np.savez(folder / "camera.npz", **arrays)
    source = open_source("ego", folder)
    fields = source.fields()
    assert fields.mapping is not None
    fields.mapping["camera_to_base"]["ego"]["maps"] = "base_to_camera"
    with pytest.raises(DataError, match=r"camera_to_base\.ego: NaN or infinity at step 2"):
        source.read(source.refs()[0], resolve(fields))


def test_red_and_blue_are_exchanged_where_the_map_says_so(tmp_path: Path) -> None:
    write_aloha(tmp_path / "episode_0.hdf5", 0)
    source = open_source("aloha", tmp_path)
    plain = source.read(source.refs()[0], resolve(source.fields(), make_mapping(ALOHA, "map")))
    cameras = {"top": {"field": "top", "color": "bgr"}, "wrist": "cam_wrist"}
    turned = source.read(source.refs()[0], resolve(source.fields(), make_mapping(ALOHA | {"cameras": cameras}, "map")))
    np.testing.assert_array_equal(turned.rgb["top"], plain.rgb["top"][..., ::-1])
    np.testing.assert_array_equal(turned.rgb["wrist"], plain.rgb["wrist"])
    cameras["top"] = {"field": "top", "color": "gbr"}
    with pytest.raises(ConfigError, match=r"cameras\.top: color 'gbr' is none of rgb, bgr"):
        resolve(source.fields(), make_mapping(ALOHA | {"cameras": cameras}, "map"))
