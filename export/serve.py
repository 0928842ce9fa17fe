"""`python -m export serve` and `python -m export replay`: options of the policy server and the policies it serves.

Like the server this runs on the robot's machine, where neither torch nor the rest of this repository is installed; only
replay, which reads shards, needs them.
"""

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from export.onnx_source import OnnxSource
from export.sessions import PolicySource

SERVE_HELP = """\
Serve an artefact over the openpi websocket protocol: an unmodified openpi-client sends observations by name and gets
action chunks. Every client has a session of its own; metadata on connect lists names, shapes, dtypes and units.

  python -m export serve artefacts/tiny --port 8000
  python -m export serve artefacts/tiny mask=camera,points,touch instruction="Push the button."
"""
REPLAY_HELP = """\
Serve recorded episodes over the same protocol, to wire up a robot without a model: observations are checked as those of
the policy are, and answered with the actions recorded at that step. The n-th session gets the n-th episode.

  python -m export replay data/metaworld --port 8000
"""


def main(command: str, words: Sequence[str]) -> int:
    """Serves until it is stopped; returns the exit status: 0, or 1 after a failure; wrong words exit with 2."""
    parser = _parser(command)
    # Settings are given as key=value, as to the other commands, or as options.
    options = parser.parse_args([_option(word) for word in words])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        from export.server import PolicyServer, ServerOptions

        key = None if options.api_key_file is None else options.api_key_file.read_text(encoding="utf-8").strip()
        settings = ServerOptions(
            host=options.host,
            port=options.port,
            api_key=key,
            tls_certificate=options.tls_certificate,
            tls_key=options.tls_key,
            max_clients=options.max_clients,
            max_message_bytes=options.max_message_bytes,
            max_queue=options.max_queue,
            workers=options.workers,
            keep_seconds=options.keep_seconds,
        )
        asyncio.run(PolicyServer(_source(command, options), settings).run())
    except ImportError as error:
        print(f"python -m export {command}: {error}; the extra `serve` brings what is needed", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"python -m export {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _option(word: str) -> str:
    """`some_key=value` as `--some-key=value`; other words as they are."""
    key, equals, value = word.partition("=")
    return f"--{key.replace('_', '-')}={value}" if equals and key.isidentifier() else word


def _source(command: str, options: argparse.Namespace) -> PolicySource:
    """The policies that the command serves."""
    if command == "replay":
        from export.replay import ReplaySource
        from worldmodel.errors import WorldModelError

        try:
            return ReplaySource(options.shards, split=options.split, horizon=options.horizon)
        except WorldModelError as error:
            raise ValueError(str(error)) from error
    return OnnxSource(
        options.artefact,
        instruction=options.instruction,
        seed=options.seed,
        threads=options.threads,
        allow_missing=options.allow_missing,
        mask=options.mask,
        embodiment=options.embodiment,
    )


def _parser(command: str) -> argparse.ArgumentParser:
    """Options of `serve` or `replay`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m export {command}",
        description=(SERVE_HELP if command == "serve" else REPLAY_HELP),
        epilog="Every option may be written as key=value too, such as port=8000.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    if command == "serve":
        add("artefact", type=Path, help="folder written by `python -m export build`")
        add("--instruction", help="what to do, unless an observation brings it")
        add("--embodiment", help="name of the robot, where the artefact knows several")
        add("--mask", type=_names, default=(), help="senses to hide, of rgb, camera, points, touch, ..., with commas")
        add("--allow-missing", type=_names, default=(), help="cameras or senses that may be absent, with commas")
        add("--seed", type=int, default=0, help="of the noise that every episode starts from (default: 0)")
        add("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    else:
        add("shards", type=Path, help="dataset folder with index.json")
        add("--split", help="only episodes of this split")
        add("--horizon", type=int, default=8, help="actions of an answer (default: 8)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="TCP port (default: 8000)")
    add("--api-key-file", type=Path, help="file with the key that clients must send")
    add("--tls-certificate", type=Path, help="PEM file of the certificate chain")
    add("--tls-key", type=Path, help="PEM file of its private key, unless the certificate's file holds it")
    add("--max-clients", type=int, default=64, help="connections at the same time (default: 64)")
    add("--max-message-bytes", type=int, help="of a request (default: from the sizes of the observations)")
    add("--max-queue", type=int, default=4, help="frames that wait while a request is computed (default: 4)")
    add("--workers", type=int, default=1, help="threads that run policies (default: 1)")
    add("--keep-seconds", type=float, default=60.0, help="how long a session waits for its client (default: 60)")
    return parser


def _names(text: str) -> tuple[str, ...]:
    """Names between commas, with or without brackets."""
    return tuple(name.strip() for name in text.strip("[]").split(",") if name.strip())
