"""Runs the python blocks of lesson.md in order and compares what each prints with what it says.

What a block is said to print is the text block that follows it.

    python docs/run_lesson.py              # exit status 0: the lesson says what happens
    python docs/run_lesson.py --write      # puts what was printed into the lesson

Words and whole numbers must be the same. Another CPU sums in another order, so a number with a
decimal point may differ by 0.02 and a tenth of itself. But two such numbers in one column of a
block keep their order, unless they are less than 0.01 apart: results cannot change places.
"""
import contextlib
import io
import itertools
import os
import re
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"```python\n(.*?)```\n(\n```text\n(.*?)```\n)?", re.S)
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")


def printed(code: str, line: int, names: dict) -> str:
    """What a block prints; its errors point at the line of lesson.md."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile("\n" * line + code, str(HERE / "lesson.md"), "exec"), names)
    return out.getvalue()


def columns(text: str) -> list[list[float]]:
    """The numbers with a decimal point: the first of every line, the second of every line, …"""
    rows = [[float(x) for x in DECIMAL.findall(line)] for line in text.splitlines()]
    width = max(map(len, rows), default=0)
    return [[row[i] for row in rows if len(row) > i] for i in range(width)]


def ordered_alike(a: list[float], b: list[float]) -> bool:
    """Whether numbers of `a` that are 0.01 or more apart are in the same order in `b`."""
    pairs = itertools.combinations(zip(a, b), 2)
    return all((x < y) == (u < v) for (x, u), (y, v) in pairs if abs(x - y) >= 0.01)


def alike(expected: str, found: str) -> bool:
    """Whether the texts differ by no more than another CPU's sums may make them differ."""
    if DECIMAL.sub("#", expected) != DECIMAL.sub("#", found):
        return False
    pairs = list(zip(columns(expected), columns(found)))
    return all(ordered_alike(a, b) and all(abs(x - y) <= 0.02 + 0.1 * abs(x) for x, y in zip(a, b))
               for a, b in pairs)


def main(write: bool) -> int:
    os.chdir(HERE.parent)
    sys.path.insert(0, str(HERE.parent))
    torch.set_num_threads(1)                    # the same sums however many cores there are
    text, start = (HERE / "lesson.md").read_text(), time.perf_counter()
    names, wrong = {}, 0                        # the blocks' variables; how many blocks differ

    def run(block) -> str:
        """The block with the text block that holds what it printed."""
        nonlocal wrong
        line = text[:block.start(1)].count("\n")
        found, expected = printed(block[1], line, names), block[3] or ""
        if not write and not alike(expected, found):
            wrong += 1
            print(f"lesson.md, line {line + 1}: expected\n{expected}\nfound\n{found}")
        return f"```python\n{block[1]}```\n" + (f"\n```text\n{found}```\n" if found else "")

    new = BLOCK.sub(run, text)
    if write:
        (HERE / "lesson.md").write_text(new)
    print(f"lesson.md: {len(BLOCK.findall(text))} blocks, {wrong} differ, "
          f"{time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
