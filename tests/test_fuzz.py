"""A few examples of every fuzz target; `fuzz_shards.py` runs them for as long as one likes."""

from pathlib import Path

import pytest
from fuzz_shards import EscapeError, attempt, contained
from fuzz_targets import TARGETS, prepare
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from worldmodel.errors import DataError


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_errors_come_out(name: str) -> None:
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        phases=(Phase.generate,),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        attempt(TARGETS[name], data)

    prepare()
    run()


def test_the_guard_sees_what_leaves_the_folder() -> None:
    with contained() as folder:
        (folder / "inside").write_text("fine")
        raise DataError("fine too")
    with pytest.raises(EscapeError, match="wrote"), contained() as folder:
        (folder / ".." / "outside" / "new").write_text("x")
    with pytest.raises(EscapeError, match="read"), contained() as folder:
        (folder / ".." / "outside" / "secret.bin").read_bytes()
    with pytest.raises(EscapeError, match=r"os\.mkdir"), contained() as folder:
        Path(folder.parent / "elsewhere").mkdir()
