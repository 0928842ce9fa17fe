"""What the stages, the data and the export pass to one another.

Shape legend, used all over the package:

    B batch            H history frames      F future latent frames   R control steps per latent frame
    V camera views     K tracked points      S touch sensors          L instruction bytes
    A action chunk     D padded action dims  P padded proprioception  h, w image rows and columns
    C channels         N tokens              W width of a network

Time: the newest history frame is "now" (t). History frames lie R control steps apart (t - 2R, t - R, t); future latent
frame f covers the steps t + fR + 1 .. t + (f + 1)R, and the future streams are sampled at its last step. Poses are
camera-to-base 4x4 (OpenCV axes, metres), points are metres in the base frame, wrenches N and N·m in the sensor frame.
Presence masks (`has_*`) are True where the robot has that sense; what they hide never reaches the network.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1
"""Version of shards and checkpoints; readers refuse any other."""

MODES = ("policy", "forward_dynamics", "inverse_dynamics", "video_prediction", "joint")
STREAMS = ("video", "camera", "points", "force")
"""Predicted streams, in token order within a latent frame; actions are the fifth and live in stage 3."""
MOVERS = {"robot": ("gripper", "robot"), "object": ("object",), "object2": ("object2",)}
"""What can move in a scene -> the elements that its pixels show, the one that says where it is first."""
PAIR_KINDS = ("element", "view")
"""What differs within a pair: how some elements look, or where the cameras are."""


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The names and sizes that data, model and runtime must agree on. Stored in every checkpoint and artefact."""

    cameras: tuple[str, ...] = ("front", "wrist")
    absent_cameras: tuple[str, ...] = ()  # those of `cameras` that the robot lacks: always masked
    sensors: tuple[str, ...] = ("wrist", "left_finger", "right_finger")
    embodiments: tuple[str, ...] = ("sawyer",)
    height: int = 64
    width: int = 64
    fps: float = 20.0
    history: int = 3
    stride: int = 4
    future: int = 2
    chunk: int = 8
    points: int = 4
    taxels: tuple[int, int, int] = (3, 4, 4)
    proprio: int = 18
    action: int = 8
    text: int = 96

    @property
    def window(self) -> int:
        """Control steps from now to the end of the future."""
        return self.future * self.stride


class Observation(NamedTuple):
    """Everything sensed up to now; the input of every mode."""

    rgb: Tensor  # (B, H, V, 3, h, w) uint8; in training only the newest frames if no others are used
    intrinsics: Tensor  # (B, H, V, 3, 3) float32, pixels of this image
    camera_to_base: Tensor  # (B, H, V, 4, 4) float32
    points: Tensor  # (B, H, K, 3) float32, metres, base frame
    visible: Tensor  # (B, H, K) bool
    wrench: Tensor  # (B, H, R, S, 6) float32, N and N·m: the R steps that end at each history frame
    taxels: Tensor  # (B, H, S, C, rows, columns) float32, N
    proprio: Tensor  # (B, H, P) float32
    text: Tensor  # (B, L) int64, UTF-8 byte + 1; 0 is padding
    embodiment: Tensor  # (B,) int64, index into ClipSpec.embodiments
    has_rgb: Tensor  # (B, V) bool
    has_camera: Tensor  # (B, V) bool
    has_points: Tensor  # (B, K) bool
    has_wrench: Tensor  # (B, S) bool
    has_taxels: Tensor  # (B, S) bool
    has_proprio: Tensor  # (B,) bool
    has_text: Tensor  # (B,) bool

    def newest(self, frames: int) -> "Observation":
        """The same with the last `frames` frames of its history, which may be longer than H."""
        series = ("rgb", "intrinsics", "camera_to_base", "points", "visible", "wrench", "taxels", "proprio")
        return self._replace(**{name: getattr(self, name)[:, -frames:] for name in series})


class Future(NamedTuple):
    """What came next: targets in training and evaluation, conditions in the dynamics modes."""

    rgb: Tensor  # (B, F*R, V, 3, h, w) uint8
    camera_to_base: Tensor  # (B, F, V, 4, 4) float32
    points: Tensor  # (B, F, K, 3) float32
    visible: Tensor  # (B, F, K) bool
    wrench: Tensor  # (B, F, S, 6) float32: mean over the R steps of the latent frame
    actions: Tensor  # (B, A, D) float32, units of the embodiment; actions[:, 0] is executed now
    proprio: Tensor  # (B, A, P) float32, as it is measured once each of the actions is done
    valid: Tensor  # (B, F) bool, False past the end of the episode
    action_valid: Tensor  # (B, A) bool, False past the end of the episode
    action_dims: Tensor  # (B, D) bool, True for the dimensions this embodiment has


class Masks(NamedTuple):
    """What the pixels of the pictures show; loaded only when a dataset is asked for it."""

    history: Tensor  # (B, H, V, h, w) uint8, places in the episode's `elements`; all 0 where has_rgb is False
    future: Tensor  # (B, F*R, V, h, w) uint8
    positions: Tensor  # (B, H + F, E, 3) float32, metres, base frame: where elements are at the times of the streams
    located: Tensor  # (B, E) bool, which elements have a position: what has a tracked point, and the gripper
    elements: tuple[str, ...]  # what the values mean


class Batch(NamedTuple):
    """One training or evaluation batch."""

    observation: Observation
    future: Future
    frame: Tensor  # (B, H) int64, number of each history frame in the dataset, for caches of frozen features
    key: list[str]  # sample key and step, for error messages
    masks: Masks | None = None


class Pair(NamedTuple):
    """The same motion at the same steps seen twice: as it was recorded, and with something changed."""

    source: Batch  # with masks
    target: Batch  # with masks
    mask: Tensor  # (B, H + F*R, V, h, w) bool, pixels that show what changed: all, where it is the view
    text: Tensor  # (B, L) int64, the instruction that asks for the change, as in Observation
    kind: Tensor  # (B,) int64, place in PAIR_KINDS

    @property
    def key(self) -> list[str]:
        """Sample keys and steps of the sources, for error messages."""
        return self.source.key


X = TypeVar("X", bound=Batch | Pair)


def rows_of(batch: X, first: int, end: int) -> X:
    """Some rows of a batch, as views."""

    def part(value: Any) -> Any:
        if isinstance(value, (torch.Tensor, list)):
            return value[first:end]
        return type(value)(*map(part, value)) if hasattr(value, "_fields") else value

    return part(batch)


class Senses(NamedTuple):
    """An observation in the network's own units; the input of stages 1 and 2."""

    rgb: Tensor  # (B, V, 3, h, w) in [-1, 1], newest frame
    rays: Tensor  # (B, H, V, 6, h', w') Pluecker rays through the latent cells, base frame
    camera: Tensor  # (B, H, V, 9) standardised translation and 6D rotation
    points: Tensor  # (B, H, K, 3) standardised
    visible: Tensor  # (B, H, K) bool
    force: Tensor  # (B, H, R, S, 6) compressed wrench
    taxels: Tensor  # (B, H, S, C, rows, columns) compressed
    proprio: Tensor  # (B, H, P) standardised
    effector: Tensor  # (B, H, 3) end effector position in the units of `points`
    text: Tensor  # (B, L)
    embodiment: Tensor  # (B,)
    has_rgb: Tensor  # (B, V) and so on, as in Observation
    has_camera: Tensor
    has_points: Tensor
    has_wrench: Tensor
    has_taxels: Tensor
    has_proprio: Tensor
    has_text: Tensor
    new_text: Tensor  # (B,) bool, whether there is an instruction that is not read because it was not trained on

    def newest(self, frames: int) -> "Senses":
        """The same with the last `frames` frames of its history, which may be longer than H."""
        series = ("rays", "camera", "points", "visible", "force", "taxels", "proprio", "effector")
        return self._replace(**{name: getattr(self, name)[:, -frames:] for name in series})


class Fused(NamedTuple):
    """Output of stage 1: the context that stages 2 and 3 read by cross-attention."""

    tokens: Tensor  # (B, N, W)
    mask: Tensor  # (B, N) bool, True = present
    instruction: Tensor  # (B, W) the instruction before fusion, zero where absent
    text: Tensor  # (B, M, W) its tokens before fusion, and those of images that its encoder sees; zero where absent
    text_mask: Tensor  # (B, M) bool


class TextEncoder(Protocol):
    """Instruction (B, L) as UTF-8 bytes + 1, 0 pads -> its tokens (B, M, W) and which of them are there (B, M)."""

    def __call__(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and presence."""
        ...


@runtime_checkable
class SeeingTextEncoder(TextEncoder, Protocol):
    """A text encoder that can read the newest images together with the instruction."""

    def see(self, text: Tensor, has_text: Tensor, rgb: Tensor, has_rgb: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, L), has_text (B,), rgb (B, V, 3, h, w) in [-1, 1], has_rgb (B, V) -> tokens and presence."""
        ...


class Understanding(NamedTuple):
    """What the heads of stage 1 read out of one observation."""

    camera_to_base: Tensor  # (B, V, 4, 4), each from the newest image of that view alone
    fov: Tensor  # (B, V) vertical field of view in radians
    points: Tensor  # (B, K, 3) metres, base frame
    wrench: Tensor  # (B, S, 6) N and N·m


class Separation(NamedTuple):
    """What moves in a clip of T frames, slot by slot in the order of `MOVERS`; all else stands."""

    masks: Tensor  # (B, T, V, M, h, w) logits: this pixel shows the thing of this slot, and it moves within the clip
    moves: Tensor  # (B, M) logits: it is there and moves within the clip
    tracks: Tensor  # (B, T, M, 3) metres, base frame: where it is

    def shown(self) -> Tensor:
        """(B, T, V, M, h, w) bool, at most one slot for each pixel and only of slots that move."""
        masks = torch.where((self.moves > 0)[:, None, None, :, None, None], self.masks, -torch.inf)
        slots = torch.arange(masks.shape[3], device=masks.device)[:, None, None]
        return (masks > 0) & (masks.argmax(3, keepdim=True) == slots)


class WorldState(NamedTuple):
    """The normalised streams of stage 2 over some latent frames T."""

    video: Tensor  # (B, T, V, C, h', w') latents
    camera: Tensor  # (B, T, V, 9) translation and 6D rotation
    points: Tensor  # (B, T, K, 3)
    force: Tensor  # (B, T, S, 6)


class Prediction(NamedTuple):
    """What a mode predicts, in physical units. Streams that the mode was given come back as they were given."""

    rgb: Tensor  # (B, F*R, V, 3, h, w) float32 in [0, 1]
    camera_to_base: Tensor  # (B, F, V, 4, 4)
    points: Tensor  # (B, F, K, 3)
    wrench: Tensor  # (B, F, S, 6)
    actions: Tensor  # (B, A, D)


class Policy(Protocol):
    """Anything that closes the loop: flat named observations in, a chunk of actions in physical units out.

    Observation names: `rgb.<camera>` (h, w, 3) uint8, `intrinsics.<camera>` (3, 3), `camera_to_base.<camera>` (4, 4),
    `points` (K, 3), `visible` (K,), `wrench` (S, 6), `taxels` (S, C, rows, columns), `proprio` (P,), `instruction` str;
    optional presence `has_points` (K,), `has_wrench` (S,), `has_taxels` (S,). A name that is missing is a sense that is
    absent; images and poses may be missing from steps that are not history frames.
    """

    def reset(self) -> None:
        """Forgets the episode."""
        ...

    def observe(self, observation: dict[str, Any]) -> None:
        """Takes what was sensed at one control step."""
        ...

    def act(self) -> "np.ndarray":
        """The next actions (A, D) in the embodiment's units."""
        ...


@runtime_checkable
class CommandedPolicy(Policy, Protocol):
    """A policy whose chunks heed what the robot was commanded before, which need not be the rows of its own."""

    def commanded(self, action: "np.ndarray") -> None:
        """Is told what is executed (D,) at the step that was observed last."""
        ...


@runtime_checkable
class RealtimePolicy(Policy, Protocol):
    """A policy whose chunks can continue what the robot does while it thinks."""

    def act_after(self, decided: "np.ndarray") -> "np.ndarray":
        """The next actions (A, D), of which the first are the `decided` (d, D) that will be executed anyway."""
        ...


@runtime_checkable
class ReactivePolicy(RealtimePolicy, Protocol):
    """A policy whose chunks correct what a small part of it proposes from the measured state, fast enough to be asked
    at every control step: actions can follow what is measured while they are executed (`schedule.Schedule`)."""

    def propose(self, decided: "np.ndarray") -> "np.ndarray | None":
        """The proposal (A, D) that a chunk which begins with the `decided` (d, D) corrects; None if what it needs was
        not measured at this step."""
        ...
