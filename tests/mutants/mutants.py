#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Do the tests notice? Plausible faults are put into the library, one at a time, and its tests are run.

    tests/mutants/mutants.py                      # one for each way in which such caches have failed in the field
    tests/mutants/mutants.py --automatic 40       # and as many drawn at random from cache/ and attention/

Each mutant is one replaced piece of a header in a copy of the tree, compiled with the test files that are to notice. A
mutant is killed where they fail, crash or hang; survivors are listed, and the exit code is their number. One that does not
compile, some template's assertion for example, is no fault that could be made.
"""
import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
WALK = "walk/*_test.cpp"


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    header: str  # under include/headwise
    old: str     # as often as it stands there: once
    new: str
    tests: tuple  # under tests/, each compiled and run until one notices


# The ways in which public head-aware and windowed caches have failed; the words after the number say how.
FIELD = (
    Mutant("F1 nothing is freed", "cache/books.hpp", "        give_back(index, c, changes.release);\n", "",
           ("cache/kv_cache_memory_test.cpp",)),
    Mutant("F2 a chunk clobbers its ring", "cache/keep/window.hpp", "step.next - turn() <= std::max(", "step.next - 2 * turn() <= std::max(",
           (WALK,)),
    Mutant("F3 the last rows of a prompt are left out", "attention/work.hpp", "ceil_div(num_queries, ", "(num_queries / ",
           ("attention/chunkings_test.cpp", WALK)),
    Mutant("F4 prefill ignores the window", "attention/cpu/visibility.hpp",
           "rows.hole_last = within(window.oldest_recent(query) - row0,", "rows.hole_last = within(0 * (query - row0),",
           ("attention/cpu/visibility_test.cpp",)),
    Mutant("F5 one token off in the window", "core/window.hpp", "query - key < recent", "query - key <= recent",
           ("core/window_test.cpp",)),
    Mutant("F6 one page off", "cache/keep/window.hpp", "ceil_div(std::min(length, rows), page_tokens)",
           "std::min(length, rows) / page_tokens", ("cache/keep/window_test.cpp", WALK)),
    Mutant("F7 a position is a number of rows", "cache/selected_rows.hpp", ": noted[slot]))", ": static_cast<std::int32_t>(slot)))",
           ("cache/kv_cache_selection_test.cpp", "cache/*selection*_test.cpp", WALK)),
    Mutant("F8 rows that move are encoded again", "cache/selected_rows.hpp", "while (to > lowest && from_of(to - 1) >= from_entry * page_tokens_) --to;",
           "to = lowest;", ("cache/*selection*_test.cpp", WALK)),
    Mutant("F10 a rollback that does nothing", "cache/books.hpp", "    sequence.length = new_length;\n", "", (WALK,)),
    Mutant("F11 a saved state lacks a page", "cache/books.hpp", "tables_.entries(id.index, c, h, held.first, held.last)",
           "tables_.entries(id.index, c, h, held.first, held.last - 1)",
           ("cache/*snapshot*_test.cpp", WALK)),
    Mutant("F12 another sequence's rows leave with a snapshot", "cache/kv_cache.hpp", "    clear_unwritten_rows(id);\n", "",
           ("cache/*snapshot*_test.cpp",)),
    Mutant("F13 a place remembers its former sequence", "cache/books.hpp",
           "    sequence = SequenceState{.generation = sequence.generation, .is_live = true};\n    forget(index);",
           "    sequence = SequenceState{.generation = sequence.generation, .is_live = true};", ("cache/kv_cache_test.cpp", "cache/snapshot_test.cpp", WALK)),
    Mutant("F14 rows behind the last are read", "attention/cpu/visibility.hpp", "rows.last = within(query - row0 + 1, first, last);",
           "rows.last = within(query - row0 + 2, first, last + 1);", ("attention/cpu/visibility_test.cpp",)),
    Mutant("F15 query heads of another KV head", "attention/tasks.hpp", "std::int64_t{kv_head} * shape.group_size",
           "std::int64_t{kv_head}", (WALK,)),
    Mutant("F16 an address of 32 bits", "cache/pages/page_pool.hpp", "memory_ + static_cast<std::size_t>(page) * shape_.granule()",
           "memory_ + static_cast<std::uint32_t>(static_cast<std::size_t>(page) * shape_.granule())",
           ("cache/pages/page_pool_test.cpp", "cache/*_test.cpp")),
    Mutant("F17 nothing seen is not nothing", "attention/state.hpp", "empty ? O::zero() : O::load(state.out + d)", "O::load(state.out + d)",
           ("attention/state_test.cpp", "attention/extremes_test.cpp")),
    Mutant("F18 an empty split overwrites the others", "attention/state.hpp", "  if (from.empty()) return;\n", "", ("attention/state_test.cpp",)),
    Mutant("F20 a short context is emptied by rounding", "heads/token_counts.hpp", "static_cast<std::int64_t>(left), 1, n)",
           "static_cast<std::int64_t>(left), 0, n)", ("heads/token_counts_test.cpp",)),
    Mutant("F23 scratch that admission does not see", "attention/scratch.hpp",
           "return StepWork::num_bytes(WorkSize::of_largest_step(geometry), num_threads);",
           "return StepWork::num_bytes(WorkSize::of_largest_step(geometry), 1);", ("attention/scratch_test.cpp",)),
    Mutant("F24 a step of the past is committed", "cache/books.hpp", "return open_epoch_ != 0 && open_step_ == &step && step.books_ == this &&\n           step.epoch_ == open_epoch_;",
           "return open_epoch_ != 0;", ("cache/books_test.cpp",)),
    Mutant("F25 a head's format is lost where rows move", "cache/kv_cache.hpp",
           "const int format = geometry().classes()[static_cast<std::size_t>(class_idx)].format;",
           "const int format = 0 * class_idx;", ("attention/formats_test.cpp",)),
)

# What a hand slips on. Left: what is looked for in a line of code; right: what stands there instead.
SLIPS = (
    (r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "), (r" >= ", " > "), (r" == ", " != "), (r" != ", " == "),
    (r" && ", " || "), (r" \|\| ", " && "), (r" \+ 1\b", ""), (r" - 1\b", ""), (r" \+ ", " - "), (r" - ", " + "),
    (r"std::min\(", "std::max("), (r"std::max\(", "std::min("), (r"\bfirst\b", "last"), (r"\blast\b", "first"),
    (r"\bk_dim\b", "v_dim"), (r"\bv_dim\b", "k_dim"), (r"\blength\b", "high_water"), (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"), (r"\+\+(\w)", r"--\1"), (r"ceil_div\(([^,()]+), ([^()]+)\)", r"(\1) / (\2)"),
)
# Lines in which a slip is none: prose, and what checks or declares.
NOT_CODE = re.compile(r"^\s*(//|#|template|static_assert|HEADWISE_ASSERT|using |friend |fail<|\*)|requires|fail<|operator|&&\s*\w+[,)]")


def tests_of(header):
    """The header's own test, the walk, and the tests of its room."""
    own = header.removesuffix(".hpp") + "_test.cpp"
    room = header.split("/")[0]
    tests = [own] if (ROOT / "tests" / own).exists() else []
    if header.startswith("attention/cpu/"):
        return tuple(tests + [WALK, "attention/cpu/*_test.cpp"])
    return tuple(tests + [WALK, f"{room}/**/*_test.cpp" if room == "cache" else f"{room}/*_test.cpp"])


def drawn(count, seed):
    """`count` mutants of lines of code in cache/ and attention/; what does not compile is drawn, too."""
    chance = random.Random(seed)
    slips = []
    for room in ("cache", "attention"):
        for path in sorted((ROOT / "include/headwise" / room).rglob("*.hpp")):
            text = path.read_text()
            at = 0
            for number, line in enumerate(text.splitlines(keepends=True), 1):
                code = line.split("//")[0]
                if not NOT_CODE.search(code):
                    for old, new in SLIPS:
                        for found in re.finditer(old, code):
                            slips.append((path, number, at + found.start(), at + found.end(), found.expand(new)))
                at += len(line)
    chance.shuffle(slips)
    for path, number, begin, end, new in slips[:count]:
        text = path.read_text()
        header = str(path.relative_to(ROOT / "include/headwise"))
        line = text.splitlines()[number - 1].strip()
        # The whole text as `old`: a place is no piece that stands there once.
        yield Mutant(f"{header}:{number}: \"{text[begin:end].strip()}\" for \"{new.strip()}\" in {line}", header, text,
                     text[:begin] + new + text[end:], tests_of(header))


def compiler(args, tree):
    return [args.compiler, "-std=c++20", "-O1", "-march=native", "-w",
            f'-DHEADWISE_SHARED_DIR="{ROOT.parent}/shared"',
            f"-I{tree}/include", f"-I{ROOT}/tests", *args.flag]


def notices(args, tree, pattern):
    """How the tests of a pattern answer: None where all pass."""
    sources = sorted((ROOT / "tests").glob(pattern))
    if not sources:
        raise SystemExit(f"no test is {pattern}")
    text = "".join(f'#include "{source}"\n' for source in sources)
    # Explicit instantiations that the tests link: their headers say so.
    extra = []
    everything = "".join(source.read_text() for source in sources)
    if "run_kernels.hpp" in everything:
        extra.append(ROOT / "tests/support/run_kernels.cpp")
    if re.search(r"attend_instances|attend_models|attended_cache|cache_model", everything):
        extra.append(ROOT / "tests/support/attend_instances.cpp")
    # The walk is hardened as everywhere; other tests see more where freed pages keep their rows.
    text = ("#define HEADWISE_HARDENED 1\n" if pattern == WALK else "#define NDEBUG\n") + text
    (tree / "tests.cpp").write_text(text)
    program = tree / "tests"
    built = subprocess.run([*compiler(args, tree), str(tree / "tests.cpp"), *map(str, extra), "-o", str(program),
                            *args.link, "-lgtest_main", "-lgmock", "-lgtest", "-lpthread"],
                           capture_output=True, text=True)
    if built.returncode != 0:
        error = next((line for line in built.stderr.splitlines() if "error" in line or "undefined" in line), "?")
        return "does not compile: " + error[-160:]
    try:
        ran = subprocess.run([str(program), "--gtest_brief=1"], capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return f"hangs in {pattern}"
    if ran.returncode == 0:
        return None
    failed = re.search(r"\[  FAILED  \] ([\w/.]+)", ran.stdout)
    return failed.group(1) if failed else f"{pattern} ends with {ran.returncode}"


def answer(args, mutant):
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        tree = pathlib.Path(folder)
        shutil.copytree(ROOT / "include", tree / "include")
        header = tree / "include/headwise" / mutant.header
        text = header.read_text()
        if text.count(mutant.old) != 1:
            return f"STALE: its text stands {text.count(mutant.old)} times in {mutant.header}", None
        header.write_text(text.replace(mutant.old, mutant.new))
        for pattern in mutant.tests:
            noticed = notices(args, tree, pattern)
            if noticed:
                return noticed, pattern
        return None, None


def fails_anyway(args, pattern):
    """What the tests of a pattern say of the library as it is: None, or they prove nothing."""
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        shutil.copytree(ROOT / "include", pathlib.Path(folder) / "include")
        return notices(args, pathlib.Path(folder), pattern)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--automatic", type=int, default=0, help="mutants drawn beside those of the field")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="mutants whose name has this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=int, default=900, help="seconds of a test program")
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--flag", action="append", default=["-I/usr/include/eigen3"], help="one more flag of the compiler")
    parser.add_argument("--link", action="append", default=[], help="one more flag of the linker")
    args = parser.parse_args()
    mutants = [mutant for mutant in [*FIELD, *drawn(args.automatic, args.seed)] if args.only in mutant.name]
    survivors = []
    uncompiled = 0
    killers = set()  # patterns of tests
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        asked = {pool.submit(answer, args, mutant): mutant for mutant in mutants}
        for done in concurrent.futures.as_completed(asked):
            mutant, (noticed, pattern) = asked[done], done.result()
            print(f"{'SURVIVES' if noticed is None else 'killed  '}  {mutant.name}\n          {noticed or '-'}", flush=True)
            if noticed is None or noticed.startswith("STALE"):
                survivors.append(mutant)
            elif noticed.startswith("does not compile"):
                uncompiled += 1
            else:
                killers.add(pattern)
        for pattern, noticed in zip(sorted(killers), pool.map(lambda one: fails_anyway(args, one), sorted(killers))):
            if noticed:
                sys.exit(f"{pattern} proves nothing: without a mutant it says {noticed}")
    print(f"{len(mutants) - len(survivors) - uncompiled} killed, {len(survivors)} survive, {uncompiled} do not compile")
    sys.exit(min(len(survivors), 100))


if __name__ == "__main__":
    main()
