"""A model card in Markdown, made of the JSON of an evaluation and of nothing else."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldmodel.plots import number
from worldmodel.report import SPLIT_NAMES, absent_instructions
from worldmodel.report_closed_loop import chunks, horizon
from worldmodel.trials import row_name

MODEL_CARD = "MODEL_CARD.md"


def write_card(report: Path) -> Path:
    """Write MODEL_CARD.md beside a report.json and return its path."""
    card = report.parent / MODEL_CARD
    card.write_text(compose_card(json.loads(report.read_text(encoding="utf-8"))), encoding="utf-8")
    return card


def compose_card(report: Mapping[str, Any]) -> str:
    """The card of a report: what the model was trained on, how it was evaluated, results, limits, how to repeat it."""
    sections = {
        "Model and training": _bullets(_training(report["stamp"])),
        "Protocol": _bullets(_protocol(report)),
        "Closed loop": _closed_loop(report["closed_loop"]),
        **{f"Offline: {SPLIT_NAMES[r['split']].lower()}": _offline(r) for r in report["offline"]},
        "Missing sensors": _missing(report),
        "Limits and negative results": _bullets(_limits(report)),
        "Run again": "`python eval.py rerun=report.json` evaluates as the stamp in report.json says and compares.",
    }
    body = "\n\n".join(f"## {head}\n\n{text}" for head, text in sections.items() if text)
    return f"# Model card: {report['title']}\n\n{body}\n"


def _training(stamp: Mapping[str, Any]) -> Iterable[str]:
    seen = stamp["trained_on"]
    yield f"{stamp['parameters']} parameters; weights sha256 `{stamp['weights_sha256'][:16]}`"
    yield f"{seen['episodes']} training episodes of {len(seen['tasks'])} tasks: {', '.join(seen['tasks'])}"
    if len(seen.get("robots", ())) > 1:
        yield f"robots trained on: {', '.join(seen['robots'])}"
    yield f"steps per phase: {_pairs(stamp['training_steps'])}; seed {stamp['training_seed']}"
    same = "the same dataset" if stamp["trained_on_the_same_index"] else "another dataset"
    yield f"evaluated on {same} (index sha256 `{stamp['data_index_sha256'][:16]}`), on episodes nobody trained on"


def _protocol(report: Mapping[str, Any]) -> Iterable[str]:
    stamp = report["stamp"]
    protocol = stamp["protocol"]
    yield f"{protocol['name']}, sha256 `{protocol['sha256'][:16]}`"
    if protocol["departures"]:
        yield f"departs from it: {_pairs(protocol['departures'])}"
    for result in report["offline"]:
        counts = f"{result['clips']} clips of {result['episodes']} episodes, {len(result['tasks'])} tasks"
        end = f"seed {result['settings']['seed']}{absent_instructions(result)}"
        yield f"{SPLIT_NAMES[result['split']].lower()}: {counts}, {end}"
    for result in report["closed_loop"][:1]:
        most = max(task["trials"] for task in result["tasks"])
        yield (
            f"closed loop: up to {most} trials a task{' and robot' if 'robots' in result else ''}, failure after "
            f"{horizon(result)} control steps, {chunks(result)}, seed {result['seed']}"
        )
    yield f"{_pairs(stamp['versions'])}; {stamp['machine']}; revision {stamp['git_revision']}"


def _closed_loop(closed: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [r["policy"], r["observes"], f"{r['mean_success']:.1%}", _share(r["interval"]), str(_trials(r))] for r in closed
    ]
    heads = ["policy", "observes", "mean success", "95 % Wilson interval", "trials"]
    return _table(heads, rows) if rows else ""


def _offline(result: Mapping[str, Any]) -> str:
    rows = []
    for figure in result["figures"]:
        if figure["headline"]:
            others = ", ".join(f"{b['name']} {_number(b['value'])}" for b in figure["baselines"])
            rows.append([_label(figure), _value(figure["ours"]), others or "–", _verdict(figure)])
    return _table(["figure", "model [95 % interval]", "beside it", "verdict"], rows)


def _verdict(figure: Mapping[str, Any]) -> str:
    if not figure["applicable"] or figure["beats_all"] is None:
        return "nothing to learn"
    trivial = [b for b in figure["baselines"] if b["trivial"]]
    if not trivial:
        return "no baseline"
    if not figure["beats_all"]:
        return "not better"
    return "clearly better" if all(b["clearly"] for b in trivial) else "better, not clearly"


def _missing(report: Mapping[str, Any]) -> str:
    lines = []
    for result in report.get("missing") or []:
        names = {figure["name"]: _label(figure) for figure in result["complete"] if figure["headline"]}
        for row in result["rows"]:
            worse, better = (
                [
                    f"{names[name]} {_number(v['difference']['value'], signed=True)}"
                    for name, v in row["figures"].items()
                    if name in names and v["clearly"] and v["better"] == gain
                ]
                for gain in (False, True)
            )
            lines.append(
                f"without {row['missing']} ({result['clips']} clips): clearly worse in {'; '.join(worse) or 'nothing'}"
                + (f". Clearly better in {'; '.join(better)}" if better else "")
            )
    for row in report.get("missing_closed_loop") or []:
        change = row["difference"]
        interval = f"{change['low']:+.0%} to {change['high']:+.0%}"
        lines.append(
            f"without {row['missing']}: closed-loop success {row['mean_success']:.0%}, {change['value']:+.0%} over "
            f"{row['trials']} common start states (95 % {interval})"
        )
    return _bullets(lines)


def _limits(report: Mapping[str, Any]) -> Iterable[str]:
    stamp = report["stamp"]
    for result in report["offline"]:
        where = SPLIT_NAMES[result["split"]].lower()
        for verdict, phrase in (("not better", "not better"), ("better, not clearly", "better, but not clearly,")):
            names = [_label(f) for f in result["figures"] if f["headline"] and _verdict(f) == verdict]
            if names:
                yield f"{phrase} than a trivial baseline on {where}: {'; '.join(names)}"
    if report["closed_loop"]:
        first, *others = report["closed_loop"]
        for other in others:
            if other["interval"][1] > first["interval"][0] and other["mean_success"] >= first["mean_success"]:
                yield (
                    f"{first['policy']} ({first['mean_success']:.1%}) does no better than {other['policy']} "
                    f"({other['mean_success']:.1%}) in the closed loop"
                )
        for task in (*first["tasks"], *first.get("robots", ())):
            if task["interval"][0] < 0.5:
                yield (
                    f"{row_name(task)}: {task['successes']} of {task['trials']} trials ({_share(task['interval'])}) "
                    f"for {first['policy']}"
                )
    else:
        yield "not tried in the closed loop"
    yield f"one training run, seed {stamp['training_seed']}: intervals are over episodes or trials, not over runs"
    yield "forecasts are single samples of the model; success is measured in simulation, never on a real robot"
    senses = stamp["config"]["senses"]
    yield f"evaluated on the tasks, cameras and robots of this dataset alone; senses shown: {_listed(senses, stamp)}"


def _listed(senses: Any, stamp: Mapping[str, Any]) -> str:
    """Senses, or those of the protocol where the setting refers to it."""
    return ", ".join(stamp["config"]["protocol"]["senses"] if isinstance(senses, str) else senses)


def _trials(result: Mapping[str, Any]) -> int:
    return sum(task["trials"] for task in result["tasks"])


def _label(figure: Mapping[str, Any]) -> str:
    return f"{figure['label']} [{figure['unit']}]" if figure["unit"] else figure["label"]


def _value(values: Mapping[str, Any]) -> str:
    return f"{_number(values['value'])} [{_number(values['low'])}, {_number(values['high'])}]"


def _number(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else ("+" if signed and value > 0 else "") + number(value)


def _share(interval: Sequence[float]) -> str:
    return f"{interval[0]:.0%}–{interval[1]:.0%}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
