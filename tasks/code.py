"""HumanEval-X, --task rosetta: samples, the programs made of them, their verdicts, pass@k."""
import hashlib
import json
import math
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import fields, find_file, read_rows
from model import LM, UserError, generate
from tasks import accuracy
from tasks.sandbox import SYSTEM_PATH, Box, make_box, run_sandboxed, scratch

LANGS = {"Python": "python", "CPP": "cpp", "Go": "go", "Java": "java"}      # task_id's word: folder
TOOLS = {"python": ("python3",), "cpp": ("g++",), "go": ("go",), "java": ("javac", "java")}
SOURCES = {"python": "main.py", "cpp": "main.cpp", "go": "main_test.go", "java": "Main.java"}
RUN_SECONDS, COMPILE_SECONDS = 15, 90
JVM = "-Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"
# The source is gone before its program starts: it cannot read its tests or their last word.
DRIVER = ("import os; exec(compile([open('main.py').read(), os.remove('main.py')][0], 'main.py', "
          "'exec'), dict(__name__='__main__'))")
COMPILE = {
    "python": "",
    # Two problems include boost/any.hpp; where it is not installed, C++17's own class stands in.
    "cpp": "set -- -std=c++11; grep -q '<openssl/' main.cpp && set -- -std=c++11 -lcrypto; "
           "if grep -q '<boost/any.hpp>' main.cpp && [ ! -e /usr/include/boost/any.hpp ]; then "
           "mkdir boost; set -- -std=c++17 -I.; echo '#include <any>' > boost/any.hpp; "
           "echo 'namespace boost { using namespace std; }' >> boost/any.hpp; fi; "
           'g++ -w -o main main.cpp "$@" && rm main.cpp || exit 99; ',
    "go": "go test -c -vet=off -gcflags=-lang=go1.18 -ldflags=-s -o main main_test.go && "
          "rm main_test.go || exit 99; ",
    "java": f"javac -J{JVM.replace(' ', ' -J')} -nowarn -proc:none Main.java && rm Main.java || "
            "exit 99; "}
RUN = {"python": f"{shlex.quote(sys.executable)} -I -B -c {shlex.quote(DRIVER)}", "cpp": "./main",
       "go": "./main", "java": f"java {JVM} -cp . Main"}
# In a PID namespace /proc shows its own processes alone: after the program no more than before.
ALONE = ("set -- /proc/[0-9]*; n=$#; {}; s=$?; set -- /proc/[0-9]*; "
         "[ $s -ne 0 ] || [ $# -le $n ] || exit 98; exit $s")
ENDS = {"exit status 99": "not compiled", "exit status 98": "left a process behind",
        "exit status 137": "killed or out of time"}
# What CodeGeeX's evaluation imports in front of a program.
PYTHON_IMPORTS = ("math re sys copy datetime itertools collections heapq statistics functools "
                  "hashlib string").split()
PYTHON_HEAD = ("".join(f"import {name}\n" for name in PYTHON_IMPORTS)
               + "from typing import *\nfrom collections import *\n")
CPP_HEADERS = "stdlib.h algorithm math.h stdio.h vector string climits cstring iostream".split()
GO_PACKAGES = "math strings fmt strconv time bytes regexp sort math/rand crypto/md5".split()
# What the tests say last, and before how many of their closing braces.
LAST_WORD = {"python": (0, "\n__import__('os').write(1, b'{}')\n"),
             "cpp": (1, '\n__builtin_puts("{}");\n'),
             "go": (1, '\nif !t.Failed() {{ println("{}") }}\n'),
             "java": (2, '\nSystem.out.println("{}");\n')}
STRING = r'"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])*'"
BRACES = re.compile(r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|""".*?"""|`[^`]*`|[{}]|' + STRING, re.S)
MARGIN = re.compile(r'"""(?:\\.|[^\\])*?"""|' r"'''(?:\\.|[^\\])*?'''|#[^\n]*|"
                    r"^(?=[^\s#)\]}])|" + STRING, re.M)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k)
    (paper, section 5)."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def brace_ends(text: str, depth: int, wanted: int) -> list[int]:
    """Where a brace, not one in a comment or a string, closes down to the wanted depth."""
    ends = []
    for match in BRACES.finditer(text):
        depth += (match[0] == "{") - (match[0] == "}")
        ends += [match.end()] if match[0] == "}" and depth == wanted else []
    return ends


def truncate_completion(text: str, lang: str) -> str:
    """The text up to the function's end (Java: its class's), with Go's helpers right behind it.
    What does not end is returned whole: closing its braces would make another program of it."""
    if lang == "python":                        # a comment or a string at the margin ends nothing
        return text[:next((match.start() for match in MARGIN.finditer(text) if not match[0]), None)]
    ends = brace_ends(text, 2 if lang == "java" else 1, 0)
    if lang == "java" and not ends:             # whole methods, but the prompt's class is open
        methods = brace_ends(text, 2, 1)
        return text[:methods[-1]] + "\n}\n" if methods else text
    while lang == "go" and ends:
        helper = re.match(r"(?:\s|//[^\n]*\n)*func (\w+)\(", text[ends[0]:])
        more = brace_ends(text[ends[0]:], 0, 0)
        if not (helper and more and re.search(rf"\b{helper[1]}\(", text[:ends[0]])):
            break
        ends[0] += more[0]
    return text[:ends[0]] + "\n" if ends else text


def program_of(row: dict, lang: str, body: str) -> str:
    """Prompt, completion and tests in one file, as CodeGeeX's evaluation joins them."""
    text = row["prompt"] + body + "\n" + row["test"]
    if lang == "python":
        return PYTHON_HEAD + text
    if lang == "cpp":
        head = "".join(f"#include<{name}>\n" for name in CPP_HEADERS if name not in row["prompt"])
        # DIFFERS: CPP/23 defines strlen(string), but its tests' strlen("x") is the C library's, so
        # any body would pass.
        test = re.sub(r'\bstrlen\((".*?")\)', r'strlen(string(\1))', row["test"])
        return f"{head}{row['prompt']}{body}\n#undef NDEBUG\n#include<assert.h>\n{test}"
    if lang == "go":
        # DIFFERS: imports those packages that are used. The official list is the canonical
        # solution's, and since Go refuses an unused import, it fails programs that need fewer.
        text = text.replace(row["import"], "", 1)
        known = re.findall(r'"([^"\n]+)"', row["test_setup"] + row["import"]) + GO_PACKAGES
        code = re.sub(r"//[^\n]*", "", text)
        used = [p for p in dict.fromkeys(known) if re.search(rf"\b{p.rsplit('/')[-1]}\.", code)]
        return "package main\nimport (\n" + "".join(f'"{p}"\n' for p in used) + ")\n" + text
    return text


def judge(row: dict, lang: str, body: str, box: Box, seconds: float = RUN_SECONDS) -> str:
    """"passed", or why not. Exit status 0 proves nothing, since a program may leave before its
    tests: their last statement must have said a word that did not exist when it was written.

    Not stopped, here as in the official evaluation: a program that searches its own memory for
    that word, or returns an object that equals everything.
    """
    word, program = secrets.token_hex(16), program_of(row, lang, body)
    braces, statement = LAST_WORD[lang]
    at = len(program)
    for _ in range(braces):
        at = program.rindex("}", 0, at)
    program = program[:at] + statement.format(word) + program[at:]
    run = f"timeout -s KILL {seconds} {RUN[lang]}"
    script = COMPILE[lang] + (run if box.kind == "none" else ALONE.format(run))
    seconds += COMPILE_SECONDS if COMPILE[lang] else 5
    why, output = run_sandboxed(["sh", "-c", script], {SOURCES[lang]: program}, box, seconds,
                                address_mb=12288 if lang in ("go", "java") else 2048)
    if not why:
        return "passed" if word in output else "left before the end of its tests"
    return ENDS.get(why, why)


def toolchain(lang: str, rows: list[dict], data_dir, kind: str, folder: Path) -> Box | str:
    """The box in which a language's programs run, or why they cannot run here."""
    found = [shutil.which(tool) for tool in TOOLS[lang]]
    if None in found:
        return f"no {TOOLS[lang][found.index(None)]} on PATH"
    if lang == "python":
        found, shown = [sys.executable], {sys.prefix, sys.base_prefix}
    else:
        found = [p if p.startswith("/usr/") else os.path.realpath(p) for p in found]
        shown = {str(Path(os.path.realpath(p)).parents[1]) for p in found}
    shown = {p for p in shown if not f"{p}/".startswith("/usr/")}
    shown |= {str(p) for p in Path("/etc").glob("java*") if lang == "java"}
    if any(Path.home().is_relative_to(p) for p in shown):
        return f"{found[0]} cannot be shown to a program without the home folder"
    path = ":".join([*dict.fromkeys(os.path.dirname(p) for p in found), SYSTEM_PATH])
    env = {"PATH": path, "OPENBLAS_NUM_THREADS": "1"}
    if lang == "go":
        env |= {"GO111MODULE": "off", "GOPATH": str(folder / "path"), "GOFLAGS": "",
                "GOCACHE": str(folder / "cache"), "GOMAXPROCS": "2", "CGO_ENABLED": "0",
                "GOTOOLCHAIN": "local", "GOMEMLIMIT": "800MiB", "HOME": str(folder)}
        if why := prepare_go(rows, data_dir, folder, env):
            return why
        shown |= {env["GOPATH"], env["GOCACHE"]}
        del env["HOME"]
    return Box(kind, tuple(sorted(shown)), tuple(env.items()))


def prepare_go(rows: list[dict], data_dir, folder: Path, env: dict) -> str:
    """Compiles once what all tests import, to share (then 0.4 s a program, not many); "" or what is
    missing."""
    named = {p for row in rows for p in re.findall(r'"([^"\n]+)"', row["test_setup"])}
    packages = sorted(named | set(GO_PACKAGES))
    (folder / "path").mkdir(), (folder / "cache").mkdir()
    if any("." in p for p in packages):
        try:
            archive = find_file(data_dir, "humaneval_x/go/evaluation/vendor.tar.gz")
        except UserError as error:
            return str(error)
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            (folder / "vendor").rename(folder / "path" / "src")     # GOPATH's name for vendor
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise UserError(f"{archive}: expected the tests' Go modules as a .tar.gz ({error}); "
                            f"download it again") from None
    imports = "".join(f'import _ "{p}"\n' for p in packages)
    (folder / "main_test.go").write_text("package main\n" + imports)
    build = ["go", "test", "-c", "-vet=off", "-o", "none", "main_test.go"]
    done = subprocess.run(build, cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    if done.returncode:
        return f"go cannot build the tests' imports: {done.stdout.strip()[-200:]}"
    return ""


def read_problems(data_dir, lang: str) -> dict[str, dict]:
    path = find_file(data_dir, f"humaneval_x/{lang}/humaneval_{lang}.jsonl.gz")
    rows = read_rows(path)
    names = ("task_id", "prompt", "canonical_solution", "test")
    fields(rows, path, names + ("import", "test_setup") * (lang == "go"))
    return {row["task_id"]: row for row in rows}


def read_verdicts(path: Path) -> dict[str, str]:
    """What an earlier scoring, perhaps killed in mid-line, has found."""
    verdicts = {}
    for line in path.read_text(errors="replace").split("\n") if path.exists() else ():
        try:
            row = json.loads(line)
            verdicts[row["key"]] = row["verdict"]
        except (ValueError, KeyError, TypeError):
            pass
    return verdicts


class Sample(NamedTuple):
    key: str                    # of the program: equal samples are run once
    lang: str
    row: dict                   # the problem
    body: str                   # the completion, cleaned up


def read_samples(path, data_dir) -> list[Sample]:
    """A file of {"task_id": "Python/0", "generation": the text after the prompt}; a problem's rows
    are its samples."""
    pairs = fields(read_rows(Path(path)), path, ("task_id", "generation"))
    problems, samples = {}, []
    for i, (task_id, generation) in enumerate(pairs, 1):
        lang = LANGS.get(task_id.split("/")[0])
        if not lang:
            raise UserError(f"{path}, row {i}: expected a task_id of {', '.join(LANGS)}, as "
                            f"Python/0, found {task_id!r}")
        problems[lang] = problems.get(lang) or read_problems(data_dir, lang)
        if task_id not in problems[lang]:
            raise UserError(f"{path}, row {i}: no problem {task_id!r} in humaneval_x/{lang} of "
                            f"{data_dir}; see --data-dir")
        row, body = problems[lang][task_id], truncate_completion(generation, lang)
        text = f"{task_id}\n{program_of(row, lang, body)}"
        key = hashlib.sha256(text.encode(errors="replace")).hexdigest()
        samples.append(Sample(key, lang, row, body))
    return samples


def score_code(predictions, data_dir, k: int = 0, workers: int = 0, unsafe: bool = False) -> dict:
    """Runs every sample: {language: {"problems", "passed" (by any sample), "samples", "pass@1" …}
    or {"not run": why}}.

    Verdicts go to PREDICTIONS.results.jsonl as they come, and a stopped scoring goes on from there.
    """
    samples, results = read_samples(predictions, data_dir), Path(f"{predictions}.results.jsonl")
    counts = Counter(sample.row["task_id"] for sample in samples)
    for task_id, n in counts.items():
        if n < k:
            raise UserError(f"--k {k}: expected that many samples of each problem, {task_id} has "
                            f"{n}; choose 1..{n}")
    verdicts = read_verdicts(results)
    todo, missing = {s.key: s for s in samples if s.key not in verdicts}, {}
    kind = make_box(unsafe).kind if todo else ""
    with scratch("tools") as folder:
        boxes = {}
        for lang in dict.fromkeys(s.lang for s in todo.values()):
            rows = list({s.row["task_id"]: s.row for s in samples if s.lang == lang}.values())
            box = working_box(lang, rows, data_dir, kind, folder)
            (boxes if isinstance(box, Box) else missing)[lang] = box
        todo = [s for s in todo.values() if s.lang in boxes]
        for sample, verdict in run_samples(todo, boxes, workers):
            verdicts[sample.key] = verdict
            append(results, {"task_id": sample.row["task_id"], "verdict": verdict,
                             "key": sample.key})
    return {lang: {"not run": missing[lang]} if lang in missing else
            summarize([s for s in samples if s.lang == lang], verdicts, k)
            for lang in dict.fromkeys(s.lang for s in samples)}


def working_box(lang: str, rows: list[dict], data_dir, kind: str, folder: Path) -> Box | str:
    """The toolchain's box, seen to work: a machine without it, or libcrypto, must not score 0."""
    box = toolchain(lang, rows, data_dir, kind, folder)
    if not isinstance(box, Box):
        return box
    for row in rows[:1] + [row for row in rows[1:] if "<openssl/" in row["prompt"]]:
        if (verdict := judge(row, lang, row["canonical_solution"], box)) != "passed":
            return (f"{row['task_id']}'s own solution does not pass here ({verdict}); is the "
                    f"toolchain complete?")
    return box


def run_samples(samples: list[Sample], boxes: dict, workers: int):
    """(sample, verdict) of each as it ends, `workers` (0: one a core) at a time."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            jobs = {pool.submit(judge, s.row, s.lang, s.body, boxes[s.lang]): s for s in samples}
            done = as_completed(jobs)
            for job in tqdm(done, "run programs", len(jobs), disable=None, leave=False):
                yield jobs[job], job.result()
        finally:                                    # Ctrl-C: do not start the rest
            pool.shutdown(wait=False, cancel_futures=True)


def append(path: Path, row: dict):
    """One line more; a line that a killed scoring left unfinished is closed first."""
    whole = not path.exists() or not path.stat().st_size or path.read_bytes()[-1:] == b"\n"
    with open(path, "a") as file:
        file.write("\n" * (not whole) + json.dumps(row) + "\n")


def summarize(samples: list[Sample], verdicts: dict, k: int) -> dict:
    """One language. k: those of 1 and 10 that the samples allow, or 1 and the one asked for."""
    right, counts = Counter(), Counter(s.row["task_id"] for s in samples)
    for s in samples:
        right[s.row["task_id"]] += verdicts[s.key] == "passed"
    n = min(counts.values())
    return {"problems": len(counts), "passed": sum(c > 0 for c in right.values()), "samples": n} | {
        f"pass@{k}": sum(pass_at_k(counts[t], right[t], k) for t in counts) / len(counts)
        for k in sorted({1, k} if k else {k for k in (1, 10) if k <= n})}


def sample_code(lm: LM, tokenizer, opts, progress: str) -> list[dict]:
    """Rows of predictions: `samples` continuations of each problem's prompt, the first `limit`
    problems of a language."""
    problems = []
    for lang in LANGS.values():
        problems += list(read_problems(opts.data_dir, lang).values())[:opts.limit or None]
    ids = [[tokenizer.bos] + tokenizer.encode(row["prompt"])
           for row in problems for _ in range(opts.samples)]
    heat = (0.0 if opts.samples == 1 else 0.1) if opts.temperature is None else opts.temperature
    rng = torch.Generator(lm.tok_embeddings.weight.device).manual_seed(opts.seed)
    texts = generate(lm, ids, opts.max_new_tokens or 512, tokenizer.eos, opts.batch_size, heat,
                     opts.top_k, opts.top_p, rng, progress=progress)
    # Decoded behind its prompt, a text keeps the spaces that it begins with.
    return [{"task_id": problems[i // opts.samples]["task_id"],
             "generation": tokenizer.decode(prompt + text)[len(tokenizer.decode(prompt)):]}
            for i, (prompt, text) in enumerate(zip(ids, texts, strict=True))]


def score_rosetta(lm: LM, tokenizer, opts, progress: str) -> dict:
    """pass@1 over the problems that could be run. Without --run-code nothing is run: a sample is
    right only if it is the canonical solution, white space apart, less than pass@1 would say."""
    rows = sample_code(lm, tokenizer, opts, progress)
    with scratch("samples") as folder:
        path = Path(opts.save_predictions or folder / "samples.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if opts.run_code:
            langs = score_code(path, opts.data_dir, opts.k, unsafe=opts.unsafe_no_sandbox)
            ran = [r for r in langs.values() if "not run" not in r]
            total = sum(r["problems"] for r in ran)
            right = sum(r["pass@1"] * r["problems"] for r in ran)
            return {"correct": round(right, 4), "total": total, "accuracy": right / max(total, 1),
                    "metric": "pass@1", "languages": langs}
        samples = read_samples(path, opts.data_dir)
    gold = [truncate_completion(s.row["canonical_solution"], s.lang).split() for s in samples]
    return accuracy([s.body.split() for s in samples], gold) | {
        "metric": "canonical solution (programs not run: --run-code)"}


def print_languages(result: dict):
    for lang, r in result.items():
        if "not run" in r:
            print(f"{lang:8} not run: {r['not run']}")
        else:
            rates = [f"{name} {value:.2%}" for name, value in r.items() if name.startswith("pass@")]
            print(f"{lang:8} {r['passed']:4} of {r['problems']} problems passed", *rates, sep="   ")
