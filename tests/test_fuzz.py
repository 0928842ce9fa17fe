"""A few examples of every fuzz target; `fuzz_shards.py` and `fuzz_server.py` run for as long as one likes."""

from pathlib import Path

import fuzz_server
import pytest
from fuzz_server import ServerFault, campaign
from fuzz_shards import EscapeError, attempt, contained
from fuzz_targets import TARGETS, prepare
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from server_fakes import made_up_artefact

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


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_artefact(tmp_path_factory.mktemp("fuzz") / "artefact")


def test_the_server_outlives_strangers(artefact: Path) -> None:
    attacks, _, answers, _ = campaign(artefact, seconds=5)
    assert sum(attacks.values()) > 10 and answers > 10


SABOTAGE = {
    "sessions mixed": (
        "from export.runtime import OnnxPolicy; OnnxPolicy.fork = lambda self: self",
        "an honest client: ServerFault: step",
    ),
    "a fault of its own": (
        "import export.sessions as s; s.RequestError = KeyError",
        "internal",
    ),
    "pickle": (
        "import pickle, export.sessions as s; p = s.unpack; "
        "s.unpack = lambda f: pickle.loads(f) if f[:1] == bytes([128]) and f[1:2] in bytes([2, 4, 5]) else p(f)",
        "FORBIDDEN pickle.find_class",
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_campaign_sees_what_a_server_must_not_do(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    code, found = SABOTAGE[name]
    monkeypatch.setattr(
        fuzz_server, "SERVER", fuzz_server.SERVER.replace("    from export", f"    {code}\n    from export")
    )
    with pytest.raises(ServerFault, match=found):
        campaign(artefact, seconds=60)
