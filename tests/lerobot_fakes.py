"""Small LeRobot datasets in the format's own layouts, written with pyarrow and PyAV alone."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS, SIZE = 10, 32
LENGTHS = (6, 9, 7)
SENTENCES = ("Pick up the cube.", "Open the drawer.", "Pick up the cube.")
CAMERA = "observation.images.top"


def level(episode: int, step: int) -> int:
    """Brightness of a frame, which tells it from all others."""
    return 10 + 70 * episode + 7 * step


def state(episode: int) -> np.ndarray:
    return (100 * episode + np.arange(LENGTHS[episode])[:, None] + np.array([0, 0.25, 0.5])).astype(np.float32)


def video(path: Path, levels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "10"}, width=SIZE, height=SIZE)
        stream.pix_fmt = "yuv420p"
        for value in levels:
            frame = av.VideoFrame.from_ndarray(np.full((SIZE, SIZE, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(value: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"frame_{value}.png"}


def features(*, dtype: str = "video", extra: dict[str, int] | None = None) -> dict[str, Any]:
    vectors = {"observation.state": 3, "action": 3, **(extra or {})}
    names = {"observation.state": {"motors": ["x", "y", "gripper"]}}
    scalars = ("timestamp", "frame_index", "episode_index", "index", "task_index", "next.done")
    return (
        {CAMERA: {"dtype": dtype, "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]}}
        | {name: {"dtype": "float32", "shape": [n], "names": names.get(name)} for name, n in vectors.items()}
        | {name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1]} for name in scalars}
    )


def rows(episode: int, tasks: list[str], *, dtype: str = "video", extra: dict[str, int] | None = None) -> pa.Table:
    n = LENGTHS[episode]
    columns: dict[str, Any] = {
        "observation.state": state(episode).tolist(),
        "action": (-state(episode)).tolist(),
        "timestamp": pa.array(np.arange(n) / FPS, pa.float32()),
        "frame_index": list(range(n)),
        "episode_index": [episode] * n,
        "index": list(range(sum(LENGTHS[:episode]), sum(LENGTHS[: episode + 1]))),
        "task_index": [tasks.index(SENTENCES[episode])] * n,
        "next.done": [step == n - 1 for step in range(n)],
    }
    columns |= {name: [[0.5] * width] * n for name, width in (extra or {}).items()}
    if dtype == "image":
        columns[CAMERA] = [png(level(episode, step)) for step in range(n)]
    return pa.table(columns)


def info(version: str, **changes: Any) -> dict[str, Any]:
    return {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "fps": FPS,
        "chunks_size": 1000,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        **changes,
    }


def write_v21(root: Path, *, dtype: str = "video", extra: dict[str, int] | None = None) -> Path:
    """A file per episode: v2.1."""
    tasks: list[str] = list(dict.fromkeys(SENTENCES))
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    described = info("v2.1", features=features(dtype=dtype, extra=extra), **paths)
    (root / "meta/info.json").write_text(json.dumps(described))
    lines = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"episode_index": i, "tasks": [SENTENCES[i]], "length": n} for i, n in enumerate(LENGTHS)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i, n in enumerate(LENGTHS):
        pq.write_table(rows(i, tasks, dtype=dtype, extra=extra), root / f"data/chunk-000/episode_{i:06d}.parquet")
        if dtype == "video":
            frames = [level(i, step) for step in range(n)]
            video(root / f"videos/chunk-000/{CAMERA}/episode_{i:06d}.mp4", frames)
    return root


def write_v30(root: Path) -> Path:
    """Many episodes in a file: v3.0. Episodes 0 and 1 share their files, episode 2 has its own."""
    tasks: list[str] = list(dict.fromkeys(SENTENCES))
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    described = info("v3.0", features=features(), splits={"train": "0:2", "val": "2:3"}, **paths)
    (root / "meta/info.json").write_text(json.dumps(described))
    index = {"task_index": list(range(len(tasks))), "__index_level_0__": tasks}
    pq.write_table(pa.table(index), root / "meta/tasks.parquet")
    places = [(0, 0), (0, LENGTHS[0]), (1, 0)]
    table = [
        {
            "episode_index": i,
            "tasks": [SENTENCES[i]],
            "length": n,
            "data/chunk_index": 0,
            "data/file_index": places[i][0],
            f"videos/{CAMERA}/chunk_index": 0,
            f"videos/{CAMERA}/file_index": places[i][0],
            f"videos/{CAMERA}/from_timestamp": places[i][1] / FPS,
            f"videos/{CAMERA}/to_timestamp": (places[i][1] + n) / FPS,
            "stats/action/mean": [0.0, 0.0, 0.0],
        }
        for i, n in enumerate(LENGTHS)
    ]
    pq.write_table(pa.Table.from_pylist(table), root / "meta/episodes/chunk-000/file-000.parquet")
    for file, members in enumerate(((0, 1), (2,))):
        tables = pa.concat_tables([rows(i, tasks) for i in members])
        pq.write_table(tables, root / f"data/chunk-000/file-{file:03d}.parquet")
        frames = [level(i, step) for i in members for step in range(LENGTHS[i])]
        video(root / f"videos/{CAMERA}/chunk-000/file-{file:03d}.mp4", frames)
    return root
