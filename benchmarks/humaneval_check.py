"""Is HumanEval-X scored right here? Every canonical solution must pass, every wrong body fail.

    python benchmarks/humaneval_check.py --data-dir DIR [--languages python,cpp,go,java]

Prints a line a language and each problem that went otherwise; exit status 1 if there is one. The
verdicts stay in --out, so a stopped check goes on. Takes minutes: see the time at the end.
--kind bwrap or unshare takes that isolation in place of the first that works.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import BUNDLED_DATA
from tasks import code as humaneval
from tasks import sandbox

WRONG = {"python": "    return None\n", "cpp": "    return {};\n}\n",
         "go": '    panic("wrong")\n}\n',
         "java": '        throw new RuntimeException("wrong");\n    }\n}\n'}


def check(lang: str, right: bool, data_dir, folder: Path) -> int:
    """The number of problems whose verdict is not the one expected."""
    problems = humaneval.read_problems(data_dir, lang)
    path = folder / f"{lang}_{'right' if right else 'wrong'}.jsonl"
    bodies = {name: row["canonical_solution"] if right else WRONG[lang]
              for name, row in problems.items()}
    path.write_text("".join(json.dumps({"task_id": name, "generation": body}) + "\n"
                            for name, body in bodies.items()))
    start = time.monotonic()
    result = humaneval.score_code(path, data_dir)[lang]
    print(f"{path.stem:14} {json.dumps(result)}  {time.monotonic() - start:.0f} s", flush=True)
    if "not run" in result:
        return len(problems)
    lines = Path(f"{path}.results.jsonl").read_text().splitlines()
    verdicts = [json.loads(line) for line in lines]
    odd = [v for v in verdicts if (v["verdict"] == "passed") != right]
    for v in odd:
        print(f"  {v['task_id']}: {v['verdict']}")
    return len(odd)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=BUNDLED_DATA)
    parser.add_argument("--languages", default="python,cpp,go,java")
    parser.add_argument("--kind", choices=("bwrap", "unshare"))
    parser.add_argument("--out", type=Path, default=Path("runs/humaneval_check"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    given = lambda unsafe=False: sandbox.Box(args.kind)             # noqa: E731
    make = {"side_effect": given if args.kind else sandbox.make_box}
    with patch.object(humaneval, "make_box", **make):
        odd = sum(check(lang, right, args.data_dir, args.out)
                  for lang in args.languages.split(",") for right in (True, False))
    print(f"{odd} problems were not scored as expected")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
