"""HumanEval-X, --task rosetta: samples, the programs made of them, their verdicts, pass@k.

In order: completions (where a function ends); programs (completion and tests in one file); judge (a
program's verdict); toolchains; predictions (a file of samples, scored); the scorer's four
functions. Paper, section 4.1 and Appendix A; CodeGeeX's evaluation (Zheng et al. 2023).
"""
import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import TASKS, Row, accuracy, find_file, read_rows, texts_of
from model import LM, UserError, generate, parse_json, read_bytes, write_file
from tasks.sandbox import (SYSTEM_PATH, Box, guard, make_box, python_folders, run_sandboxed,
                           scratch)

LANGS = {"Python": "python", "CPP": "cpp", "Go": "go", "Java": "java"}      # task_id's word: folder
VENDOR = "humaneval_x/go/evaluation/vendor.tar.gz"                          # Go's assert


# ---- completions --------------------------------------------------------------------------------

# Comments and strings of a language, and its braces. What does not end goes on to the text's end (a
# string: the line's), so that every character is looked at once.
COMMENT = r"//[^\n]*|/\*.*?(?:\*/|\Z)|"
STRING = r'"(?:\\.|[^"\\\n])*"?|' + r"'(?:\\.|[^'\\\n]){1,12}'"
RAW = {"cpp": r'\b(?:u8|[uUL])?R"([^()\\\s"]{0,16})\(.*?(?:\)\1"|\Z)|', "go": r"`[^`]*(?:`|\Z)|",
       "java": r'"""(?:\\(?:.|\Z)|[^\\])*?(?:"""|\Z)|'}
TOKENS = {lang: re.compile(COMMENT + raw + r"[{}]|" + STRING, re.S) for lang, raw in RAW.items()}
# Python's comments and strings, and (empty) where a line begins with code at the margin.
MARGIN = re.compile(r'"""(?:\\(?:.|\Z)|[^\\])*?(?:"""|\Z)|' r"'''(?:\\(?:.|\Z)|[^\\])*?(?:'''|\Z)|"
                    r'"(?:\\.|[^"\\\n])*"?|' r"'(?:\\.|[^'\\\n])*'?|" r"#[^\n]*|^(?=[^\s#)\]}])",
                    re.S | re.M)
UNICODE = re.compile(r"(\\\\)|\\u+00([0-46-7][0-9a-fA-F]|5[0-9abd-fABD-F])")   # not a backslash
HELPER = re.compile(r"(?:\s|//[^\n]*\n)*func (\w+)[\[(]")


def code_of(text: str, lang: str) -> str:
    """The text with a space for each comment and string."""
    return TOKENS[lang].sub(lambda match: match[0] if match[0] in "{}" else " ", text)


def closings(text: str, lang: str, depth: int):
    """(position behind it, depth that is left) of each closing brace."""
    for match in TOKENS[lang].finditer(text):
        depth += (match[0] == "{") - (match[0] == "}")
        if match[0] == "}":
            yield match.end(), depth


def helpers_end(text: str, ends: list[int]) -> int:
    """Where the last Go helper ends that follows the function and is called before it."""
    called = set(re.findall(r"\b(\w+)[\[(]", text[:ends[0]]))
    for start, end in zip(ends, ends[1:]):
        helper = HELPER.match(text, start)
        if not helper or helper[1] not in called:
            return start
        called |= set(re.findall(r"\b(\w+)[\[(]", text[start:end]))
    return ends[-1]


def truncate_completion(text: str, lang: str) -> str:
    """The text up to the function's end (Java: its class's), with Go's helpers right behind it.
    What does not end is returned whole: closing its braces would make another program of it."""
    if lang == "python":                        # a comment or a string at the margin ends nothing
        return text[:next((match.start() for match in MARGIN.finditer(text) if not match[0]), None)]
    if lang == "java":                          # javac reads \u007d as a brace, wherever it stands
        text = UNICODE.sub(lambda match: match[1] or chr(int(match[2], 16)), text)
    closed = list(closings(text, lang, 2 if lang == "java" else 1))
    ends = [end for end, depth in closed if depth == 0]
    if ends:
        return text[:helpers_end(text, ends) if lang == "go" else ends[0]] + "\n"
    methods = [end for end, depth in closed if depth == 1 and lang == "java"]
    return text[:methods[-1]] + "\n}\n" if methods else text    # Java: its prompt's class is open


# ---- programs -----------------------------------------------------------------------------------

SOURCES = {"python": "main.py", "cpp": "main.cpp", "go": "main_test.go", "java": "Main.java"}
# What CodeGeeX's evaluation imports in front of a program; numpy too, where a program names it.
PYTHON_IMPORTS = ("math re sys copy datetime itertools collections heapq statistics functools "
                  "hashlib string").split()
PYTHON_HEAD = ("".join(f"import {name}\n" for name in PYTHON_IMPORTS)
               + "from typing import *\nfrom collections import *\n")
NUMPY = "try:\n    import numpy, numpy as np\nexcept ImportError:\n    pass\n"
CPP_HEADERS = "stdlib.h algorithm math.h stdio.h vector string climits cstring iostream".split()
# Each with a name in it: Go refuses a package that nothing uses.
GO_PACKAGES = {"math": "Abs", "strings": "Count", "fmt": "Sprint", "strconv": "Itoa", "time": "Now",
               "bytes": "Count", "regexp": "MatchString", "sort": "Ints", "math/rand": "Int",
               "crypto/md5": "New"}
# The class files are gone before the program's own code runs: it cannot read its tests in them.
LOADER = """
class ScoringLoader extends ClassLoader {
    private final java.util.Map<String, byte[]> code = new java.util.HashMap<>();
    protected Class<?> findClass(String name) throws ClassNotFoundException {
        byte[] bytes = code.remove(name);
        if (bytes == null) throw new ClassNotFoundException(name);
        return defineClass(name, bytes, 0, bytes.length);
    }
    public static void main(String[] args) throws Throwable {
        ScoringLoader loader = new ScoringLoader();
        for (java.io.File file : new java.io.File(".").listFiles()) {
            if (!file.getName().endsWith(".class")) continue;
            String name = file.getName().substring(0, file.getName().length() - 6);
            loader.code.put(name, java.nio.file.Files.readAllBytes(file.toPath()));
            file.delete();
        }
        java.lang.reflect.Method tests = loader.loadClass("Main").getDeclaredMethod(
            "main", String[].class);
        tests.setAccessible(true);
        tests.invoke(null, (Object) args);
    }
}
"""
# The tests' last statement, and before how many of their closing braces it stands.
LAST_WORD = {"python": (0, "\n__import__('os').write(1, b'%d' % ({} ^ {}))\n"),
             "cpp": (1, '\n__builtin_printf("%llu", {}ull ^ {}ull);\n'),
             "go": (1, "\nif !t.Failed() {{ println(uint64({}) ^ uint64({})) }}\n"),
             "java": (2, "\nSystem.out.println({}L ^ {}L);\n")}


def program_of(row: dict, lang: str, body: str, word: tuple = ()) -> str:
    """Prompt, completion and tests in one file, as CodeGeeX's evaluation joins them. `word`: two
    numbers, whose exclusive or the tests' last statement prints."""
    prompt, test = row["prompt"], row["test"]
    braces, statement = LAST_WORD[lang]
    if word:
        at = len(test)
        for _ in range(braces):
            at = test.rindex("}", 0, at)
        test = test[:at] + statement.format(*word) + test[at:]
    if lang == "python":
        text = prompt + body + "\n" + test
        return PYTHON_HEAD + NUMPY * bool(re.search(r"\b(np|numpy)\b", text)) + text
    if lang == "cpp":
        return cpp_program(prompt, body, test)
    if lang == "go":
        return go_program(row, body, test)
    return prompt + body + "\n" + test + LOADER


def cpp_program(prompt: str, body: str, test: str) -> str:
    """DIFFERS: the tests come before the function, which is declared in front of them, so that no
    macro of the completion changes them."""
    brace = [match.start() for match in TOKENS["cpp"].finditer(prompt) if match[0] == "{"][-1]
    head = "".join(f"#include<{name}>\n" for name in CPP_HEADERS)
    # DIFFERS: CPP/23 defines strlen(string), but its tests' strlen("x") is the C library's, so any
    # body would pass.
    test = re.sub(r'\bstrlen\((".*?")\)', r"strlen(string(\1))", test)
    function = prompt[prompt.rfind("\n", 0, brace) + 1:] + body
    return f"{head}{prompt[:brace]};\n#undef NDEBUG\n#include<assert.h>\n{test}\n{function}\n"


def go_program(row: dict, body: str, test: str) -> str:
    """DIFFERS: packages are imported where code names them. CodeGeeX's evaluation searches the
    completion alone, its comments and strings too, and Go refuses an import that nothing uses."""
    text = row["prompt"].replace(row["import"], "", 1) + body + "\n" + test
    named = re.findall(r'"([^"\n]+)"', row["test_setup"] + row["import"])
    last, code = {p: p.rsplit("/")[-1] for p in [*named, *GO_PACKAGES]}, code_of(text, "go")
    used = [p for p in last if re.search(rf"(?<![\w.]){re.escape(last[p])}\.", code)]
    return ("package main\nimport (\n" + "".join(f'"{p}"\n' for p in used) + ")\n"
            + "".join(f"var _ = {last[p]}.{GO_PACKAGES[p]}\n" for p in used if p in GO_PACKAGES)
            + text)


# ---- judge --------------------------------------------------------------------------------------

RUN_SECONDS, COMPILE_SECONDS = 15, 90
JVM = "-Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"
# The source is gone before its program starts, or is compiled: it cannot read its tests.
DRIVER = ("import os; exec(compile([open('main.py').read(), os.remove('main.py')][0], 'main.py', "
          "'exec'), dict(__name__='__main__'))")
COMPILE = {
    "python": "",
    "cpp": '{ cat main.cpp; rm main.cpp; } | g++ -w -o main -x c++ - "$@" || exit 99; ',
    "go": "go test -c -vet=off -gcflags=-lang=go1.18 -ldflags=-s -o main main_test.go && "
          "rm main_test.go || exit 99; ",
    "java": f"javac -J{JVM.replace(' ', ' -J')} -nowarn -proc:none Main.java && rm Main.java || "
            "exit 99; "}
RUN = {"python": f"{shlex.quote(sys.executable)} -I -B -c {shlex.quote(DRIVER)}", "cpp": "./main",
       "go": "./main", "java": f"java {JVM} -cp . ScoringLoader"}
# Two problems include boost/any.hpp; where it is not installed, C++17's own class stands in.
BOOST = ("if [ ! -e /usr/include/boost/any.hpp ]; then mkdir boost; set -- -std=c++17 -I.; "
         "echo '#include <any>' > boost/any.hpp; "
         "echo 'namespace boost { using namespace std; }' >> boost/any.hpp; fi; ")
# In a PID namespace /proc shows its own processes alone: after the program no more than before.
ALONE = ("set -- /proc/[0-9]*; n=$#; {}; s=$?; set -- /proc/[0-9]*; "
         "[ $s -ne 0 ] || [ $# -le $n ] || exit 98; exit $s")
ENDS = {"exit status 99": "not compiled", "exit status 98": "left a process behind",
        "exit status 137": "killed or out of time"}
WITHOUT_NUMPY = "needs numpy, which is not installed here"


def read_training(data_dir) -> list[Row]:
    """Rosetta's rows. One label a programming language: the paper's nine, after `X86-64 Assembly`
    is left out."""
    path = find_file(data_dir, TASKS["rosetta"].training)
    triples = texts_of(read_rows(path), path, ("instruction", "input", "output"))
    rows = [Row(*t, label=t[1]) for t in triples if t[1] != "X86-64 Assembly"]
    if left := len(triples) - len(rows):
        print(f"note: {path.name}: {left} rows in X86-64 Assembly left out, as in the authors' "
              f"code", file=sys.stderr)
    return rows


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k)
    (paper, Appendix A)."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def compile_command(program: str, lang: str) -> str:
    if lang != "cpp":
        return COMPILE[lang]
    included = set(re.findall(r"#\s*include\s*<(openssl|boost/any.hpp)\b", code_of(program, lang)))
    return ("set -- -std=c++11" + " -lcrypto" * ("openssl" in included) + "; "
            + BOOST * ("boost/any.hpp" in included) + COMPILE[lang])


def judge(row: dict, lang: str, body: str, box: Box, seconds: float = RUN_SECONDS,
          cancel: threading.Event | None = None) -> str:
    """"passed", or why not. Exit status 0 proves nothing, since a program may leave before its
    tests: their last statement must have said a word that did not exist when it was written.

    A program cannot read that word in its source or its class files, nor start a process that tries
    an answer, nor change its tests by a macro or a class behind the function. Not stopped, here as
    in the official evaluation: one that looks for the word in its own memory, or changes its tests
    there (Python's frames), or takes its executable apart; that calls the tests itself, or starts
    itself again, to try answers; that replaces a function of the library which the tests call, or
    handles the signal of a failed assertion; that returns an object which equals everything. Where
    Python has no ctypes, or the kernel no seccomp, processes can be started.
    """
    word = secrets.randbits(62) | 1 << 62, secrets.randbits(62)         # 19 digits, whatever comes
    program = program_of(row, lang, body, word)
    run = f"timeout -s KILL {seconds} {shlex.join(guard(fork=False))} {RUN[lang]}"
    build = compile_command(program, lang)
    seconds += COMPILE_SECONDS if build else 5
    why, output = run_sandboxed(
        ["sh", "-c", build + (run if box.kind == "none" else ALONE.format(run))],
        {SOURCES[lang]: program}, box, seconds,
        address_mb=12288 if lang in ("go", "java") else 2048, cancel=cancel)
    if not why:
        said = str(word[0] ^ word[1]) in output
        return "passed" if said else "left before the end of its tests"
    if lang == "python" and re.search("named 'numpy'|name '(np|numpy)' is not defined", output):
        return WITHOUT_NUMPY
    return ENDS.get(why, why)


# ---- toolchains ---------------------------------------------------------------------------------

TOOLS = {"python": ("python3",), "cpp": ("g++",), "go": ("go",), "java": ("javac", "java")}


def toolchain(lang: str, rows: list[dict], data_dir, kind: str, folder: Path) -> Box | str:
    """The box in which a language's programs run, or why they cannot run here."""
    found = [shutil.which(tool) for tool in TOOLS[lang]]
    if None in found:
        return f"no {TOOLS[lang][found.index(None)]} on PATH"
    if lang == "python":
        found, shown = [sys.executable], python_folders()
    else:
        found = [p if p.startswith("/usr/") else os.path.realpath(p) for p in found]
        shown = {str(Path(os.path.realpath(p)).parents[1]) for p in found}
        shown = {p for p in shown if not f"{p}/".startswith("/usr/")}
    if shown is None or any(Path.home().is_relative_to(p) for p in shown):
        return f"{found[0]} cannot be shown to a program without the home folder"
    shown |= {str(p) for p in Path("/etc").glob("java*") if lang == "java"}
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


def packages_of(rows: list[dict]) -> set[str]:
    """What the tests of Go's problems import."""
    return {p for row in rows for p in re.findall(r'"([^"\n]+)"', row["test_setup"])}


def unpack_modules(data_dir, folder: Path | None):
    """The Go modules that tests import, from the official archive; without a folder a check."""
    archive = find_file(data_dir, VENDOR)
    try:
        with tarfile.open(archive) as tar:
            if folder:
                tar.extractall(folder, filter="data")
            elif not any(name.split("/")[0] == "vendor" for name in tar.getnames()):
                raise tarfile.TarError("no folder `vendor`")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{archive}: expected the tests' Go modules as a .tar.gz ({error}); "
                        f"download it again") from None
    return archive


def prepare_go(rows: list[dict], data_dir, folder: Path, env: dict) -> str:
    """Compiles once what all tests import, to share (then 0.4 s a program, not many); "" or what is
    missing."""
    packages = sorted(packages_of(rows) | set(GO_PACKAGES))
    (folder / "path").mkdir(), (folder / "cache").mkdir()
    if any("." in p for p in packages):
        try:
            unpack_modules(data_dir, folder)
            (folder / "vendor").rename(folder / "path" / "src")     # GOPATH's name for vendor
        except (UserError, OSError) as error:
            return str(error)
    imports = "".join(f'import _ "{p}"\n' for p in packages)
    (folder / "main_test.go").write_text("package main\n" + imports)
    build = subprocess.Popen(["go", "test", "-c", "-vet=off", "-o", "none", "main_test.go"],
                             cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said = build.communicate()[0]
    finally:                                        # Ctrl-C: the compilers that it started too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(build.pid, signal.SIGKILL)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return f"go cannot build the tests' imports: {said.strip()[-200:]}" if build.returncode else ""


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


# ---- predictions --------------------------------------------------------------------------------

def read_problems(data_dir, lang: str) -> dict[str, dict]:
    path = find_file(data_dir, f"humaneval_x/{lang}/humaneval_{lang}.jsonl.gz")
    names = ("task_id", "prompt", "canonical_solution", "test")
    names += ("import", "test_setup") * (lang == "go")
    rows = [dict(zip(names, texts)) for texts in texts_of(read_rows(path), path, names)]
    word = next(word for word, folder in LANGS.items() if folder == lang)
    ids = [row["task_id"] for row in rows]
    for i, row in enumerate(rows, 1):
        opened = lang != "cpp" or "{" in code_of(row["prompt"], lang)
        if row["test"].count("}") < LAST_WORD[lang][0] or not opened or not row["test"].strip():
            raise UserError(f"{path}, row {i}: expected a function's beginning as 'prompt' and a "
                            f"program's end as 'test', as in HumanEval-X")
        if not row["task_id"].startswith(f"{word}/") or row["task_id"] in ids[:i - 1]:
            raise UserError(f"{path}, row {i}: expected a task_id as {word}/0, each once, found "
                            f"{row['task_id']!r:.60}")
    return {row["task_id"]: row for row in rows}


def read_verdicts(path: Path) -> dict[str, str]:
    """What an earlier scoring, perhaps killed in mid-line, has found; without numpy: again."""
    verdicts = {}
    for line in read_bytes(path).split(b"\n") if os.path.exists(path) else ():
        with contextlib.suppress(UserError):
            row = parse_json(line, path)
            verdict = row.get("verdict") if isinstance(row, dict) else None
            if isinstance(verdict, str) and verdict != WITHOUT_NUMPY:
                verdicts[str(row.get("key"))] = verdict
    return verdicts


def record(results: Path, line: bytes = b""):
    """Adds a line; one that a killed scoring left unfinished is closed first."""
    try:
        with open(results, "a+b") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
                file.write(b"\n")
            file.write(line)
    except OSError as error:
        raise UserError(f"{results}: expected to keep the verdicts there ({error}); copy the "
                        f"predictions to a folder with room that you may write to") from None


class Sample(NamedTuple):
    key: str                    # of the program: equal samples are run once
    lang: str
    row: dict                   # the problem
    body: str                   # the completion, cleaned up


def read_samples(path, data_dir) -> list[Sample]:
    """A file of {"task_id": "Python/0", "generation": the text after the prompt}; a problem's rows
    are its samples."""
    pairs = texts_of(read_rows(Path(path)), path, ("task_id", "generation"))
    problems, samples = {}, []
    for i, (task_id, generation) in enumerate(pairs, 1):
        lang = LANGS.get(task_id.split("/")[0])
        if not lang:
            raise UserError(f"{path}, row {i}: expected a task_id of {', '.join(LANGS)}, as "
                            f"Python/0, found {task_id!r:.60}")
        problems[lang] = problems.get(lang) or read_problems(data_dir, lang)
        if task_id not in problems[lang]:
            raise UserError(f"{path}, row {i}: no problem {task_id!r:.60} in humaneval_x/{lang} of "
                            f"{data_dir}; see --data-dir")
        row, body = problems[lang][task_id], truncate_completion(generation, lang)
        # The number is that of these rules: verdicts by earlier ones are not taken over.
        text = f"{task_id}\n2\n{program_of(row, lang, body)}"
        key = hashlib.sha256(text.encode(errors="replace")).hexdigest()
        samples.append(Sample(key, lang, row, body))
    return samples


def run_samples(samples: list[Sample], boxes: dict, workers: int):
    """(sample, verdict) of each as it ends, `workers` (0: one a core) at a time."""
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    cancel = threading.Event()
    try:
        jobs = {pool.submit(judge, s.row, s.lang, s.body, boxes[s.lang], cancel=cancel): s
                for s in samples}
        for job in tqdm(as_completed(jobs), "run programs", len(jobs), disable=None, leave=False):
            yield jobs[job], job.result()
    finally:                                        # Ctrl-C: end what runs, do not start the rest
        cancel.set()
        pool.shutdown(cancel_futures=True)


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
    if todo:
        record(results)                             # no place for verdicts: said before any is run
    kind = make_box(unsafe).kind if todo else ""
    with scratch("tools") as folder:
        boxes = {}
        for lang in dict.fromkeys(s.lang for s in todo.values()):
            rows = list({s.row["task_id"]: s.row for s in samples if s.lang == lang}.values())
            box = working_box(lang, rows, data_dir, kind, folder)
            (boxes if isinstance(box, Box) else missing)[lang] = box
        todo = [s for s in todo.values() if s.lang in boxes]
        with contextlib.closing(run_samples(todo, boxes, workers)) as judged:
            for sample, verdict in judged:
                verdicts[sample.key] = verdict
                row = {"task_id": sample.row["task_id"], "verdict": verdict, "key": sample.key}
                record(results, (json.dumps(row) + "\n").encode())
    if n := sum(verdicts.get(s.key) == WITHOUT_NUMPY for s in samples):
        print(f"note: {n} Python programs failed: numpy is not installed here", file=sys.stderr)
    return {lang: {"not run": missing[lang]} if lang in missing else
            summarize([s for s in samples if s.lang == lang], verdicts, k)
            for lang in dict.fromkeys(s.lang for s in samples)}


def summarize(samples: list[Sample], verdicts: dict, k: int) -> dict:
    """One language. k: those of 1 and 10 that the samples allow, or 1 and the one asked for."""
    right, counts = Counter(), Counter(s.row["task_id"] for s in samples)
    for s in samples:
        right[s.row["task_id"]] += verdicts[s.key] == "passed"
    n = min(counts.values())
    return {"problems": len(counts), "passed": sum(c > 0 for c in right.values()), "samples": n} | {
        f"pass@{k}": sum(pass_at_k(counts[t], right[t], k) for t in counts) / len(counts)
        for k in sorted({1, k} if k else {k for k in (1, 10) if k <= n})}


# ---- the scorer ---------------------------------------------------------------------------------

def prepare(cfg) -> list[Path]:
    """Reads every file that scoring will need, and tries the sandbox where programs are to run, so
    that nothing fails after the training; returns the files."""
    rows = {lang: list(read_problems(cfg.data_dir, lang).values()) for lang in LANGS.values()}
    files = [find_file(cfg.data_dir, f"humaneval_x/{lang}/humaneval_{lang}.jsonl.gz")
             for lang in LANGS.values()]
    if cfg.save_predictions:
        place = Path(cfg.save_predictions)
        if os.path.isdir(place) or not os.access(place.parent, os.W_OK | os.X_OK):
            raise UserError(f"--save-predictions {place}: expected a file's name in a folder that "
                            f"you may write to")
    if cfg.k > cfg.samples:
        raise UserError(f"--k {cfg.k}: expected at most --samples, which is {cfg.samples}")
    if not cfg.run_code:
        print("note: a program counts as right only if it is the canonical solution; --run-code "
              "runs the programs, each in a sandbox", file=sys.stderr)
    else:
        make_box(cfg.unsafe_no_sandbox)
        if shutil.which("go") and any("." in p for p in packages_of(rows["go"])):
            files.append(unpack_modules(cfg.data_dir, None))
    return files


def sample_code(lm: LM, tokenizer, cfg, progress: str) -> list[dict]:
    """Rows of predictions: `samples` continuations of each problem's prompt, the first `limit`
    problems of a language. Temperature 0.1 for several samples is the authors' code's."""
    problems = []
    for lang in LANGS.values():
        problems += list(read_problems(cfg.data_dir, lang).values())[:cfg.eval_limit or None]
    ids = [[tokenizer.bos] + tokenizer.encode(row["prompt"])
           for row in problems for _ in range(cfg.samples)]
    heat = (0.0 if cfg.samples == 1 else 0.1) if cfg.temperature is None else cfg.temperature
    rng = torch.Generator(lm.tok_embeddings.weight.device).manual_seed(cfg.seed)
    texts = generate(lm, ids, cfg.max_new_tokens or 512, tokenizer.ends, cfg.eval_batch, heat,
                     cfg.top_k, cfg.top_p, rng, progress=progress)
    # Decoded behind its prompt, a text keeps the spaces that it begins with.
    return [{"task_id": problems[i // cfg.samples]["task_id"],
             "generation": tokenizer.decode(prompt + text)[len(tokenizer.decode(prompt)):]}
            for i, (prompt, text) in enumerate(zip(ids, texts, strict=True))]


def score(lm: LM, tokenizer, cfg, progress: str) -> dict:
    """pass@1 over the problems that could be run. Without --run-code nothing is run: a sample is
    right only if it is the canonical solution, white space apart, less than pass@1 would say."""
    rows = sample_code(lm, tokenizer, cfg, progress)
    with scratch("samples") as folder:
        path = Path(cfg.save_predictions or folder / "samples.jsonl")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_file(path, lambda file: file.write(text.encode()))
        if not cfg.run_code:
            return compared(read_samples(path, cfg.data_dir))
        langs = score_code(path, cfg.data_dir, cfg.k, unsafe=cfg.unsafe_no_sandbox)
    ran = [r for r in langs.values() if "not run" not in r]
    if not ran:
        raise UserError("--run-code: expected to run programs of at least one language; "
                        + "; ".join(f"{lang}: {r['not run']}" for lang, r in langs.items()))
    total = sum(r["problems"] for r in ran)
    right = sum(r["pass@1"] * r["problems"] for r in ran)
    return {"correct": round(right, 4), "total": total, "accuracy": right / total,
            "metric": "pass@1", "languages": langs}


def compared(samples: list[Sample]) -> dict:
    gold = [truncate_completion(s.row["canonical_solution"], s.lang).split() for s in samples]
    return accuracy([s.body.split() for s in samples], gold) | {
        "metric": "canonical solution (programs not run: --run-code)"}


def score_predictions(cfg) -> dict:
    """Per language, as `score_code`."""
    if not cfg.run_code:
        raise UserError("--predictions of rosetta: scoring runs a model's programs; add --run-code "
                        "if that is wanted")
    return score_code(cfg.predictions, cfg.data_dir, cfg.k, unsafe=cfg.unsafe_no_sandbox)


def report(result: dict):
    if "metric" in result:
        print(f"rosetta: {result['correct']} of {result['total']} correct, accuracy "
              f"{result['accuracy']:.2%} ({result['metric']})")
    for lang, r in result.get("languages", {} if "metric" in result else result).items():
        if "not run" in r:
            print(f"{lang:8} not run: {r['not run']}")
        else:
            rates = [f"{name} {value:.2%}" for name, value in r.items() if name.startswith("pass@")]
            print(f"{lang:8} {r['passed']:4} of {r['problems']} problems passed", *rates, sep="   ")
