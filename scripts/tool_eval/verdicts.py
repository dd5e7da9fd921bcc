"""Verdicts on dialogues with tools, and their table."""

from dataset.chat.reply import CALL
from dataset.chat.tools import ToolBox
from dataset.toy.scorer import wilson
from scripts.tool_eval.cases import Case


def same_calls(made: list[tuple], wanted: list[tuple]) -> bool:
    """Whether two lists of (name, arguments) are the same but for their order."""
    return len(made) == len(wanted) and all(
        made.count(call) == wanted.count(call) for call in wanted
    )


def judge(case: Case, right: bool, messages: list[dict], box: ToolBox) -> dict:
    """The verdict on a dialogue: {"success", "exact", "no_call": bool, "calls": attempted ones,
    "invalid": how many of these could not be made}; "exact" is None if no calls are known.
    """
    completions = [message for message in messages if message["role"] == "assistant"]
    calls = [
        (call["name"], call["arguments"])
        for message in completions
        for call in message.get("tool_calls", ())
    ]
    # the content still holds a call that could not be read
    broken = sum(message["content"].count(CALL) for message in completions)
    is_exact = None if case.calls is None else same_calls(calls, list(case.calls)) and not broken
    return {
        "success": case.is_right(right, messages),
        "exact": is_exact,
        "no_call": not calls and not broken,
        "calls": len(calls) + broken,
        "invalid": broken + sum(box.fault(*call) is not None for call in calls),
    }


def table_of(
    cases: list[Case], verdicts: list[dict], without: list[bool] | None = None
) -> list[dict]:
    """One row per tool, then "overall": n, success with low and high (95%), exact (None if the
    expected calls are not known), no_call, calls, invalid (fraction of the calls), and
    without_tools if it was measured.
    """
    rows, tools = [], [case.question.skill for case in cases]
    for tool in [*dict.fromkeys(tools), "overall"]:
        indices = [i for i, name in enumerate(tools) if tool in (name, "overall")]
        n = len(indices)
        total = {key: sum(verdicts[i][key] or 0 for i in indices) for key in verdicts[0]}
        known = sum(verdicts[i]["exact"] is not None for i in indices)
        low, high = wilson(total["success"], n)
        row = {"tool": tool or "any", "n": n, "success": total["success"] / n}
        row |= {"low": low, "high": high}
        row |= {"exact": total["exact"] / known if known else None}
        row |= {"no_call": total["no_call"] / n}
        row |= {"calls": total["calls"], "invalid": total["invalid"] / max(total["calls"], 1)}
        if without:
            row["without_tools"] = sum(without[i] for i in indices) / n
        rows.append(row)
    return rows


def format_table(rows: list[dict]) -> str:
    """The table as aligned text, fractions in percent."""
    names = ["success", "low", "high", "exact", "no_call", "invalid"]
    names += ["without_tools"] if "without_tools" in rows[0] else []
    widths = {name: max(9, len(name) + 2) for name in names}
    titles = "".join(f"{name.replace('_', ' '):>{width}}" for name, width in widths.items())
    lines = [f"{'tool':<16}{'n':>5}{titles}"]
    for row in rows:
        cells = "".join(
            f"{'-':>{width}}" if row[name] is None else f"{100 * row[name]:>{width - 1}.1f}%"
            for name, width in widths.items()
        )
        lines.append(f"{row['tool']:<16}{row['n']:>5}{cells}")
    return "\n".join(lines)
