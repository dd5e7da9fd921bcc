"""The page with the curves of runs, finished or still running."""

import re
import time
from datetime import datetime
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import altair as alt
import streamlit as st

from scripts.plot_runs import COLORS, read_run, smoothed
from scripts.web.controls import choose
from scripts.web.run_folders import find_runs, read_json
from scripts.web.text import TEXT, t

FAST, SLOW = 2, 15  # seconds between two looks at the files: of running runs, and of finished ones
MOST_POINTS = 600  # of a curve: a screen has no more
USUAL = ("loss", "val_bpb", "tokens_per_second", "learning_rate")
AXES = {"tokens": "targets", "time": "minutes", "steps": "step"}


def show(args: Any) -> None:
    """Draw the page; the curves refresh themselves."""
    folders = find_runs(args.save_dir)
    if not folders:
        st.info(t("no_runs", save_dir=args.save_dir), icon=":material/show_chart:")
        return
    with st.sidebar:
        chosen = choose_runs(folders)
    if not chosen:
        st.info(t("choose_runs"), icon=":material/arrow_back:")
        return
    seconds = FAST if any(is_running(folder, read(folder)) for folder in chosen.values()) else SLOW
    st.fragment(show_curves, run_every=seconds)(chosen, seconds)


def choose_runs(folders: dict[str, Path]) -> dict[str, Path]:
    """Draw the controls; returns {name: folder} of the chosen runs."""
    state = st.session_state
    state["runs"] = [name for name in state.get("runs", list(folders)[:2]) if name in folders]
    names = st.multiselect(t("runs"), list(folders), key="runs")
    available = sorted({metric for name in names for metric in metrics_of(read(folders[name]))})
    usual = [metric for metric in USUAL if metric in available]
    state["metrics"] = [
        metric for metric in state.get("metrics", usual) if metric in available
    ] or usual
    labels = {metric: re.split("[(（]", title(metric))[0].strip() for metric in available}
    st.multiselect(t("metrics"), available, key="metrics", format_func=labels.get)
    state.setdefault("against", "tokens")
    choose("against", AXES)
    st.slider(t("smoothing"), 0.0, 0.99, key="smoothing", help=t("smoothing_help"))
    st.toggle(t("log_scale"), key="log_scale")
    return {name: folders[name] for name in names}


def read(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; [] until it has a whole line."""
    path = folder / "metrics.jsonl"
    try:
        status = path.stat()
        return _read(str(folder), status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):
        return []


@st.cache_data(max_entries=50, show_spinner=False)
def _read(folder: str, changed: int, size: int) -> list[dict]:
    return read_run(folder)


def group_of(name: str) -> str:
    """The chart of a metric: `val_bpb` for validation on each file, `reward` for all its parts."""
    return name if name.startswith("completions/") else name.split("/")[0]


def metrics_of(rows: list[dict]) -> set[str]:
    """Names of the charts that a run has data for."""
    numbers = {
        name for row in rows for name, value in row.items() if isinstance(value, (int, float))
    }
    return set(map(group_of, numbers)) - {"step", "targets", "seconds", "minutes"}


def title(metric: str) -> str:
    """The title of a chart."""
    return t(metric) if metric in TEXT else metric


def num_steps(folder: Path) -> int | None:
    """The number of steps that a run will have, as far as its folder tells."""
    return read_json(folder / "arguments.json").get("num_steps")


def is_running(folder: Path, rows: list[dict]) -> bool:
    """Whether a run writes: not at its last step, nor silent far longer than between two lines."""
    if not rows or rows[-1]["step"] >= (num_steps(folder) or float("inf")):
        return False
    seconds = [row["seconds"] for row in rows[-20:] if "seconds" in row]
    longest = max((after - before for before, after in pairwise(seconds)), default=0)
    return time.time() - (folder / "metrics.jsonl").stat().st_mtime < max(30, 3 * longest)


def show_curves(chosen: dict[str, Path], seconds: int) -> None:
    """A card for each run and a chart for each metric."""
    rows = {name: read(folder) for name, folder in chosen.items()}
    show_cards(chosen, rows)
    metrics = st.session_state.metrics
    for start in range(0, len(metrics), 2):
        for column, metric in zip(st.columns(2), metrics[start : start + 2]):
            with column.container(border=True):
                st.markdown(f"**{title(metric)}**")
                st.altair_chart(chart(rows, metric), width="stretch", key=f"chart_{metric}")
    st.caption(t("refreshed", time=datetime.now().strftime("%H:%M:%S"), seconds=seconds))


def show_cards(chosen: dict[str, Path], rows: dict[str, list[dict]]) -> None:
    """The progress of each run, and its last metrics."""
    with st.container(horizontal=True):
        for (name, folder), color in zip(chosen.items(), colors(len(chosen))):
            with st.container(border=True, width=340, gap="xsmall"):
                style = f"border-left: 0.4rem solid {color}; padding-left: 0.6rem"
                st.html(f'<b style="{style}">{escape(name)}</b>')
                if is_running(folder, rows[name]):
                    st.badge(t("going"), icon=":material/play_circle:", color="green")
                if rows[name]:
                    show_progress(rows[name], num_steps(folder))


def show_progress(rows: list[dict], steps: int | None) -> None:
    """A bar, and the last loss and validation."""
    step = rows[-1]["step"]
    if steps:
        st.progress(min(1.0, step / steps), t("step_of", step=f"{step:,}", steps=f"{steps:,}"))
    else:
        st.caption(t("step", step=f"{step:,}"))
    last = {name: value for row in rows for name, value in row.items()}
    names = [name for name in last if name == "loss" or name.startswith("val_bpb")]
    st.caption("  \n".join(f"{title(name.split('/')[0])}: **{last[name]:.4g}**" for name in names))


def chart(rows: dict[str, list[dict]], metric: str) -> alt.Chart:
    """The curves of a metric: one colour for each run, one dash for each validation file."""
    axis, weight = st.session_state.against, st.session_state.get("smoothing", 0.0)
    points = [
        point for name in rows for point in curve(name, rows[name], metric, AXES[axis], weight)
    ]
    names, files = list(rows), {point["file"] for point in points}
    can_log = st.session_state.get("log_scale") and all(point["y"] > 0 for point in points)
    encoding = {
        "x": alt.X("x:Q", title=t(f"axis_{axis}")),
        "y": alt.Y(
            "y:Q", title=None, scale=alt.Scale(type="log") if can_log else alt.Scale(zero=False)
        ),
        "color": alt.Color(
            "run:N",
            title=None,
            scale=alt.Scale(domain=names, range=colors(len(names))),
            legend=None,
        ),  # the cards above have the colours
        "tooltip": [
            alt.Tooltip("run:N", title=t("run")),
            alt.Tooltip("x:Q", title=t(f"axis_{axis}"), format=",.4~g"),
            alt.Tooltip("y:Q", title=title(metric), format=",.4~g"),
        ],
    }
    if len(files) > 1:
        encoding["strokeDash"] = alt.StrokeDash(
            "file:N", title=None, legend=alt.Legend(orient="top")
        )
    is_sparse = metric.startswith("val_") or len(points) < 30
    return (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=is_sparse, strokeWidth=2)
        .encode(**encoding)
        .properties(height=260)
    )


def colors(count: int) -> list[str]:
    """So many colours of `plot_runs`, without black, which a dark page would swallow."""
    palette = [color for color in COLORS if color != "#000000"]
    return [palette[i % len(palette)] for i in range(count)]


def curve(run: str, rows: list[dict], metric: str, axis: str, weight: float) -> list[dict]:
    """Points {run, file, x, y} of a metric, at most about `MOST_POINTS` for each file."""
    found = []
    for name in sorted({name for row in rows for name in row if group_of(name) == metric}):
        there = [row for row in rows if isinstance(row.get(name), (int, float))]
        ys = [row[name] for row in there]
        ys = ys if metric.startswith("val_") else smoothed(ys, weight)
        xs = [row.get(axis, 0) / (1e6 if axis == "targets" else 1) for row in there]
        stride = -(-len(xs) // MOST_POINTS) or 1
        file = name.partition("/")[2]
        found += [
            {"run": run, "file": file, "x": x, "y": y}
            for x, y in list(zip(xs, ys))[::-stride][::-1]
        ]
    return found
