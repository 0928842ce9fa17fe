"""What has been measured: kept by time stamp, looked over value by value, put together to what a policy observes."""

import difflib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .manifest import RuntimeContractError
from .observation import checked, encode_instruction, sound_rows
from .policy import OnnxPolicy
from .readings import Readings


class Inbox:
    """Messages of cameras and sensors for a policy, names as in `OnnxPolicy.observe`.

    Args:
        policy: says what it takes and what it may lack.
        stale_after: seconds up to which a value stands for now, by `images` and `sensors`.
        frozen_after: pictures of the same bytes after which a camera is absent.
        say: is told what is wrong with a message or missing for a question.
    """

    def __init__(
        self, policy: OnnxPolicy, stale_after: dict[str, float], frozen_after: int, say: Callable[[str], None]
    ) -> None:
        self.policy, self.fps, self.stale_after, self._say = policy, policy.fps, stale_after, say
        steps = 2 * policy.history * policy.stride + policy.horizon
        self._readings = {
            name: Readings(name, steps, self.fps, frozen_after if name.startswith("rgb.") else None)
            for name in policy.shapes
        }
        self.reset(0.0)

    def reset(self, now: float) -> None:
        """Forgets all; nothing from before `now` is taken any more."""
        for reading in self._readings.values():
            reading.reset()
        self._start = now
        self.instruction: str | None = None
        self.dropped: dict[str, int] = {}
        """Messages that were not used, and points and sensors of others, by name."""
        self._patchy: set[str] = set()
        self._said: dict[str, np.ndarray] = {}

    def put(self, stamp: float, observation: dict[str, Any], now: float) -> dict[str, np.ndarray]:
        """Takes what was measured at `stamp`, each value by itself; those that are of use.

        Points and sensors that are not finite are absent; the others of their value stay.

        Raises:
            RuntimeContractError: an unknown name, or an instruction that does not fit; then nothing is taken.
        """
        shapes, used = self.policy.shapes, {}
        for key in observation:
            if key not in shapes and key != "instruction":
                near = difflib.get_close_matches(key, shapes, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise RuntimeContractError(f"{key}: unknown; {hint}expected names {sorted(shapes)}")
        if "instruction" in observation:  # looked at first, so that an error leaves nothing half taken
            encode_instruction(observation["instruction"], self.policy.manifest["spec"]["text"])
            self.instruction = observation["instruction"]
        for key, value in self._sound(observation).items():
            if key == "instruction":
                continue
            try:
                array = checked(key, value, *shapes[key])
                # A stamp of the future would stand for now for too long.
                fits = self._start - 0.5 / self.fps <= stamp <= now + 1 / self.fps
                if fits and self._readings[key].put(stamp, array):
                    used[key] = array
                    continue
            except RuntimeContractError as error:
                self._say(str(error))
            self.dropped[key] = self.dropped.get(key, 0) + 1
        return used

    def _sound(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation without those points and sensors that are not finite, counted as dropped."""
        found = dict(observation)
        for key, value in observation.items():
            sound = sound_rows(key, value)
            if sound is None or (sound.all() and key not in self._patchy):
                continue
            said = np.asarray(observation.get(f"has_{key}", self._said.get(key, np.ones_like(sound))))
            if (said.shape, said.dtype) != (sound.shape, bool):
                continue
            # Once some were missing each value brings its flags, or those of an older one would stand for it.
            self._patchy.add(key)
            self._said[key] = said
            self.dropped[key] = self.dropped.get(key, 0) + int((~sound).sum())
            array = np.asarray(value)
            found[key] = np.where(sound.reshape(-1, *[1] * (array.ndim - 1)), array, 0).astype(array.dtype)
            found[f"has_{key}"] = said & sound
        return found

    def _limit(self, key: str) -> float:
        """Seconds up to which a value stands for now; the matrix of a lens does not change."""
        if key.startswith("intrinsics."):
            return math.inf
        return self.stale_after["images" if key.startswith(("rgb.", "camera_to_base.")) else "sensors"]

    def time(self, now: float) -> float | None:
        """The time that the next chunk answers to: of the newest picture, or where there is none, of any sensor."""
        for images in (True, False):
            stamps = [
                reading.newest
                for key, reading in self._readings.items()
                if key.startswith("rgb.") == images and not reading.frozen and now - reading.newest <= self._limit(key)
            ]
            if stamps and max(stamps) > -math.inf:
                return max(stamps)
        self._say("no picture and no sensor is fresh")
        return None

    def history(self, time: float, count: int) -> list[dict[str, np.ndarray]] | None:
        """Control steps up to a time, oldest first; None if something is missing now that must not be.

        After a gap in what the policy needs, the history begins anew, as an episode does.
        """
        history: list[dict[str, np.ndarray]] = []
        for back in range(count):
            step: dict[str, np.ndarray] = {}
            for key, reading in self._readings.items():
                value = reading.at(time - back / self.fps, self._limit(key))
                if value is not None:
                    step[key] = value
                elif not self.policy.may_lack(key):
                    if history:
                        return history[::-1]
                    why = "frozen" if reading.frozen else f"nothing newer than {self._limit(key):g} s"
                    self._say(f"{key}: {why}, and the policy needs it")
                    return None
            if ("points" in step) != ("visible" in step):
                step.pop("points", None)
                step.pop("visible", None)
            history.append(step)
        return history[::-1]
