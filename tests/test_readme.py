"""The README's commands are those that `make demo` runs, and the other commands it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]


def test_the_steps_by_hand_are_what_the_demo_runs():
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = [line for line in COMMANDS if line.startswith("python ")]
    assert len(steps) == 4
    for step in steps:
        assert f".venv/bin/{step}" in shown, f"`make demo` does not run {step!r}"


@pytest.mark.parametrize(
    "command",
    [
        "-m worldmodel.data generate --help",
        "-m worldmodel.data import --help",
        "-m worldmodel.data export --help",
        "-m worldmodel.data inspect --help",
        "-m worldmodel.data validate --help",
        "-m worldmodel.data stats --help",
        "-m worldmodel.convert kairos --help",
        "-m export build --help",
        "-m export doctor --help",
        "-m export drive --help",
        "-m export serve --help",
        "-m export replay --help",
        "train.py --help",
        "eval.py --help",
        "-m worldmodel.rollout --help",
        "-m worldmodel.edit --help",
        "-m worldmodel.features --help",
        "-m worldmodel.curves --help",
        "benchmarks/latency.py --help",
        "benchmarks/experts.py --help",
        "benchmarks/rollout.py --help",
        "benchmarks/ablation.py --help",
        "benchmarks/features.py --help",
        "benchmarks/distillation.py --help",
        "benchmarks/step.py --help",
        "benchmarks/rivals.py --help",
        "benchmarks/delay.py --help",
        "benchmarks/imagination.py --help",
        "benchmarks/unread_share.py --help",
        "benchmarks/server.py --help",
        "-m worldmodel.plan --help",
    ],
)
def test_help_is_there(command):
    assert command.removesuffix(" --help").split(" ")[-1] in README
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200
