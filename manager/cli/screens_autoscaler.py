"""The autoscaler's decisions as people read them. Pure: from answers of the API to renderables."""

import datetime as dt
from collections.abc import Sequence
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from manager.cli.screens_tasks import plain_table
from manager.cli.text import NONE, ago, one_line, plain
from manager.core.answers_autoscaler import DecisionView, ScalingGroup

NAMES_SHOWN_MAX: Final = 4
_STYLES: Final = {"add": "green", "remove": "yellow", "drain": "yellow", "uncordon": "green"}


def history_screen(decisions: Sequence[DecisionView], now: dt.datetime | None = None) -> RenderableType:
    """Decisions, newest first: a line for each group."""
    if not decisions:
        return Text("no decisions yet: the autoscaler is off, has no groups, or has just started", "dim")
    now = now or dt.datetime.now(dt.UTC)
    table = plain_table("WHEN", "GROUP", "NEED", "SIZE", "TARGET", "WHY", "WHAT WAS DONE")
    for words in table.columns[-2:]:
        words.no_wrap = False
    for decision in decisions:
        for number, group in enumerate(decision.groups):
            when = ago(decision.at, now) if number == 0 else ""
            table.add_row(
                Text(when, "dim"),
                Text(one_line(group.group, 30)),
                Text(NONE if group.need is None else str(group.need)),
                Text(str(group.size)),
                Text(str(group.target)),
                Text(_why(decision, group)),
                _done(decision, group.group),
            )
    return table


def _why(decision: DecisionView, group: ScalingGroup) -> str:
    words = [group.reason]
    if group.blocked_s > 0:
        words.append(f"({one_line(group.blocked_reason, 80)})")
    elif group.need is None and decision.metrics:
        words.append(f"({one_line(decision.metrics, 80)})")
    infeasible = [f"{tasks} infeasible: {plain(reason)}" for reason, tasks in sorted(decision.infeasible.items())]
    return "; ".join([" ".join(words), *infeasible])


def _done(decision: DecisionView, group: str) -> Text:
    text = Text()
    for action in decision.actions:
        if action.group == group:
            names = ", ".join(action.names[:NAMES_SHOWN_MAX]) + (" …" if len(action.names) > NAMES_SHOWN_MAX else "")
            text.append("; " if text else "")
            text.append(f"{plain(action.action)} {plain(names)}", _STYLES.get(action.action, ""))
            if action.result != "done":
                text.append(f" ({one_line(action.result, 80)})", "red" if action.result != "shadow" else "dim")
    return text
