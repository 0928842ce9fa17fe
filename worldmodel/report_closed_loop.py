"""The part of the report that shows policies driving the arm."""

from collections.abc import Mapping
from html import escape
from typing import Any

from worldmodel.plots import interval_chart
from worldmodel.trials import row_name
from worldmodel.viz import video_tag


def closed_loop_section(closed: list[dict]) -> str:
    """Show what `comparison.compare` returned: rates with intervals, per task and robot, and recorded rollouts."""
    rows = "".join(
        f'<tr><td>{escape(r["policy"])}</td><td>{escape(r["observes"])}</td><td class="n">{r["mean_success"]:.1%}</td>'
        f'<td class="n">{r["interval"][0]:.0%}–{r["interval"][1]:.0%}</td>'
        f'<td class="n">{sum(t["successes"] for t in r["tasks"])} / {sum(t["trials"] for t in r["tasks"])}</td>'
        f'<td class="n">{r["seed"]}</td></tr>'
        for r in closed
    )
    of = {r["policy"]: {row_name(t): t for t in (*r["tasks"], *r.get("robots", ()))} for r in closed}
    tasks = list(dict.fromkeys(name for rows in of.values() for name in rows))
    chart = interval_chart(
        {
            task: {name: (t[task]["success"], *t[task]["interval"]) for name, t in of.items() if task in t}
            for task in tasks
        },
        list(of),
    )
    cells = "".join(
        f"<tr><td>{escape(task)}</td>"
        + "".join(f'<td class="n">{_trials(t[task]) if task in t else "–"}</td>' for t in of.values())
        + "</tr>"
        for task in tasks
    )
    heads = "".join(f'<th class="n">{escape(name)}</th>' for name in of)
    first = closed[0]
    return (
        "<p>The policy drives the simulated arm from start states no demonstration had. All policies meet the same "
        f"start states; start states that are solved already are drawn again. {chunks(first).capitalize()}, failure "
        f"after {horizon(first)} control steps. Intervals are 95 % Wilson intervals.</p>"
        '<div class="wide"><table><thead><tr><th>Policy</th><th>Observes</th><th class="n">Mean success</th>'
        '<th class="n">Interval</th><th class="n">Trials</th><th class="n">Seed</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div><h3>Success by task</h3>{chart}"
        f'<details><summary>Table</summary><div class="wide"><table><thead><tr><th>Task</th>{heads}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div></details>{''.join(map(_rollouts, closed))}"
    )


def chunks(result: Mapping[str, Any]) -> str:
    """How often the policy is asked, and whether its chunks are averaged."""
    decay = result["ensemble"]
    means = "" if decay is None else f", the mean of those that overlap (weight exp(-{decay:g} age))"
    return f"a new chunk every {result['replan']} control steps{means}"


def horizon(result: Mapping[str, Any]) -> str:
    """Control steps after which a trial has failed, by task where they differ."""
    steps = result["max_steps"]
    return ", ".join(f"{n} ({task})" for task, n in steps.items()) if isinstance(steps, dict) else str(steps)


def _trials(task: dict) -> str:
    low, high = task["interval"]
    return f'{task["successes"]} / {task["trials"]} <span class="interval">{low:.0%}–{high:.0%}</span>'


def _rollouts(result: dict) -> str:
    clips = "".join(
        video_tag(rollout["video"], f"{escape(task)}: {'solved' if rollout['success'] else '<b class=no>failed</b>'}")
        for task, rollouts in result.get("rollouts", {}).items()
        for rollout in rollouts
    )
    if not clips:
        return ""
    title = f"Rollouts of {escape(result['policy'])}, first trials of each task, at real speed"
    return f'<details><summary>{title}</summary><div class="grid small">{clips}</div></details>'
