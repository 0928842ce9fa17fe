"""The LeRobot side of `latency.py`: runs in an interpreter that has lerobot and needs nothing of this repository.

  latency_lerobot.py PIXELS CAMERAS STATE ACTION THREADS CLOCK

Answers each line on standard input with `seconds S`: what one action chunk of ACT took. The policy has LeRobot's
default configuration but for the shapes of its inputs, random weights, and runs as its `select_action` runs it.
"""

import sys
import time
from collections.abc import Callable
from typing import Any


def declare_operators() -> Any:
    """Declares what torchvision's compiled half would: it does not load beside a CPU build of torch."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # operators live as long as it does


def main(pixels: int, cameras: int, state: int, action: int, threads: int, clock: Callable[[], float]) -> None:
    """Answers until the input ends."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature  # pyright: ignore[reportMissingImports]
    from lerobot.policies.act.configuration_act import ACTConfig  # pyright: ignore[reportMissingImports]
    from lerobot.policies.act.modeling_act import ACTPolicy  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    names = [f"observation.images.{i}" for i in range(cameras)]
    config = ACTConfig(
        input_features={
            **{name: PolicyFeature(FeatureType.VISUAL, (3, pixels, pixels)) for name in names},
            "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))},
        device="cpu",
        pretrained_backbone_weights=None,
        push_to_hub=False,
    )
    policy = ACTPolicy(config).eval()
    batch = {name: torch.rand(1, 3, pixels, pixels) for name in names} | {"observation.state": torch.rand(1, state)}
    for _ in sys.stdin:
        started = clock()
        with torch.inference_mode():
            policy.predict_action_chunk(dict(batch))
        print(f"seconds {clock() - started}", flush=True)


if __name__ == "__main__":
    operators = declare_operators()
    pixels, cameras, state, action, threads = (int(word) for word in sys.argv[1:6])
    main(pixels, cameras, state, action, threads, {"wall": time.perf_counter, "cpu": time.process_time}[sys.argv[6]])
