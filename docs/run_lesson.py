"""Runs the python blocks of lesson.md in order, and compares what they print with the text blocks behind them.

    python docs/run_lesson.py              # exit status 0: the lesson says what happens
    python docs/run_lesson.py --write      # puts what was printed into the lesson

Numbers with a decimal point may differ by a tenth (or 0.02): another CPU sums in another order. The rest may not. A block
with no text block behind it has only to run.
"""
import contextlib
import io
import os
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"```python\n(.*?)```\n(\n```text\n(.*?)```\n)?", re.S)
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")


def printed(code: str, line: int, names: dict) -> str:
    """What a block prints; its errors point at the line of lesson.md."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile("\n" * line + code, str(HERE / "lesson.md"), "exec"), names)
    return out.getvalue()


def alike(a: str, b: str) -> bool:
    numbers = zip(map(float, DECIMAL.findall(a)), map(float, DECIMAL.findall(b)))
    return (DECIMAL.sub("#", a).split() == DECIMAL.sub("#", b).split()
            and all(abs(x - y) <= 0.02 + 0.1 * max(abs(x), abs(y)) for x, y in numbers))


def main(write: bool) -> int:
    os.chdir(HERE.parent)
    sys.path.insert(0, str(HERE.parent))
    text, names, wrong, start = (HERE / "lesson.md").read_text(), {}, 0, time.perf_counter()

    def run(block) -> str:
        nonlocal wrong
        line = text[:block.start(1)].count("\n")
        found, expected = printed(block[1], line, names), block[3]
        if not write and expected is not None and not alike(found, expected):
            wrong += 1
            print(f"lesson.md, line {line + 1}: expected\n{expected}\nfound\n{found}")
        return f"```python\n{block[1]}```\n" + (f"\n```text\n{found}```\n" if found else "")
    new = BLOCK.sub(run, text)
    if write:
        (HERE / "lesson.md").write_text(new)
    print(f"lesson.md: {len(BLOCK.findall(text))} blocks, {wrong} differ, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
