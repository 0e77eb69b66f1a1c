#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws the demo's table and the head map of each plan, as PNG and SVG.

    build/release/examples/needle_lm/needle_lm demo --csv build/demo.csv
    python3 examples/needle_lm/plot.py build/demo.csv

writes, beside the CSV,

    needle_lm_accuracy   accuracy against memory, a panel for each task
    needle_lm_selection  the same for methods that select tokens, where the CSV has them (demo --selection)
    needle_lm_heads      layers x KV heads, retrieval or streaming, for each plan with scores

Needs matplotlib (Debian, Ubuntu: python3-matplotlib), nothing else. The head map needs no CSV: leave it out.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MultipleLocator, PercentFormatter

Head = tuple[int, int]  # layer, KV head
Scores = list[list[float]]  # [layers][KV heads]

# Policies of the CSV: title, colour (Okabe and Ito's, told apart with any colour vision), marker and its size:
# later ones are drawn on earlier ones, and smaller, so that points in one place are all seen.
POLICIES = {
    "full": ("full cache", "#000000", "o", 8.0),
    "rlkv": ("RLKV", "#D55E00", "^", 11.0),
    "duo_attention": ("DuoAttention", "#0072B2", "s", 8.5),
    "razor_attention": ("RazorAttention heads", "#009E73", "D", 5.0),
    "random": ("random heads", "#555555", "x", 6.0),
    "uniform": ("all heads stream", "#CC79A7", "v", 8.0),
}
# Methods that select tokens, as they are in the CSV, each alone and ("rlkv_") on RLKV's heads.
SELECTIONS = {
    "kv_zip": ("KVzip", "#D55E00", "^", 9.0),
    "ada_kv": ("AdaKV", "#56B4E9", "s", 8.0),
    "snap_kv": ("SnapKV", "#0072B2", "D", 6.5),
    "pyramid_kv": ("PyramidKV", "#009E73", "v", 6.0),
    "expected_attention": ("Expected Attention", "#E69F00", "P", 6.0),
    "tri_attention": ("TriAttention", "#CC79A7", "X", 5.0),
}
MEASURES = {
    "passkey_em": "passkey: all 13 tokens right",
    "cot_em": "chain of thought: all tokens right",
    "answer_em": "chain of thought: its answer right",
}
SPARSITIES = (1.0 / 2.0, 2.0 / 3.0)  # as in the demo
RETRIEVAL, STREAMING, EDGE = "#0072B2", "#E8E8E8", "#FFFFFF"


@dataclass(frozen=True)
class Row:
    """One plan of the demo."""

    policy: str
    kv_share: float  # of the full cache's bytes
    accuracy: dict[str, float]  # by measure


def load_rows(path: Path) -> list[Row]:
    """The CSV of `needle_lm demo` or `needle_lm evaluate`."""
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        missing = {"policy", "kv_share", *MEASURES} - set(table.fieldnames or [])
        if missing:
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))}")
        return [Row(re.sub(r"_\d+$", "", row["policy"]), float(row["kv_share"]),
                    {measure: float(row[measure]) for measure in MEASURES}) for row in table]


def selection_of(policy: str) -> str:
    """The method of a row that selects tokens, "" of any other."""
    method = policy.removeprefix("rlkv_")
    return method if method in SELECTIONS else ""


def draw_panels(title: str, draw: Callable[[Axes, str], None], columns: int) -> Figure:
    """Accuracy against memory: a panel for each measure, which `draw` fills; names below in `columns`."""
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(10.5, 4.2), sharey=True, layout="constrained")
    for axes, (measure, name) in zip(panels, MEASURES.items()):
        draw(axes, measure)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("K and V in memory")
        axes.set_xlim(0.0, 1.04)
        axes.set_ylim(0.0, 1.04)
        for axis, step in ((axes.xaxis, 0.5), (axes.yaxis, 0.25)):
            axis.set_major_locator(MultipleLocator(step))
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("documents")
    handles, names = panels[0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", weight="bold")
    # Room for the legend, which must not hide a point.
    figure.supxlabel("\n" * (math.ceil(len(names) / columns) - 1) + " ")
    figure.legend(handles, names, loc="lower center", ncols=columns, fontsize=9, frameon=False)
    return figure


def grouped(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each policy, those of least memory first."""
    by_policy: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.kv_share):
        by_policy[row.policy].append(row)
    return by_policy


def draw_accuracy(rows: list[Row]) -> Figure:
    """Plans of heads: points of one policy are joined, seeds of random heads are not."""
    by_policy = grouped([row for row in rows if not selection_of(row.policy)])

    def draw(axes: Axes, measure: str) -> None:
        for policy in sorted(by_policy, key=lambda name: list(POLICIES).index(name) if name in POLICIES else 99):
            name, colour, marker, size = POLICIES.get(policy, (policy, "#56B4E9", "P", 8.0))
            points = by_policy[policy]
            axes.plot([row.kv_share for row in points], [row.accuracy[measure] for row in points], color=colour,
                      marker=marker, markersize=size, linewidth=1.4,
                      linestyle="none" if policy == "random" else "-", label=name, clip_on=False, zorder=3)

    return draw_panels("needle_lm: what is still right, and what it costs", draw, len(by_policy))


def draw_selection(rows: list[Row]) -> Figure:
    """Methods that select tokens: alone filled and joined by lines, on RLKV's heads hollow and dashed."""
    by_policy = grouped(rows)

    def draw(axes: Axes, measure: str) -> None:
        def plot(policy: str, name: str, colour: str, marker: str, size: float, **how: str) -> None:
            points = by_policy.get(policy, [])
            axes.plot([row.kv_share for row in points], [row.accuracy[measure] for row in points], color=colour,
                      marker=marker, markersize=size, linewidth=1.4, label=name, clip_on=False, zorder=3, **how)

        plot("full", "full cache", "#000000", "o", 8.0, linestyle="none")
        plot("rlkv", "RLKV", "#000000", "*", 11.0, linestyle="none")
        for method, (name, colour, marker, size) in SELECTIONS.items():
            plot(method, name, colour, marker, size, linestyle="-")
        for method, (name, colour, marker, size) in SELECTIONS.items():
            plot("rlkv_" + method, "RLKV + " + name, colour, marker, size, linestyle="--", markerfacecolor="none")

    return draw_panels("needle_lm: tokens selected where the prompt ends", draw, 5)


def load_scores(path: Path) -> Scores:
    """A table of scores: a line for each layer, a number for each KV head."""
    scores = [[float(word) for word in line.split()] for line in path.read_text(encoding="utf-8").splitlines()]
    if not scores or any(len(row) != len(scores[0]) for row in scores):
        raise ValueError(f"{path}: not a table of layers x KV heads")
    return scores


def num_streaming(num_heads: int, sparsity: float) -> int:
    """ceil((n - 1) s), where a product within rounding of an integer is that integer: heads/count_rule.hpp."""
    if sparsity >= 1.0:
        return num_heads
    exact = (num_heads - 1) * sparsity
    nearest = round(exact)
    return nearest if abs(exact - nearest) <= 4.0 * sys.float_info.epsilon * exact else math.ceil(exact)


def best_heads(scores: Scores, count: int) -> set[Head]:
    """The `count` highest by (clipped value, raw value, layer, head): heads/select.hpp."""
    order = sorted((min(max(raw, 0.0), 1.0), raw, layer, head)
                   for layer, row in enumerate(scores) for head, raw in enumerate(row))
    return {(layer, head) for _, _, layer, head in order[len(order) - count:]}


def num_retrieval(scores: Scores, sparsity: float) -> int:
    """Heads that keep everything."""
    total = sum(len(row) for row in scores)
    return total - num_streaming(total, sparsity)


def razor_heads(induction: Scores, echo: Scores, sparsity: float) -> set[Head]:
    """The best by echo and by induction, 1 to 14, as many as the others keep: plans.hpp, razor_plan()."""
    wanted = num_retrieval(induction, sparsity)
    num_echo = 0 if wanted == 0 else max(1, (wanted + 7) // 15)
    num_induction = wanted - num_echo
    heads = best_heads(induction, num_induction) | best_heads(echo, num_echo)
    while len(heads) < wanted:
        num_induction += 1
        heads = best_heads(induction, num_induction) | best_heads(echo, num_echo)
    return heads


def draw_map(axes: Axes, heads: set[Head], num_layers: int, num_heads: int) -> None:
    """One plan: a square for each KV head, layer 0 at the bottom."""
    for layer in range(num_layers):
        for head in range(num_heads):
            kept = (layer, head) in heads
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1.0, 1.0, edgecolor=EDGE, linewidth=2.5,
                                     facecolor=RETRIEVAL if kept else STREAMING))
    axes.set_xlim(-0.5, num_heads - 0.5)
    axes.set_ylim(-0.5, num_layers - 0.5)
    axes.set_xticks(range(num_heads))
    axes.set_yticks(range(num_layers))
    axes.tick_params(length=0)
    axes.set_aspect("equal")
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_head_maps(folder: Path) -> Figure:
    """A column for each policy, a row for each share of heads."""
    duo, rlkv, induction, echo = (load_scores(folder / f"{name}.tsv")
                                  for name in ("duo_attention", "rlkv", "razor_induction", "razor_echo"))
    num_layers, num_heads = len(duo), len(duo[0])
    if any((len(scores), len(scores[0])) != (num_layers, num_heads) for scores in (rlkv, induction, echo)):
        raise ValueError(f"{folder}: score files of different models")
    total = num_layers * num_heads
    figure, grid = plt.subplots(2, 3, figsize=(7.2, 7.4), layout="constrained")
    for row, sparsity in zip(grid, SPARSITIES):
        kept = num_retrieval(duo, sparsity)
        plans = {
            "DuoAttention": best_heads(duo, kept),
            "RLKV": best_heads(rlkv, kept),
            "RazorAttention": razor_heads(induction, echo, sparsity),
        }
        for axes, (policy, heads) in zip(row, plans.items()):
            draw_map(axes, heads, num_layers, num_heads)
            axes.set_title(f"{policy}\n{kept} of {total} heads", fontsize=10)
        row[0].set_ylabel("layer")
    for axes in grid[-1]:
        axes.set_xlabel("KV head")
    figure.suptitle("needle_lm: what each plan keeps", fontsize=12, x=0.01, ha="left", weight="bold")
    figure.supxlabel(" ")
    figure.legend(handles=[Patch(color=RETRIEVAL, label="retrieval: every token"),
                           Patch(color=STREAMING, label="streaming: 4 sinks + 60 recent tokens")],
                  loc="lower center", ncols=2, fontsize=9, frameon=False)
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
    parser = argparse.ArgumentParser(description="Draws the demo's table and the head map of each plan.")
    parser.add_argument("csv", type=Path, nargs="?", help="what needle_lm demo --csv wrote")
    parser.add_argument("--heads", type=Path, default=Path(__file__).parent / "heads",
                        help="folder of the score files (default: the ones beside this script)")
    parser.add_argument("--out", type=Path, help="where the figures go (default: beside the CSV, or here)")
    arguments = parser.parse_args()
    out = arguments.out or (arguments.csv.parent if arguments.csv else Path("."))
    out.mkdir(parents=True, exist_ok=True)

    # Letters stay letters in the SVG, and equal input gives equal files.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "headwise", "font.size": 10})
    try:
        if arguments.csv:
            rows = load_rows(arguments.csv)
            save(draw_accuracy(rows), out / "needle_lm_accuracy")
            if any(selection_of(row.policy) for row in rows):
                save(draw_selection(rows), out / "needle_lm_selection")
        save(draw_head_maps(arguments.heads), out / "needle_lm_heads")
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
