"""Ten times the shards in the memory of one: an epoch through the training loader, each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import made_up_dataset

PIXELS, LENGTH, EPISODES, CACHE = 96, 20, 4, 1 << 22
EPOCH = f"""
import gc, itertools, json, resource, sys
from worldmodel.contracts import ClipSpec
from worldmodel.data.datamodule import ClipDataModule
spec = ClipSpec(cameras=("front",), embodiments=("toy",), height={PIXELS}, width={PIXELS}, action=4, proprio=4,
                history=2, stride=1, future=1, chunk=2)
data = ClipDataModule(root=sys.argv[1], spec=spec, batch_size=16, seed=0, cache_bytes={CACHE})
clips = sum(len(batch.key) for batch in itertools.islice(data.train_dataloader(), len(data.train_clips) // 16))
gc.collect()
held = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"clips": clips, "held": held, "peak": peak, "cached": data.reader._cache.used}}))
"""


def multiplied(root: Path, out: Path, times: int) -> Path:
    """The dataset `times` over, every copy of a shard under a name of its own."""
    shutil.copytree(root, out)
    index = json.loads((root / "index.json").read_text())
    shards = [{**shard, "name": f"{k}-{shard['name']}"} for k in range(times) for shard in index["shards"]]
    for shard in shards:
        shutil.copy(root / shard["name"].partition("-")[2], out / shard["name"])
    (out / "index.json").write_text(json.dumps(index | {"shards": shards}))
    return out


def measured(root: Path) -> dict[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", EPOCH, str(root)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_ten_times_the_shards_take_no_more_memory(tmp_path: Path) -> None:
    groups = {("toy", f"task_{i}"): EPISODES for i in range(4)}
    small = made_up_dataset(tmp_path / "small", groups, length=LENGTH, pixels=PIXELS)
    once, tenfold = measured(small), measured(multiplied(small, tmp_path / "large", 10))
    assert tenfold["clips"] > 9 * once["clips"]
    # Both fill the cache; ten times the pictures, if they were kept, would be far more than a twentieth of a process.
    decoded = tenfold["clips"] * PIXELS * PIXELS * 3
    assert min(once["cached"], tenfold["cached"]) > 0.9 * CACHE and decoded > 0.1 * once["held"] + CACHE
    assert tenfold["held"] < 1.05 * once["held"]
    assert tenfold["peak"] < 1.05 * once["peak"]
