"""The page with the curves of runs, also of those that are under way."""

import re
import time
from datetime import datetime
from html import escape
from itertools import pairwise
from pathlib import Path

import altair as alt
import streamlit as st

from scripts.plot_runs import COLORS, read_run, smoothed
from scripts.web.controls import choose
from scripts.web.state import t
from trainer.run_folders import find_runs, read_json

FAST, SLOW = 2, 15  # seconds between two looks at the files: while a run is going, and otherwise
MOST_POINTS = 600  # of a curve: a screen has no more
USUAL = ("loss", "val_bpb", "tokens_per_second", "learning_rate")
AXES = {"tokens": "targets", "time": "minutes", "steps": "step"}


def show(args):
    """Draw the page; the curves by themselves look for news."""
    folders = find_runs(args.save_dir)
    if not folders:
        st.info(t("no_runs", save_dir=args.save_dir), icon=":material/show_chart:")
        return
    with st.sidebar:
        chosen = choose_runs(folders)
    if not chosen:
        st.info(t("choose_runs"), icon=":material/arrow_back:")
        return
    seconds = FAST if any(is_going(folder, read(folder)) for folder in chosen.values()) else SLOW
    st.fragment(show_curves, run_every=seconds)(chosen, seconds)


def choose_runs(folders):
    """Draw the controls; returns {name: folder} of the chosen runs."""
    state = st.session_state
    state["runs"] = [name for name in state.get("runs", list(folders)[:2]) if name in folders]
    names = st.multiselect(t("runs"), list(folders), key="runs")
    available = sorted({metric for name in names for metric in metrics_of(read(folders[name]))})
    usual = [metric for metric in USUAL if metric in available]
    state["metrics"] = [metric for metric in state.get("metrics", usual) if metric in available] or usual
    labels = {metric: re.split("[(（]", title(metric))[0].strip() for metric in available}
    st.multiselect(t("metrics"), available, key="metrics", format_func=labels.get)
    state.setdefault("against", "tokens")
    choose("against", AXES)
    st.slider(t("smoothing"), 0.0, 0.99, key="smoothing", help=t("smoothing_help"))
    st.toggle(t("log_scale"), key="log_scale")
    return {name: folders[name] for name in names}


def read(folder):
    """The rows of a run's metrics.jsonl; [] until it has a whole line."""
    path = Path(folder) / "metrics.jsonl"
    try:
        status = path.stat()
        return _read(str(folder), status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):
        return []


@st.cache_data(max_entries=50, show_spinner=False)
def _read(folder, changed, size):
    return read_run(folder)


def metrics_of(rows):
    """Names of what was measured; `val_bpb` stands for the validation on each file."""
    numbers = {name for row in rows for name, value in row.items() if isinstance(value, (int, float))}
    return {name.split("/")[0] for name in numbers} - {"step", "targets", "seconds", "minutes"}


def title(metric):
    """What a metric is called."""
    try:
        return t(metric)
    except KeyError:
        return metric


def is_going(folder, rows):
    """Whether a run is still writing: not at its last step, and not silent for far longer than between two lines."""
    if not rows or rows[-1]["step"] >= read_json(Path(folder) / "arguments.json").get("num_steps", float("inf")):
        return False
    seconds = [row["seconds"] for row in rows[-20:] if "seconds" in row]
    longest = max((after - before for before, after in pairwise(seconds)), default=0)
    return time.time() - (Path(folder) / "metrics.jsonl").stat().st_mtime < max(30, 3 * longest)


def show_curves(chosen, seconds):
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


def show_cards(chosen, rows):
    """How far each run is and its last figures."""
    with st.container(horizontal=True):
        for (name, folder), color in zip(chosen.items(), colors(len(chosen))):
            with st.container(border=True, width=340, gap="xsmall"):
                st.html(f'<b style="border-left: 0.4rem solid {color}; padding-left: 0.6rem">{escape(name)}</b>')
                if is_going(folder, rows[name]):
                    st.badge(t("going"), icon=":material/play_circle:", color="green")
                if rows[name]:
                    show_progress(rows[name], read_json(Path(folder) / "arguments.json").get("num_steps"))


def show_progress(rows, num_steps):
    """A bar, and the last loss and validation."""
    step = rows[-1]["step"]
    if num_steps:
        st.progress(min(1.0, step / num_steps), t("step_of", step=f"{step:,}", steps=f"{num_steps:,}"))
    else:
        st.caption(t("step", step=f"{step:,}"))
    last = {name: value for row in rows for name, value in row.items()}
    names = [name for name in last if name == "loss" or name.startswith("val_bpb")]
    st.caption("  \n".join(f"{title(name.split('/')[0])}: **{last[name]:.4g}**" for name in names))


def chart(rows, metric):
    """The curves of a metric: one colour for a run, one dash for each of the files that were validated on."""
    axis, weight = st.session_state.against, st.session_state.get("smoothing", 0.0)
    points = [point for name in rows for point in curve(name, rows[name], metric, AXES[axis], weight)]
    names, files = list(rows), {point["file"] for point in points}
    can_log = st.session_state.get("log_scale") and all(point["y"] > 0 for point in points)
    encoding = {
        "x": alt.X("x:Q", title=t(f"axis_{axis}")),
        "y": alt.Y("y:Q", title=None, scale=alt.Scale(type="log") if can_log else alt.Scale(zero=False)),
        "color": alt.Color("run:N", title=None, scale=alt.Scale(domain=names, range=colors(len(names))),
                           legend=None),  # the cards above have the colours
        "tooltip": [alt.Tooltip("run:N", title=t("run")), alt.Tooltip("x:Q", title=t(f"axis_{axis}"), format=",.4~g"),
                    alt.Tooltip("y:Q", title=title(metric), format=",.4~g")],
    }
    if len(files) > 1:
        encoding["strokeDash"] = alt.StrokeDash("file:N", title=None, legend=alt.Legend(orient="top"))
    is_sparse = metric.startswith("val_") or len(points) < 30
    return alt.Chart(alt.Data(values=points)).mark_line(point=is_sparse, strokeWidth=2).encode(**encoding).properties(height=260)


def colors(count):
    """As many colours as runs, those of `plot_runs` without black, which a dark page would swallow."""
    palette = [color for color in COLORS if color != "#000000"]
    return [palette[i % len(palette)] for i in range(count)]


def curve(run, rows, metric, axis, weight):
    """Points {run, file, x, y} of a metric, at most about `MOST_POINTS` for each file."""
    found = []
    for name in sorted({name for row in rows for name in row if name.split("/")[0] == metric}):
        there = [row for row in rows if isinstance(row.get(name), (int, float))]
        ys = [row[name] for row in there]
        ys = ys if metric.startswith("val_") else smoothed(ys, weight)
        xs = [row.get(axis, 0) / (1e6 if axis == "targets" else 1) for row in there]
        stride = -(-len(xs) // MOST_POINTS) or 1
        file = name.partition("/")[2]
        found += [{"run": run, "file": file, "x": x, "y": y} for x, y in list(zip(xs, ys))[::-stride][::-1]]
    return found
