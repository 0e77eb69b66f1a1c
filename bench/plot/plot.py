#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws the microbenchmarks beside their bounds, as PNG and SVG.

    python3 bench/plot/plot.py build/bench

reads every Google Benchmark JSON file of the folder and writes, into the same folder,

    decode_<shape>_<format>_<threads>t   time and bytes of K and V against context, the bound as a line
                                         (where there are rows of more than one context)
    decode_share, prefill_share          every row's share of its ceiling

from rows with these names (bench/README.md says what the counters mean):

    decode/<shape>/<format>/kv=<context>/<plan>/threads=<t>   counters ms, kv_bytes, of_ceiling
    prefill/<shape>/<format>/n=<tokens>/<plan>/threads=<t>    counter of_ceiling

A bound is what the ceiling took that was measured beside the row, in the same process: of_ceiling x ms.

Needs matplotlib (Debian, Ubuntu: python3-matplotlib), nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MultipleLocator, NullLocator, PercentFormatter

ROW_NAME = re.compile(
    r"(?P<kind>decode|prefill)/(?P<shape>[^/]+)/(?P<format>[^/]+)/[a-z_]+=(?P<length>\d+)/(?P<plan>[^/]+)"
    r"/threads[=:](?P<threads>\d+)")
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}

# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart without colour.
STYLES = {"dense": ("#000000", "o"), "duo50": ("#0072B2", "s"), "rlkv50": ("#D55E00", "^")}
MORE_STYLES = [("#009E73", "D"), ("#CC79A7", "v"), ("#56B4E9", "P"), ("#E69F00", "X")]
GREY = "#555555"
DASHES = (0, (4, 2))

CEILINGS = {"decode": "the speed of reading as many bytes", "prefill": "the FMA peak, visible rows counted"}


@dataclass(frozen=True)
class Setting:
    """What the rows of one line chart have in common, but for the plan."""

    kind: str
    shape: str
    format: str
    threads: int


@dataclass
class Point:
    """One row: the median of its repetitions."""

    length: int
    seconds: float
    kv_bytes: float | None  # K and V of one layer
    of_ceiling: float | None  # time of the ceiling / time of the kernel

    @property
    def bound_seconds(self) -> float | None:
        """What the row would take at the speed of its ceiling, which was measured beside it."""
        return self.of_ceiling * self.seconds if self.of_ceiling else None


Measurements = dict[Setting, dict[str, list[Point]]]  # points by setting and plan, shortest first


def medians(rows: list[dict]) -> dict[str, dict]:
    """One row for each name: the reported median, or else the median of what was repeated."""
    reported = {}
    repeated = defaultdict(list)
    for row in rows:
        name = row.get("run_name", row.get("name", ""))
        if row.get("error_occurred") or row.get("skipped"):
            continue
        if row.get("run_type") == "aggregate":
            if row.get("aggregate_name") == "median":
                reported[name] = row
        else:
            repeated[name].append(row)
    result = {}
    for name, runs in repeated.items():
        result[name] = dict(runs[0])
        for key, value in runs[0].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                result[name][key] = statistics.median(run.get(key, value) for run in runs)
    return result | reported


def load(folder: Path) -> Measurements:
    """All rows of a folder."""
    result: Measurements = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        try:
            rows = medians(json.loads(path.read_text(encoding="utf-8"))["benchmarks"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{path}: skipped, not a file of Google Benchmark ({error})", file=sys.stderr)
            continue
        for name, row in rows.items():
            if match := ROW_NAME.match(name):
                add_row(result, match, row)
    for plans in result.values():
        for points in plans.values():
            points.sort(key=lambda point: point.length)
    return result


def add_row(result: Measurements, match: re.Match[str], row: dict) -> None:
    """Adds one decode or prefill row."""
    if "ms" in row:  # the median of the samples that nobody disturbed
        seconds = float(row["ms"]) * 1e-3
    else:
        seconds = float(row["real_time"]) * SECONDS[row.get("time_unit", "ns")]
    setting = Setting(match["kind"], match["shape"], match["format"], int(match["threads"]))
    point = Point(int(match["length"]), seconds, row.get("kv_bytes"), row.get("of_ceiling"))
    result[setting][match["plan"]].append(point)


def styles_of(plans: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every plan."""
    others = iter(MORE_STYLES * (1 + len(plans) // len(MORE_STYLES)))
    return {plan: STYLES.get(plan) or next(others) for plan in plans}


def in_order(plans: Iterable[str]) -> list[str]:
    """Plans as they are named in a legend: the well-known ones first."""
    known = list(STYLES)
    return sorted(plans, key=lambda plan: (known.index(plan) if plan in known else len(known), plan))


def number(value: float) -> str:
    """Three significant digits at most, never in exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def time_text(seconds: float, _: float | None = None) -> str:
    """Seconds with a fitting unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * scale:
            return f"{number(seconds / scale)} {unit}"
    return f"{number(seconds * 1e9)} ns"


def bytes_text(value: float, _: float | None = None) -> str:
    """Bytes with a fitting unit."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 0.9995 * 2**power:
            return f"{number(value / 2**power)} {unit}"
    return f"{number(value)} B"


def length_text(tokens: float, _: float | None = None) -> str:
    """Tokens: 32k is 32768."""
    tokens = round(tokens)
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def quiet(axes: Axes, title: str) -> None:
    """Title, and lines that do not get in the way."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def frame(axes: Axes, plans: dict[str, list[Point]], title: str) -> None:
    """The axis of contexts with a tick for each."""
    quiet(axes, title)
    lengths = sorted({point.length for points in plans.values() for point in points})
    if len(lengths) > 8:
        lengths = lengths[::2] + lengths[-1:]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(length_text))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context (tokens)")


def binary_ticks(axes: Axes, values: list[float]) -> None:
    """Ticks of a logarithmic axis of bytes at powers of two, about six of them."""
    exponents = range(int(min(values)).bit_length() - 2, int(max(values)).bit_length() + 2)
    step = max(1, len(exponents) // 6)
    axes.yaxis.set_major_locator(FixedLocator([float(2**e) for e in exponents if e % step == 0]))
    axes.yaxis.set_minor_locator(NullLocator())


def share_text(points: list[Point]) -> str:
    """What share of the bound's speed was reached: bound / time, over the points that have one."""
    shares = [p.bound_seconds / p.seconds for p in points if p.bound_seconds]
    if not shares:
        return ""
    low, high = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
    return f"  ({low} %)" if low == high else f"  ({low} to {high} %)"


def bound_text(plans: dict[str, list[Point]]) -> str:
    """The bound, with the read bandwidth measured beside the row that reads most."""
    bounded = [p for points in plans.values() for p in points if p.kv_bytes and p.bound_seconds]
    if not bounded:
        return "bound: as many bytes read"
    most = max(bounded, key=lambda point: point.kv_bytes)
    rate = number(most.kv_bytes / most.bound_seconds / 1e9)
    return f"bound: as many bytes read ({rate} GB/s at {length_text(most.length)})"


def draw_decode(setting: Setting, plans: dict[str, list[Point]]) -> Figure:
    """Time with its bound, and bytes, against the context."""
    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    styles = styles_of(in_order(plans))
    handles = []
    kept = []
    for plan in in_order(plans):
        points = plans[plan]
        colour, marker = styles[plan]
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=1.6, markersize=6,
                              label=plan + share_text(points)))
        times.plot([p.length for p in points], [p.seconds for p in points], color=colour, marker=marker,
                   markersize=6, linewidth=1.6)
        bound = [p for p in points if p.bound_seconds]
        times.plot([p.length for p in bound], [p.bound_seconds for p in bound], color=colour, linestyle=DASHES,
                   linewidth=1.2)
        stored = [p for p in points if p.kv_bytes]
        kept += [float(p.kv_bytes) for p in stored]
        memory.plot([p.length for p in stored], [p.kv_bytes for p in stored], color=colour, marker=marker,
                    markersize=6, linewidth=1.6)
    handles.append(Line2D([], [], color=GREY, linestyle=DASHES, linewidth=1.2, label=bound_text(plans)))

    frame(times, plans, "Time of a decode step, one token")
    times.set_yscale("log")
    times.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0), numticks=12))
    times.yaxis.set_minor_locator(NullLocator())
    times.yaxis.set_major_formatter(FuncFormatter(time_text))
    low, high = times.get_ylim()
    times.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
    times.legend(handles=handles, loc="upper left", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none",
                 title="plan (share of its bound's speed)", title_fontsize=9, alignment="left")
    frame(memory, plans, "Bytes of K and V kept")
    if kept:
        memory.set_yscale("log", base=2)
        binary_ticks(memory, kept)
        memory.yaxis.set_major_formatter(FuncFormatter(bytes_text))
    threads = "1 thread" if setting.threads == 1 else f"{setting.threads} threads"
    heading = f"Decode: one layer of {setting.shape}, rows in {setting.format}, {threads}"
    figure.suptitle(heading, fontsize=12, x=0.01, ha="left", weight="bold")
    return figure


def draw_shares(kind: str, measurements: Measurements, ceiling: str) -> Figure:
    """Every row's share of its ceiling: a panel for each number of threads, a line for each shape and length."""
    shares: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for setting, plans in sorted(measurements.items(), key=lambda item: str(item[0])):
        for plan, points in plans.items():
            for point in points:
                if point.of_ceiling:
                    label = f"{setting.shape}  {setting.format}  {length_text(point.length)}"
                    shares[setting.threads][label][plan] = point.of_ceiling
    labels = list(dict.fromkeys(label for panel in shares.values() for label in panel))
    plans = in_order({plan for panel in shares.values() for row in panel.values() for plan in row})
    styles = styles_of(plans)
    largest = max((share for panel in shares.values() for row in panel.values() for share in row.values()), default=1.0)

    figure, all_axes = plt.subplots(1, max(1, len(shares)), sharey=True, squeeze=False, layout="constrained",
                                    figsize=(3.6 + 3.2 * max(1, len(shares)), 1.6 + 0.3 * max(3, len(labels))))
    for axes, threads in zip(all_axes[0], sorted(shares)):
        quiet(axes, "1 thread" if threads == 1 else f"{threads} threads")
        for plan in plans:
            rows = [(share, labels.index(label)) for label, row in shares[threads].items()
                    if (share := row.get(plan)) is not None]
            colour, marker = styles[plan]
            size = max(4.0, 9.0 - 1.5 * plans.index(plan))  # points in one place are all seen
            axes.plot([x for x, _ in rows], [y for _, y in rows], color=colour, marker=marker, markersize=size,
                      linestyle="none", label=plan)
        axes.axvline(1.0, color=GREY, linestyle=DASHES, linewidth=1.2)
        axes.set_xlim(0.0, max(1.05, 1.05 * largest))
        axes.xaxis.set_major_locator(MultipleLocator(0.25))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel(" ")  # room for the legend, which must not hide a point
    handles, names = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.suptitle(f"{kind.capitalize()}: share of {ceiling}", fontsize=12, x=0.01, ha="left", weight="bold")
    return figure


def save(figure: Figure, stem: Path) -> None:
    """Writes both formats and says so."""
    for suffix in (".png", ".svg"):
        path = stem.parent / (stem.name + suffix)
        figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
        print(path)
    plt.close(figure)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draws Google Benchmark results beside their bounds.")
    parser.add_argument("folder", type=Path, help="folder of the JSON files, such as build/bench")
    parser.add_argument("--out", type=Path, help="where the plots go (default: the same folder)")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder")
    out = arguments.out or arguments.folder
    out.mkdir(parents=True, exist_ok=True)

    # Letters stay letters in the SVG, and equal input gives equal files.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "headwise", "font.size": 10})
    measurements = load(arguments.folder)
    for setting, plans in sorted(measurements.items(), key=lambda item: str(item[0])):
        if setting.kind == "decode" and len({point.length for points in plans.values() for point in points}) > 1:
            stem = out / f"decode_{setting.shape}_{setting.format}_{setting.threads}t"
            save(draw_decode(setting, plans), stem)
    for kind, ceiling in CEILINGS.items():
        rows = {setting: plans for setting, plans in measurements.items() if setting.kind == kind}
        if rows:
            save(draw_shares(kind, rows, ceiling), out / f"{kind}_share")
    if not measurements:
        print(f"{arguments.folder}: no rows decode/... or prefill/..., nothing to draw", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
