"""What a world model is worth for control: the same candidate actions imagined, and done in the simulator.

From a state that the policy reached, every candidate chunk is executed in the simulator, which is brought back to that
state for each, and imagined by mode `forward_dynamics`. What matters is whether imagination puts candidates into the
right order, and whether truth lies where its samples say that it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from worldmodel.closed_loop import Scene, trial_generator
from worldmodel.contracts import ClipSpec, Observation, Policy
from worldmodel.data.live import observation_from_history
from worldmodel.errors import ConfigError, ContractError
from worldmodel.model import WorldModel
from worldmodel.nn import repeat_rows
from worldmodel.streaming import future_of_actions

CANDIDATE_STREAM = 0x1A61
"""Second seed word of the moment that is taken and of its candidates."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Chunks to compare: the policy's own, and the same with an offset that is drawn anew for each."""

    count: int = 8
    spread: float = 0.5
    """Standard deviation of an offset, in units of action; it is the same for all actions of a chunk."""

    def __post_init__(self) -> None:
        if self.count < 2 or self.spread <= 0:
            raise ConfigError(f"candidates: count {self.count}, spread {self.spread}; expected at least 2, above 0")

    def __call__(self, chunk: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """chunk (A, D) -> (count, A, D) in [-1, 1], the chunk itself first."""
        offsets = rng.normal(0, self.spread, (self.count, 1, chunk.shape[1]))
        offsets[0] = 0
        return np.clip(chunk + offsets, -1, 1).astype(np.float32)


class State(NamedTuple):
    """A moment of an episode that can be brought about again."""

    task: str
    trial: int
    done: np.ndarray  # (n, D) actions from the start state to here
    history: list[dict]  # what was observed until now, as `observation_from_history` takes it
    chunks: np.ndarray  # (N, A, D) candidates


class Outcome(NamedTuple):
    """Where things are after a chunk, metres in the base frame."""

    hand: np.ndarray  # (..., 3)
    points: np.ndarray  # (..., K, 3)


class Comparison(NamedTuple):
    """One state: every candidate done and imagined."""

    before: Outcome
    real: Outcome  # of N candidates
    imagined: Outcome  # of N candidates, from one draw of noise
    samples: Outcome  # of M draws of the first candidate


def horizon(spec: ClipSpec) -> int:
    """Actions of a chunk whose outcome is predicted: as far as a whole latent frame and the chunk go."""
    return min(spec.window, spec.chunk) // spec.stride * spec.stride


def reach(
    scene: Scene, policy: Policy, candidates: Candidates, *, task: str, trial: int, seed: int, replan: int, stride: int
) -> State:
    """Lets a policy drive until it has won, or for half of a trial, and takes one of the moments at which it was asked.

    Which, follows from the seed. Pictures are rendered every `stride` steps; raises `ConfigError` if `replan` is no
    multiple of it.
    """
    if replan < 1 or replan % stride:
        raise ConfigError(f"reach: replan {replan} is no multiple of {stride}, the steps between two pictures")
    words = [seed, CANDIDATE_STREAM, *task.encode(), trial]
    rng = np.random.default_rng(np.random.SeedSequence(words))
    policy.reset()
    history = [scene.reset(trial_generator(seed, task, trial, 0))]
    chunks: list[np.ndarray] = []
    done: list[np.ndarray] = []
    for step in range(scene.max_steps // 2):
        policy.observe(history[-1])
        if step % replan == 0:
            chunks.append(np.asarray(policy.act(), np.float32))
        done.append(chunks[-1][step % replan])
        observation, won = scene.step(done[-1], images=(step + 1) % stride == 0)
        if won:
            break
        history.append(observation)
    chosen = int(rng.integers(len(chunks)))
    step = replan * chosen
    executed = np.stack(done)[:step]
    return State(task, trial, executed, history[: step + 1], candidates(chunks[chosen], rng))


def execute(scene: Scene, state: State, *, seed: int, steps: int) -> tuple[Outcome, Outcome]:
    """Where things are at a state, and after `steps` actions of each candidate.

    Raises `ContractError` if the simulator does not come back to the state, which then has no outcome to compare.
    """
    outcomes, last = [], state.history[-1]
    for chunk in state.chunks:
        observation = scene.reset(trial_generator(seed, state.task, state.trial, 0), images=False)
        for action in state.done:
            observation, _ = scene.step(action, images=False)
        if not all(np.allclose(observation[name], last[name], atol=1e-4) for name in ("points", "proprio")):
            raise ContractError(f"{state.task}, trial {state.trial}: the same actions led to another state")
        for action in chunk[:steps]:
            observation, _ = scene.step(action, images=False)
        outcomes.append(_outcome(observation))
    return _outcome(last), Outcome(*map(np.stack, zip(*outcomes, strict=True)))


def _outcome(observation: dict) -> Outcome:
    return Outcome(np.asarray(observation["proprio"][:3], float), np.asarray(observation["points"], float))


def imagine(
    model: WorldModel, state: State, *, camera: str, samples: int, generator: torch.Generator
) -> tuple[Outcome, Outcome]:
    """Where one draw of noise says that every candidate ends, and `samples` others that the first one does.

    Points are those of the stream; the hand moves as much as `camera`, which it carries, is expected to. Raises
    `ConfigError` for an unknown camera.
    """
    spec = model.spec
    if camera not in spec.cameras:
        raise ConfigError(f"camera {camera!r} is none of {', '.join(spec.cameras)}")
    view, frame = spec.cameras.index(camera), horizon(spec) // spec.stride - 1
    observation = observation_from_history(state.history[-spec.history * spec.stride :], spec)
    count = len(state.chunks)
    order = [*range(count), *[0] * samples]
    chunks = torch.from_numpy(state.chunks[order])[:, : spec.chunk]
    actions = torch.zeros(len(order), spec.chunk, spec.action)
    actions[:, : chunks.shape[1], : chunks.shape[2]] = chunks
    shapes = {
        "video": (len(spec.cameras), model.autoencoder.channels, *model.grid),
        "camera": (len(spec.cameras), 9),
        "points": (spec.points, 3),
        "force": (len(spec.sensors), 6),
    }
    noise = {
        name: torch.randn(1 + samples, spec.future, *shape, generator=generator)[
            [0] * (count - 1) + [*range(1 + samples)]
        ]
        for name, shape in shapes.items()
    }
    many = Observation(*(repeat_rows(x, len(order)) for x in observation))
    with torch.inference_mode():
        future = future_of_actions(many, actions)
        ends = model.predict(many, future, "forward_dynamics", generator=None, coupling="joint", noise=noise)
    before = many.camera_to_base[:, -1, view, :3, 3]
    moved = (ends.camera_to_base[:, frame, view, :3, 3] - before).double().numpy()
    hand = np.asarray(state.history[-1]["proprio"][:3], float) + moved
    points = ends.points[:, frame, : len(state.history[-1]["points"])].double().numpy()
    return Outcome(hand[:count], points[:count]), Outcome(hand[count:], points[count:])


def compare_state(
    model: WorldModel,
    scene: Scene,
    state: State,
    *,
    seed: int,
    camera: str,
    samples: int,
    generator: torch.Generator,
) -> Comparison:
    """Imagines the candidates of a state and executes them as far."""
    imagined = imagine(model, state, camera=camera, samples=samples, generator=generator)
    return Comparison(*execute(scene, state, seed=seed, steps=horizon(model.spec)), *imagined)


def ranked_pairs(real: np.ndarray, expected: np.ndarray, least: float) -> tuple[float, int]:
    """Of all pairs of candidates (N,) whose real outcomes differ by at least `least`: put in the right order, and all.

    A pair of which the same is expected counts half.
    """
    first, second = np.triu_indices(len(real), 1)
    apart = real[first] - real[second]
    told = expected[first] - expected[second]
    clear = np.abs(apart) >= least
    return float(np.where(told == 0, 0.5, apart * told > 0)[clear].sum()), int(clear.sum())


def rank_correlation(real: np.ndarray, expected: np.ndarray) -> float:
    """Spearman's rank correlation of two rows (N,), equal values sharing their mean rank; NaN where one is constant."""
    if np.ptp(real) == 0 or np.ptp(expected) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(real), _ranks(expected))[0, 1])


def _ranks(row: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(row, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def coverage(samples: np.ndarray, truth: np.ndarray, drop: int) -> np.ndarray:
    """Whether truth (...) lies between the samples (M, ...) without the `drop` lowest and highest: (...) bool.

    If truth were one more sample it would with probability (M - 1 - 2 drop) / (M + 1), whatever the distribution.
    """
    ordered = np.sort(samples, 0)
    return (ordered[drop] <= truth) & (truth <= ordered[len(samples) - 1 - drop])


def nominal(samples: int, drop: int) -> float:
    """The share that `coverage` has for samples from the true distribution."""
    return (samples - 1 - 2 * drop) / (samples + 1)


def widened(samples: np.ndarray, factor: float) -> np.ndarray:
    """Samples (M, ...) with their distance from their median times `factor`."""
    median = np.median(samples, 0)
    return median + factor * (samples - median)


def fitted_width(samples: Sequence[np.ndarray], truth: Sequence[np.ndarray], drop: int) -> float:
    """The smallest factor of `widened` with which at least the nominal share of truth is covered, up to 1000.

    Samples (M, ...) and truth (...) of many states; fit it on other states than those that it is judged by.
    """
    needed = []
    for drawn, true in zip(samples, truth, strict=True):
        # The median is never outside of what is kept, so whether a coordinate is covered grows with the factor.
        ordered, median = np.sort(drawn, 0), np.median(drawn, 0)
        off = true - median
        room = np.where(off >= 0, ordered[len(drawn) - 1 - drop] - median, median - ordered[drop])
        needed.append((np.abs(off) / np.maximum(room, 1e-12)).ravel())
    share = nominal(len(samples[0]), drop)
    return float(min(np.quantile(np.concatenate(needed), share, method="inverted_cdf"), 1000.0))
