"""Clips cut from recorded episodes: history, future and actions around every time step, as items of a dataset."""

import bisect
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from worldmodel.contracts import ClipSpec
from worldmodel.data.align import Aligned, align, check_cameras
from worldmodel.data.buckets import Bucket, cover
from worldmodel.data.cache import ByteCache
from worldmodel.data.clip import Clip, Layout, Skip
from worldmodel.data.embodiments import check_embodiments
from worldmodel.data.sections import Entry
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError, SampleError

ON_ERROR = ("raise", "skip")
"""Policies for a damaged sample: stop with its error, or take the next good clip and report it with the batch."""

_EFFECTOR = tuple(f"end_effector_{axis}" for axis in "xyz")

log = logging.getLogger(__name__)


class Needs(NamedTuple):
    """What one training batch will really use; the rest is not loaded."""

    rows: int | None = None  # so many clips of the batch, evenly spread; None is all
    history: int | None = None  # pictures of the newest so many history frames; None is all
    future: bool = True  # pictures of the future
    chunks: int = 1  # clips of one episode, each beginning where the future of the last one ends, in consecutive rows
    bucket: Bucket | None = None  # size of its pictures and length of its future; None is those of the spec
    clips: int | None = None  # how many clips are drawn for it; None is the usual number


class Request(NamedTuple):
    """A clip of which only some pictures are wanted, or one that comes a number of whole futures later."""

    clip: int
    history: int | None = None
    future: bool = True
    ahead: int = 0
    bucket: Bucket | None = None


class ClipDataset(Dataset[Clip]):
    """Every time step of the chosen episodes as one clip.

    History before the start of an episode repeats its first frame. What lies past its end repeats the last frame and
    is marked in `valid` (False unless all R steps of the latent frame are inside) and `action_valid`.

    Args:
        reader: the dataset; several clip datasets may share one.
        spec: names and sizes of the clips.
        split: which split to take.
        tasks: only these tasks; None is all of the split.
        embodiments: only these embodiments; None is all of the split.
        only_success: leave failed demonstrations out; their number is in `left_out` and logged.
        images: False leaves all pictures out (`rgb` is (H, V, 3, 0, 0)), for models that read cached features.
        future: False leaves future pictures out.
        masks: True adds masks, of the steps whose pictures there are; every episode must have them.
        camera_map: name in the data for a camera of `spec`, or None for a camera the data lack.
        cache: of episodes without pictures, to share between clip datasets that differ in their filters alone; None
            is one of its own. Pictures are in the reader's cache.
        on_error: `raise`, or `skip`: a clip of a damaged episode is replaced by the clip at the same step (modulo the
            length) of the next good episode, always the same one, and says so in `Clip.skip`.
        first_frame: number of the first frame of `reader`, where frames are counted over several datasets.

    Raises:
        DataError: no episode left, or cameras, rate or sizes that do not fit `spec`.
        SampleError: from items too: a damaged episode under policy `raise`.
        ConfigError: unknown policy, or the data have an embodiment that `spec` lacks.
    """

    def __init__(
        self,
        reader: ShardReader,
        spec: ClipSpec,
        *,
        split: str,
        tasks: Sequence[str] | None = None,
        embodiments: Sequence[str] | None = None,
        only_success: bool = True,
        images: bool = True,
        future: bool = True,
        masks: bool = False,
        camera_map: Mapping[str, str | None] | None = None,
        cache: ByteCache | None = None,
        on_error: str = "raise",
        first_frame: int = 0,
    ) -> None:
        if on_error not in ON_ERROR:
            raise ConfigError(f"on_error {on_error!r} is none of {', '.join(ON_ERROR)}")
        self.reader, self.spec, self.split, self.on_error = reader, spec, split, on_error
        self.first_frame = first_frame
        self.images, self.future_images, self.masks = images, images and future, masks
        self.elements: tuple[str, ...] = ()
        """What the values of masks mean: places in this list, if masks were asked for."""
        self.camera_map = dict(camera_map or {})
        self._layouts: dict[Bucket | None, Layout] = {None: Layout(spec)}
        if split not in reader.index["splits"]:
            raise DataError(f"{reader.root}: no split {split!r}; it has {sorted(reader.index['splits'])}")
        of_split = [i for i, entry in enumerate(reader.entries) if entry.split == split]
        for kind, wanted in (("task", tasks), ("embodiment", embodiments)):
            present = {getattr(reader.entries[i], kind) for i in of_split}
            if unknown := sorted(set(wanted or ()) - present):
                raise DataError(f"{reader.root}: split {split!r} has no {kind}s {unknown}; it has {sorted(present)}")
            of_split = [i for i in of_split if wanted is None or getattr(reader.entries[i], kind) in wanted]
        self.episodes = [i for i in of_split if reader.entries[i].success or not only_success]
        self.left_out = len(of_split) - len(self.episodes)
        """Failed demonstrations that `only_success` left out."""
        if self.left_out:
            log.info(
                "%s: %d of %d episodes of %r left out: not successful", reader.root, self.left_out, len(of_split), split
            )
        if not self.episodes:
            raise DataError(f"{reader.root}: no episode left in split {split!r} ({self.left_out} failed ones left out)")
        self._ends = list(itertools.accumulate(reader.entries[i].length for i in self.episodes))
        self._cache = ByteCache(1 << 28) if cache is None else cache
        found = dict.fromkeys(reader.entries[i].embodiment for i in self.episodes)
        check_embodiments(spec, found, f"{reader.root}, split {split!r}", complete=False)
        for embodiment in found:
            self._check_first(embodiment)

    def __len__(self) -> int:
        return self._ends[-1]

    def entries(self) -> list[Entry]:
        """The index entries of the chosen episodes."""
        return [self.reader.entries[i] for i in self.episodes]

    def locate(self, index: int) -> tuple[int, int]:
        """Episode number in the reader and time step of clip `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        episode = bisect.bisect_right(self._ends, index)
        return self.episodes[episode], index - (self._ends[episode - 1] if episode else 0)

    def at(self, episode: int, step: int) -> Clip:
        """The clip at a time step of episode `episode` of the reader, of this split or not."""
        return self._clip(episode, step, Request(0))

    def __getitem__(self, index: int | Request) -> Clip:
        request = index if isinstance(index, Request) else Request(index)
        i, step = self.locate(request.clip)
        try:
            return self._clip(i, step, request)
        except SampleError as error:
            if self.on_error == "raise":
                raise
            return self._replacement(i, step, request, error)

    def _replacement(self, i: int, step: int, request: Request, error: SampleError) -> Clip:
        """A clip of the next good episode: a function of the request and the stored bytes, not of what came before."""
        place = bisect.bisect_left(self.episodes, i)
        for other in (*self.episodes[place + 1 :], *self.episodes[:place]):
            try:
                clip = self._clip(other, step % self.reader.entries[other].length, request)
            except SampleError:
                continue
            return clip._replace(skip=Skip(self.reader.entries[i].key, str(error)))
        raise DataError(
            f"{self.reader.root}: all {len(self.episodes)} episodes are damaged, nothing to skip to: {error}"
        )

    def _check_first(self, embodiment: str) -> None:
        """Holds the first readable episode of an embodiment against the spec."""
        for i in self.episodes:
            entry = self.reader.entries[i]
            if entry.embodiment != embodiment:
                continue
            try:
                episode = self.reader.read(i, images=False)
            except SampleError:
                if self.on_error == "raise":
                    raise
                continue
            check_cameras(episode, self.spec, self.camera_map, self._where(entry))
            self._aligned(i)
            if self.masks:
                self.elements = self.elements or tuple(episode.meta.get("elements", ()))
                self._check_elements(i)
            return
        raise DataError(f"{self.reader.root}: every episode of embodiment {embodiment!r} is damaged")

    def _clip(self, i: int, step: int, request: Request) -> Clip:
        entry, layout, data = self.reader.entries[i], self._layout(request.bucket), self._aligned(i)
        step += request.ahead * layout.spec.window
        frames = self.spec.history if request.history is None else request.history
        past = layout.history[-frames:] if self.images and frames else None
        future = layout.future if self.future_images and request.future else None
        shown = [None if part is None else self._pictures(i, data, part, step, request.bucket)
                 for part in (past, future)]  # fmt: skip
        lens = next((lens for _, lens in filter(None, shown) if lens is not None), None)
        rgb, future_rgb = (None if part is None else part[0] for part in shown)
        return Clip(
            layout=layout,
            data=data,
            step=step,
            first=entry.start + self.first_frame,
            episode=entry.key,
            rgb=rgb,
            future_rgb=future_rgb,
            masks=self._masks(i, data, past, future, step) if self.masks else None,
            elements=self.elements,
            lens=lens,
        )

    def _layout(self, bucket: Bucket | None) -> Layout:
        if bucket not in self._layouts:
            assert bucket is not None
            own = replace(self.spec, height=bucket.height, width=bucket.width, future=bucket.future)
            self._layouts[bucket] = Layout(own)
        return self._layouts[bucket]

    def _check_elements(self, i: int) -> None:
        """Raises `DataError` if episode `i` has no masks, or masks of other elements than the first episode."""
        found = tuple(self.reader.read(i, images=False).meta.get("elements", ()))
        if not found or found != self.elements:
            has = f"elements {list(found)}, the first episode has {list(self.elements)}" if found else "no masks"
            raise DataError(
                f"{self._where(self.reader.entries[i])}: {has}; clips with masks need the same elements in every "
                "episode: generate with --masks, or leave masks out"
            )

    def _masks(
        self, i: int, data: Aligned, past: np.ndarray | None, future: np.ndarray | None, step: int
    ) -> tuple[np.ndarray, ...]:
        """The fields of `Masks`, as many frames as the pictures; h and w are 0 where there are none."""
        self._check_elements(i)
        spec, parts = self.spec, []
        layout = self._layout(None)
        for offsets, every in ((past, layout.history), (future, layout.future)):
            steps = np.clip((every if offsets is None else offsets) + step, 0, len(data.steps) - 1)
            size = (0, 0) if offsets is None else (spec.height, spec.width)
            part = np.zeros((len(steps), len(spec.cameras), *size), np.uint8)
            for v in () if offsets is None else np.flatnonzero(data.constant["has_rgb"]):
                camera = self.camera_map.get(spec.cameras[v]) or spec.cameras[v]
                found = self.reader.masks(i, camera, steps.tolist())
                if found.shape[1:] != size:
                    where = self._where(self.reader.entries[i])
                    raise DataError(f"{where}: mask.{camera}: {found.shape[1:]} pixels, the clips ask for {size}")
                part[:, v] = found
            parts.append(part)
        shown = np.concatenate([layout.history, layout.ends]) + step
        return *parts, *self._positions(i, data, np.clip(shown, 0, len(data.steps) - 1))

    def _positions(self, i: int, data: Aligned, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, E, 3) where elements are, and (E,) which are known: by the point of their name, the gripper by its
        end effector."""
        meta = self.reader.read(i, images=False).meta
        positions = np.zeros((len(steps), len(self.elements), 3), np.float32)
        located = np.zeros(len(self.elements), bool)
        points, proprio = meta.get("point_names", []), meta.get("proprio_names", [])
        for e, name in enumerate(self.elements):
            if name in points:
                positions[:, e], located[e] = data.points[steps, points.index(name)], True
            elif name == "gripper" and set(_EFFECTOR) <= set(proprio):
                positions[:, e] = data.proprio[steps][:, [proprio.index(axis) for axis in _EFFECTOR]]
                located[e] = True
        return positions, located

    def _pictures(
        self, i: int, data: Aligned, offsets: np.ndarray, step: int, bucket: Bucket | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(n, V, 3, h, w) uint8: the pictures at `offsets` from a step; if brought to the size of a bucket, also what
        that made of the pixel coordinates of each view (V, 3, 3)."""
        spec = self._layout(bucket).spec
        steps = np.clip(offsets + step, 0, len(data.steps) - 1)
        out = np.zeros((len(steps), len(spec.cameras), 3, spec.height, spec.width), np.uint8)
        lens = None if bucket is None else np.tile(np.eye(3, dtype=np.float32), (len(spec.cameras), 1, 1))
        for v in np.flatnonzero(data.constant["has_rgb"]):
            camera = spec.cameras[v]
            images = self.reader.pictures(i, self.camera_map.get(camera) or camera, steps.tolist())
            if lens is not None:
                images, lens[v] = cover(images, (spec.height, spec.width))
            elif images.shape[2:] != (spec.height, spec.width):
                raise DataError(
                    f"{self._where(self.reader.entries[i])}: rgb.{camera}: pictures of {images.shape[2:]}, "
                    f"the clips ask for {(spec.height, spec.width)}; set height and width to the data's, or give the "
                    "phase buckets, whose pictures are resized"
                )
            out[:, v] = images
        return out, lens

    def _aligned(self, i: int) -> Aligned:
        def make() -> Aligned:
            entry = self.reader.entries[i]
            return align(self.reader.read(i, images=False), self.spec, self.camera_map, self._where(entry))

        return self._cache.get(i, make, lambda aligned: aligned.nbytes)

    def _where(self, entry: Entry) -> str:
        return f"{entry.shard}: key {entry.key}"
