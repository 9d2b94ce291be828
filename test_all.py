"""Run the tests: what is promised, one test a promise, in the order of reading.

    python test_all.py [substring]          those whose name, or file's name, contains it

The tests are plain functions in tests/, one file a room; pytest finds them too. Each name is a
claim, and the first failure is the cause. Each `# kills:` names mutations of the code that the test
was seen to die of. Oracles are independent: a slow form, an invariant, arithmetic by hand. No
network, no GPU, nothing outside the repository.
"""
import importlib
import os
import re
import sys
import time
import traceback
import unittest
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ORDER = ("model", "huggingface", "fedbiot", "data", "eval", "qa", "code", "baselines", "train",
         "torchrun", "attacks", "docs", "benchmarks")
WORKERS = 2


def collected(substring: str) -> list[tuple[str, str]]:
    """(module, test) of every `def test_…` in tests/, files in ORDER first; imports none."""
    names = {path.stem.removeprefix("test_") for path in (HERE / "tests").glob("test_*.py")}
    found = []
    for name in [n for n in ORDER if n in names] + sorted(names.difference(ORDER)):
        text = (HERE / "tests" / f"test_{name}.py").read_text()
        tests = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
        found += [(f"tests.test_{name}", t) for t in tests if substring in name or substring in t]
    return found


def run(chosen: tuple[str, str]) -> tuple[str, str, str]:
    """One test: (verdict, the line to print, a traceback where it failed)."""
    module, test = chosen
    start, reason, trace = time.perf_counter(), "", ""
    try:
        getattr(importlib.import_module(module), test)()
        verdict = "passed"
    except unittest.SkipTest as skip:
        verdict, reason = "skipped", f": {skip}"
    except (Exception, SystemExit):
        verdict, trace = "failed", traceback.format_exc()
    seconds = time.perf_counter() - start
    return verdict, f"{verdict:7} {seconds:6.2f} s  {test}{reason}", trace


def main(substring: str = "") -> int:
    tests, counts = collected(substring), Counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")           # the workers share the cores
    with ProcessPoolExecutor(WORKERS) as pool:
        ordered = pool.map if len(tests) > 1 else map       # one test alone: here, under a debugger
        for verdict, line, trace in ordered(run, tests):
            counts[verdict] += 1
            sys.stderr.write(trace)
            print(line, flush=True)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
