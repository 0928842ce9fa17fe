"""Command line of export: `python -m export build`, `doctor`, `drive`, `serve` and `replay`."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = """\
Export a trained policy for a robot, check it on the machine that shall run it, drive the simulated arm with it, and
serve it to robots.

  python -m export build checkpoint=RUN_DIR out=DIR data=ROOT [key=value ...]
  python -m export doctor DIR [ticks=N ...] [--json]
  python -m export drive DIR [key=value ...]
  python -m export serve DIR [--port 8000 ...]
  python -m export replay SHARDS [--port 8000 ...]

`python -m export COMMAND --help` lists the settings of a command.
"""

BUILD_HELP = """\
Write an artefact folder: paths through the model as graphs in several formats, golden observations, the runtime (needs
numpy and onnxruntime only) and manifest.json, which states every input and output with shape, unit and frame.

  python -m export build checkpoint=runs/tiny out=artefacts/tiny data=data/metaworld
  python -m export build checkpoint=runs/tiny out=artefacts/tiny data=data/metaworld \\
      paths=[policy,policy_step,proposal,understanding,rollout] formats=[onnx,torchscript,program,aotinductor] \\
      precisions=[fp16,bf16,int8_dynamic,int8_static]

Paths: `policy` (observation history -> action chunk), `policy_step` (newest frame and a cache -> action chunk and the
next cache), `proposal` (newest frame -> what the chunk corrects, for robots that follow what they measure meanwhile),
`understanding` (newest frame -> camera poses, objects, contact), `rollout` (history and actions -> predicted streams).
Actions are clamped inside the graph to the limits of configs/embodiments/NAME.yaml; outputs say which limit acted, how
confident the answer is, and whether the observation is unlike the training data.

Every graph is first compared with the checkpoint on held-out observations, with all senses and with some of them
masked, `policy_step` over every state of its cache. If any number differs by more than the tolerance, nothing is
written. A further precision must stay within its bound: mean difference of actions in standard deviations (other
outputs: over their size), relative growth of the error against the demonstrators, and, with `trials`, success in the
closed loop; one that does not is left out, or kept and marked (keep_failed). The manifest records what was found.

`robots` adds robots that were not trained on: each is read with the statistics of the robots alike that were, as many
numbers of the same names in state and action, taken together, and with the mean of what was learnt of them.

Settings and their defaults:
"""

DRIVE_HELP = """\
Let an exported policy drive the simulated arms that it knows from start states that no demonstration used; prints
success per task and robot with 95 % Wilson intervals and writes the same as JSON.

  python -m export drive artefacts/tiny trials=20
  python -m export drive artefacts/tiny tasks=[reach-v3,push-v3] mask=[camera,points,touch]
  python -m export drive artefacts/arms robots=[panda,kinova3] tasks=[Lift]

Settings and their defaults:
"""

CONFIG = Path(__file__).parent.parent / "configs" / "export.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 after a failure, 2 after a wrong command line;
    `doctor` has its own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words else "--help"
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command not in ("build", "doctor", "drive", "serve", "replay"):
        print(
            f"unknown command {command!r}; expected build, doctor, drive, serve or replay\n\n{HELP}",
            end="",
            file=sys.stderr,
        )
        return 2
    if command == "doctor":
        from export.runtime import doctor

        return doctor.main(words)
    if command in ("serve", "replay"):
        from export import serve

        return serve.main(command, words)
    if any(word in ("-h", "--help") for word in words):
        print((BUILD_HELP if command == "build" else DRIVE_HELP) + _defaults(command), end="")
        return 0
    from worldmodel.errors import ConfigError, WorldModelError

    try:
        settings = _settings(command, words)
    except ConfigError as error:
        print(f"python -m export {command}: {error}", file=sys.stderr)
        return 2
    try:
        _build(settings) if command == "build" else _drive(settings)
    except (WorldModelError, ValueError) as error:
        print(f"python -m export {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _build(settings: dict[str, Any]) -> None:
    """Loads checkpoint and observations, exports, and says what was written."""
    from export.build import BuildOptions, build_artefact
    from export.drive import DrivenCheck
    from export.observations import held_out_moments, recorded_clips, robot_names
    from worldmodel.checkpoint import load_model
    from worldmodel.data.shards import ShardReader

    model = load_model(settings.pop("checkpoint"), settings.pop("robots"))
    reader, out = ShardReader(settings.pop("data")), settings.pop("out")
    count, ticks, clips = (settings.pop(name) for name in ("observations", "ticks", "clips"))
    trials, tasks, drop = (settings.pop(name) for name in ("trials", "tasks", "success_drop"))
    lists = {name: tuple(settings[name]) for name in ("paths", "formats", "precisions", "optional")}
    options = BuildOptions(**{**settings, **lists})
    drive = DrivenCheck(trials=trials, tasks=tuple(tasks or ()), drop=drop) if trials else None
    print(f"exporting {', '.join(options.paths)} as {', '.join(options.formats)} and checking parity", flush=True)
    moments = held_out_moments(reader, model.spec, count, ticks)
    recorded = recorded_clips(reader, model.spec, clips)
    graphs = build_artefact(model, out, moments, recorded, robot_names(reader, model.spec), options, drive)
    print(f"\n| {out} | bytes | difference | |\n| --- | ---: | ---: | --- |")
    for path in sorted(Path(out).iterdir()):
        if path.is_file():
            print(f"| {path.name} | {path.stat().st_size:,} | {_difference(graphs.get(path.name))} |")
    for graph in graphs.values():
        if not graph["written"]:
            print(f"{graph['file']} is not written: {graph['reason']}")


def _difference(graph: dict[str, Any] | None) -> str:
    """Two cells of the table: how far a graph is from the eager model, and what became of it."""
    if graph is None:
        return " | "
    if "parity" in graph:
        return f"{max(graph['parity']['max_error'].values()):.2g} at most |"
    mean = next(iter(graph["check"]["mean_difference"].values()))
    return f"{mean:.2g} in the mean | {'' if graph['accepted'] else graph['reason']}"


def _drive(settings: dict[str, Any]) -> None:
    """Runs the closed loop and prints its table."""
    from export.drive import OnnxPolicyFactory
    from export.runtime import load_manifest
    from worldmodel.closed_loop import SourceScenes, run_closed_loop
    from worldmodel.data.sources.registry import simulated
    from worldmodel.ensemble import averaged
    from worldmodel.errors import ConfigError

    folder = Path(settings["artefact"])
    spec = load_manifest(folder)["spec"]
    exported = OnnxPolicyFactory(
        folder,
        mask=tuple(settings["mask"]),
        seed=settings["seed"],
        precision=settings["precision"],
        unproven=settings["unproven"],
        stepping=settings["stepping"],
    )
    source, robots = simulated(settings["robots"] or exported.robots)
    if unknown := sorted(set(settings["robots"] or ()) - (set(robots) & set(exported.robots))):
        raise ConfigError(
            f"drive: robots {unknown}: the artefact knows {list(exported.robots)}, {source.name} has "
            f"{list(source.robots)}"
        )
    if settings["stepping"] and settings["replan"] != spec["stride"]:
        raise ConfigError(
            f"drive: replan {settings['replan']}; a policy that steps is asked every {spec['stride']} control steps"
        )
    result = run_closed_loop(
        averaged(
            exported,
            settings["ensemble"],
            realtime=settings["realtime"],
            reactive=settings["reactive"],
            delay=settings["delay"],
        ),
        settings["tasks"] or source.train_tasks,
        robots=source.told_apart(robots),
        trials=settings["trials"],
        seed=settings["seed"],
        replan=settings["replan"],
        delay=settings["delay"],
        realtime=settings["realtime"],
        reactive=settings["reactive"],
        image_every=math.gcd(spec["stride"], settings["replan"]),
        workers=settings["workers"],
        make_scene=SourceScenes(spec["height"], tuple(spec["cameras"]), source.name),
    )
    out = Path(settings["out"] or folder / "closed_loop.json")
    result.write(out)
    print(f"{result.table()}\n\nwritten to {out}")


def _defaults(command: str) -> str:
    """The command's section of configs/export.yaml with its comments."""
    section: list[str] = []
    inside = False
    for line in CONFIG.read_text(encoding="utf-8").splitlines():
        if line[:1].strip():
            inside = line.startswith(f"{command}:")
        elif inside:
            section.append(line)
    return "\n".join(section) + "\n"


def _settings(command: str, words: list[str]) -> dict[str, Any]:
    """Defaults with the words of the command line merged in.

    Raises:
        ConfigError: an unknown key, a word that is no key=value, or a required key that is missing.
    """
    from omegaconf import OmegaConf

    from worldmodel.errors import ConfigError

    section = OmegaConf.select(OmegaConf.load(CONFIG), command)
    valid = [str(key) for key in section]
    # The artefact folder is what `drive` is about: it may be given without its key.
    if command == "drive" and words and "=" not in words[0]:
        words = [f"artefact={words[0]}", *words[1:]]
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or key not in valid:
            raise ConfigError(f"{word!r}: expected key=value with a key of {', '.join(valid)}")
    merged = OmegaConf.merge(section, OmegaConf.from_dotlist(words))
    missing = [key for key in valid if OmegaConf.is_missing(merged, key)]
    if missing:
        raise ConfigError(f"missing {' '.join(f'{key}=...' for key in missing)}; see --help")
    settings = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


if __name__ == "__main__":
    sys.exit(main())
