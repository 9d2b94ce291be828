"""HumanEval-X: completions, programs and their verdicts, pass@k; the sandbox and attacks on it."""
import contextlib
import gzip
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import model
from tasks import code as humaneval
from tasks import sandbox
from tests.common import BUNDLED_TOKENIZER, HERE, Skip, folder, refused, tiny_lm

BUNDLED_DATA = HERE / "tiny" / "data"
ONE = {"task_id": "Python/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
       "test": "assert f() == 1\n"}


def code_cfg(path, **changes):
    return SimpleNamespace(**{
        "data_dir": path, "eval_limit": 0, "eval_batch": 0, "max_new_tokens": 4, "k": 0,
        "temperature": None, "top_k": 40, "top_p": 0.75, "samples": 1, "seed": 0, "run_code": True,
        "unsafe_no_sandbox": False, "save_predictions": None, "predictions": None} | changes)


# ---- completions and programs -------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    # kills: 1 - (1 - c/n)^k; C(n, k) with n - c in its place
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            expected = sum(map(any, draws)) / len(draws)
            assert math.isclose(humaneval.pass_at_k(n, c, k), expected, abs_tol=1e-12), (n, c, k)


def test_completions_end_where_their_function_does():
    # kills: the last brace; braces in strings and comments; a comment at the margin; closing what
    # is open; a helper that nothing calls; javac's \u007d not seen; a text block's escaped quotes
    cut = humaneval.truncate_completion
    body = "    x = '''\nnot the end\n'''\n# nor this\n    return x\n"
    assert cut(body + "\nprint(f())\n", "python") == body + "\n"
    assert cut(body + "def g():\n    pass\n", "python") == body
    for lang in ("cpp", "go"):
        body = '    if (a) { s = "}}"; } // }\n    /* } */ c = \'}\';\n    return s;\n}'
        assert cut(body + "\nint main() { }\n", lang) == body + "\n", lang
        assert cut("    if (a) {\n    return 1;\n", lang) == "    if (a) {\n    return 1;\n", lang
        assert cut("    return 1; /* }", lang) == "    return 1; /* }", lang
    raw = '    s = R"x(} )" } )x"; t = u8R"({)";\n}'
    assert cut(raw + "\n}\n", "cpp") == raw + "\n"
    helper = "    return g(1) + h[int](2)\n}\n\nfunc g(x int) int {\n    return k(x)\n}\n" + (
        "// one more\nfunc h[T any](x T) T {\n    return x\n}\n"
        "func k(x int) int {\n    return x\n}")
    for tail in ("\n\nfunc main() {\n}\n", "\n\ntype T struct {\n}\n"):
        assert cut(helper + tail, "go") == helper + "\n", tail
    whole = "        return g();\n    }\n    int g() { return 1; }\n}"
    assert cut(whole + "\nclass Other { }\n", "java") == whole + "\n"
    opened = "        return 1;\n    }\n"
    assert cut(opened + "    int g() {", "java") == opened.rstrip() + "\n}\n"
    assert cut("        while (true) {\n", "java") == "        while (true) {\n"
    assert cut(opened + "\\u007d class Arrays { }\n", "java") == opened + "}\n"
    assert cut(opened + '// "\\\\u007d"\n}}', "java") == opened + '// "\\\\u007d"\n}\n'
    block = '        s = """\n\\""" } \\""" """;\n    }\n}'
    assert cut(block + "}", "java") == block + "\n"


def test_a_completion_is_read_once_however_much_it_opens():
    # kills: what does not end tried again from each place (20,000 of `R"(` took three seconds)
    n = 20_000
    parts = ['R"(', 'R"x(', "/* ", "/*/", '"""', "'''", "`", '"\\', "'", "'\\", '"\\"', '\\"""',
             "{", "}", "R", 'R"', "//", "#", "\n", "\\u007b", "\\u", "\\\\", "f(", "func f("]
    helpers = "}\n" + "".join(f"func f{i}() {{ f{i + 1}() }}\n" for i in range(3 * n))
    texts = [part * n for part in parts] + ["    f0()\n" + helpers, '"""' + '\\"""' * n + "\\"]
    for text in texts:
        for lang in humaneval.LANGS.values():
            start = time.process_time()
            humaneval.truncate_completion(text, lang)
            assert time.process_time() - start < 2, (lang, text[:9])
    assert humaneval.truncate_completion(texts[-2], "go").count("func") == 3 * n


def test_go_imports_what_code_uses():
    # kills: the official list alone; a package named in a comment or a string imported; a package
    # that only a variable of its name hides imported without a use
    row = {"task_id": "Go/0", "import": 'import (\n    "math"\n)',
           "prompt": 'import (\n    "math"\n)\n// by math.Abs\nfunc F() int {\n',
           "test_setup": 'package main\n\nimport (\n    "testing"\n    "time"\n)\n',
           "test": "func TestF(t *testing.T) {\n}\n"}
    body = '    a := "sort.Ints" + `fmt.Sprint` // bytes.Count\n    x.regexp.y()\n'
    program = humaneval.program_of(row, "go", body + "    return strings.Count(s, t)\n}\n")
    head = program.partition(")\n")[0]
    assert re.findall(r'"(\S+)"', head) == ["testing", "strings"], program
    assert "var _ = strings.Count\n" in program


def test_a_cpp_programs_headers_and_flags_are_those_of_its_code():
    # kills: a header left out since a comment names it; libcrypto linked for a comment
    prompt = "/* a vector, <openssl/md5.h> */\n#include<stdio.h>\nint f(int a){\n    // {\n"
    row = {"prompt": prompt, "test": "int main(){\n    assert (f(1));\n}\n"}
    program = humaneval.program_of(row, "cpp", '    puts("#include <boost/any.hpp>");\n}\n', (6, 5))
    for name in ("vector", "string", "stdio.h"):
        assert f"#include<{name}>" in program.partition("/*")[0], name
    build = humaneval.compile_command(program, "cpp")
    assert "-std=c++11" in build and "crypto" not in build and "boost" not in build
    assert "-lcrypto" in humaneval.compile_command("#include <openssl/md5.h>\n" + program, "cpp")
    places = [program.index(part) for part in ("int f(int a);", "6ull ^ 5ull", "int f(int a){")]
    assert places == sorted(places), program


# ---- judged programs ----------------------------------------------------------------------------

# One small problem a language, whose comments name headers and packages that it does not use.
CPP = {"task_id": "CPP/0", "canonical_solution": "    return a + 1;\n}\n",
       "prompt": "/* no vector, no <openssl/md5.h>, no <boost/any.hpp> */\nusing namespace std;\n"
                 "int f(int a){\n",
       "test": "#undef NDEBUG\n#include<assert.h>\n"
               "bool same(int a, int b){\n    return a == b;\n}\n"
               "int main(){\n    assert (same(f(1), 2));\n    assert (f(5) == 6);\n}\n"}
GO = {"task_id": "Go/0", "canonical_solution": "    return a + 1\n}\n",
      "prompt": "\n// no strings.Count\nfunc F(a int) int {\n", "import": "",
      "test_setup": 'package main\n\nimport (\n    "testing"\n)\n',
      "test": "func TestF(t *testing.T) {\n    if F(1) != 2 || F(5) != 6 {\n        "
              't.Fatal("wrong")\n    }\n}\n'}
JAVA = {"task_id": "Java/0", "canonical_solution": "        return a + 1;\n    }\n}\n",
        "prompt": "import java.util.*;\nimport java.lang.*;\n\nclass Solution {\n"
                  "    public int f(int a) {\n",
        "test": "public class Main {\n    public static void main(String[] args) {\n        "
                "Solution s = new Solution();\n        List<Boolean> correct = Arrays.asList("
                "s.f(1) == 2, s.f(5) == 6);\n        if (correct.contains(false)) {\n            "
                "throw new AssertionError();\n        }\n    }\n}\n"}
PYTHON = {"task_id": "Python/0", "prompt": "def f(a):\n",
          "canonical_solution": "    return a + 1\n",
          "test": "assert f(1) == 2\nassert f(5) == 6\n"}
RIGHT = {"Python/0": {
    "canonical": PYTHON["canonical_solution"],
    "prints 2 MB": "    print('x' * 1000000)\n    return a + 1\n",
    "prints at exit": "    import atexit\n    atexit.register(print, 'y' * 20000)\n"
                      "    return a + 1\n",
    "takes numpy for granted": "    return int(np.sum(numpy.array([a, 1])))\n",
    "uses threads": "    from concurrent.futures import ThreadPoolExecutor as Pool\n"
                    "    return sum(Pool(3).map(int, [a, 1]))\n"},
    "CPP/0": {
    "canonical": CPP["canonical_solution"],
    "uses vector": "    vector<int> v(a);\n    return v.size() + 1;\n}\n",
    "prints when it ends": "    static struct S { ~S() { cout << string(50000, 'x'); } } s;\n"
                           "    cout << string(50000, 'x');\n    return a + 1;\n}\n",
    "has a macro": "#define inc(x) ((x) + 1)\n    return inc(a);\n}\n"},
    "Go/0": {
    "canonical": GO["canonical_solution"],
    "names packages in text": '    s := "sort.Ints" // bytes.Count\n    return a + len(s) - 8\n}\n',
    "hides a package": "    time := struct{ Unix int }{a}\n    return time.Unix + 1\n}\n",
    "has a helper": "    return inc(a)\n}\n\nfunc inc(x int) int {\n    return x + 1\n}\n"},
    "Java/0": {
    "canonical": JAVA["canonical_solution"],
    "prints a lot": '        for (int i = 0; i < 9999; i++) System.out.println("}" + i);\n'
                    "        return a + 1;\n    }\n}\n",
    "has inner classes": "        return new Inc().by.applyAsInt(a);\n    }\n"
                         "    static class Inc {\n        "
                         "java.util.function.IntUnaryOperator by = x -> x + 1;\n    }\n}\n",
    "writes a brace as \\u007d": '        return a + "\\u007d".length();\n    }\n}\n'}}
ORACLE = """
    import os, ctypes
    for guess in range(9):
        pid = {}()
        if pid == 0: return guess
        if pid > 0 and os.waitpid(pid, 0)[1] == 0: os._exit(0)
"""
CPP_ORACLE = """
    int waitpid(int, int *, int) asm("waitpid");
    for (int guess = 0, status; guess < 9; guess++) {
        int pid = __builtin_fork();
        if (!pid) return guess;
        if (pid > 0 && waitpid(pid, &status, 0) == pid && !status) _Exit(0);
    }
    return 0;
}
"""
CPP_READS_ITSELF = """
    FILE *file = fopen("/proc/self/exe", "rb");
    string run;
    for (int c; (c = fgetc(file)) != EOF;) {
        if (isxdigit(c)) { run += (char)c; continue; }
        if (run.size() > 18) puts(run.c_str());
        run = "";
    }
    exit(0);
}
"""
# Prints every number of 64 bits and every text in every class file, in whatever place it is.
JAVA_READS_ITSELF = """
        try {
            List<java.io.InputStream> all = new ArrayList<>();
            for (java.io.File file : new java.io.File(".").listFiles())
                if (file.isFile()) all.add(new java.io.FileInputStream(file));
            for (ClassLoader loader : new ClassLoader[] {getClass().getClassLoader(),
                                                         ClassLoader.getSystemClassLoader()})
                all.add(loader.getResourceAsStream("Main.class"));
            all.add(getClass().getResourceAsStream("Main.class"));
            String texts = "";
            for (java.io.InputStream in : all) {
                if (in == null) continue;
                byte[] bytes = in.readAllBytes();
                texts += new String(bytes, "ISO-8859-1").replaceAll("[^0-9a-f]+", " ");
                for (int i = 0; i + 8 <= bytes.length; i++)
                    System.out.println(java.nio.ByteBuffer.wrap(bytes).getLong(i));
            }
            System.out.println(texts);
        } catch (Exception error) { }
        System.exit(0);
        return 0;
    }
}
"""
JAVA_SHADOWS = """        return 0;
    }
\\u007d
class Arrays \\u007b
    static List<Boolean> asList(Object... o) {
        return java.util.Collections.emptyList();
    }
"""
WRONG = {"Python/0": {
    "no answer": "    return None\n", "leaves before its tests": "    import os; os._exit(0)\n",
    "an oracle by fork": ORACLE.format("os.fork"),
    "an oracle by the C library's fork": ORACLE.format("ctypes.CDLL(None).fork")},
    "CPP/0": {
    "no answer": "    return 0;\n}\n", "an oracle by fork": CPP_ORACLE,
    "a macro behind the body": "    return 0;\n#define f(x) ((x) + 1)\n}\n",
    "a macro behind a digraph": "    return 0;\n%>\n#define f(x) ((x) + 1)\n",
    "the word in its executable": CPP_READS_ITSELF},
    "Go/0": {"no answer": '    panic("wrong")\n}\n'},
    "Java/0": {
    "no answer": "        throw new RuntimeException();\n    }\n}\n",
    "the word in its class files": JAVA_READS_ITSELF, "a class behind the body": JAVA_SHADOWS}}


def problems_in(path: Path, *rows: dict) -> Path:
    """A data folder with these problems: a file for each language, in the official format."""
    for lang in humaneval.LANGS.values():
        own = [row for row in rows if humaneval.LANGS[row["task_id"].split("/")[0]] == lang]
        file = path / "humaneval_x" / lang / f"humaneval_{lang}.jsonl.gz"
        if own:
            file.parent.mkdir(parents=True)
            file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in own).encode()))
    return path


def samples_in(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
    (path / "samples.jsonl").write_text("".join(lines))
    return path / "samples.jsonl"


def boxes() -> list:
    """Python's box in every isolation that works here."""
    kinds = [kind for kind in ("bwrap", "unshare") if shutil.which(kind)
             and not sandbox.run_sandboxed(["true"], {}, sandbox.Box(kind))[0]]
    if not kinds:
        raise Skip("neither bwrap nor unshare works here")
    return [humaneval.toolchain("python", [], None, kind, None) for kind in kinds]


def test_right_programs_pass_and_wrong_ones_fail():
    # kills: the last word before the tests; the output's last 10,000 bytes alone; no numpy; the
    # prompt's comments read as headers; a variable's name as a package; C++ tests behind the body;
    # guard left out of the run; the word as text in an executable; class files left in the folder;
    # \u007d not read
    boxes()
    with folder() as path:
        problems_in(path, PYTHON, CPP, GO, JAVA)
        programs = [(task, name, body, group is RIGHT) for group in (RIGHT, WRONG)
                    for task, bodies in group.items() for name, body in bodies.items()]
        rows = [{"task_id": task, "generation": body} for task, _, body, _ in programs]
        samples = samples_in(path, rows)
        with contextlib.redirect_stderr(io.StringIO()):
            result = humaneval.score_code(samples, path)
        verdicts = humaneval.read_verdicts(Path(f"{samples}.results.jsonl"))
        keys = [sample.key for sample in humaneval.read_samples(samples, path)]
    missing = {lang: r["not run"] for lang, r in result.items() if "not run" in r}
    assert not any("own solution" in why for why in missing.values()), missing
    for key, (task, name, _, right) in zip(keys, programs, strict=True):
        if humaneval.LANGS[task.split("/")[0]] in missing:
            continue
        verdict = verdicts[key]
        assert (verdict == "passed") == right, f"{task}, {name}: {verdict}"
    if missing:
        raise Skip("; ".join(f"{lang}: {why}" for lang, why in missing.items()))


def test_bundled_problems_pass_with_their_own_solutions():
    # kills: tests not joined to the program; a language's own solution cut
    boxes()
    with folder() as path:
        rows = []
        for word, lang in humaneval.LANGS.items():
            row = humaneval.read_problems(BUNDLED_DATA, lang)[f"{word}/1"]
            rows.append({"task_id": row["task_id"], "generation": row["canonical_solution"]})
        tools = {**humaneval.TOOLS, "go": ("no such tool",)}       # Go: in the test above
        with patch.object(humaneval, "TOOLS", tools):
            result = humaneval.score_code(samples_in(path, rows), BUNDLED_DATA)
    assert result.pop("go") == {"not run": "no no such tool on PATH"}
    ran = {lang: r for lang, r in result.items() if "not run" not in r}
    expected = {"problems": 1, "passed": 1, "samples": 1, "pass@1": 1.0}
    assert "python" in ran and all(r == expected for r in ran.values()), result


def test_a_program_that_needs_numpy_is_told_apart_where_it_is_absent():
    # kills: "exit status 1" for want of numpy; such a verdict kept when numpy may be there
    boxes()
    with folder() as path:
        problems_in(path, ONE)
        body = "    # np\n    import numpy\n    return 1\n"
        samples = samples_in(path, [{"task_id": "Python/0", "generation": body}])
        without = "import sys\nsys.path = [p for p in sys.path if 'packages' not in p]\n"
        with patch.object(humaneval, "PYTHON_HEAD", without + humaneval.PYTHON_HEAD), \
                contextlib.redirect_stderr(io.StringIO()) as said:
            for _ in range(2):
                humaneval.score_code(samples, path)
        results = Path(f"{samples}.results.jsonl").read_text()
        assert results.count("needs numpy") == 2 and "note: 1 Python" in said.getvalue(), results
        text = "    return 1  # np\n"
        with patch.object(humaneval, "NUMPY", without + humaneval.NUMPY):
            box = boxes()[0]
            assert humaneval.judge(ONE, "python", text, box) == "passed", "a comment needs nothing"


def test_a_judged_programs_docstring_names_what_is_not_stopped():
    # kills: a claim that all is stopped
    text = " ".join(humaneval.judge.__doc__.split())
    for words in ("its own memory", "its executable apart", "calls the tests itself",
                  "function of the library", "equals everything", "no seccomp"):
        assert words in text.partition("Not stopped")[2], words


def test_bundled_problems_refuse_a_constant_an_argument_and_what_is_left_out():
    # kills: six random cases alone, of which two problems expect 0 or false throughout
    found = {lang: humaneval.read_problems(BUNDLED_DATA, lang) for lang in humaneval.LANGS.values()}
    for name, row in found["python"].items():
        def passes(body, row=row):
            try:
                exec(row["prompt"] + body + "\n" + row["test"], {})     # our own: no sandbox
                return True
            except (AssertionError, TypeError):
                return False
        first, right = re.search(r"\((\w+)", row["prompt"])[1], row["canonical_solution"]
        wrong = [first, f"bool({first})", f"len({first})", "None",
                 *re.findall("== (.*)", row["test"])]
        wrong = [f"    return {body}\n" for body in wrong]
        wrong += [body for word in ("True", "False")
                  if (body := re.sub("if .*:", f"if {word}:", right)) != right]
        wrong += [right.replace(" % 10\n", "\n")] if "total % 10\n" in right else []
        if " and " in right and right.count("\n") == 1:     # less one of two conditions
            whole = right.strip()[7:]
            wrong += [f"    return {part}\n" for part in whole.split(" and ")
                      if any(eval(part) != eval(whole) for n in range(41))]
        assert passes(right) and not any(map(passes, wrong)), name
        told = {lang: re.findall("[!=]= (\\w+)", found[lang][name.replace("Python", word)]
                                 ["test"].lower()) for word, lang in humaneval.LANGS.items()}
        assert told["cpp"] == told["go"] == told["java"] == told["python"], (name, told)


# ---- predictions and the scorer -----------------------------------------------------------------

def test_scoring_goes_on_where_it_was_stopped():
    # kills: verdicts by row number; a half-written line read as the end; a line that is no verdict
    # as a traceback
    boxes()
    right, wrong = ({"task_id": "Python/0", "generation": f"    return {n}\n"} for n in (1, 2))
    with folder() as path:
        samples, judged = samples_in(problems_in(path, ONE), [right, wrong, right]), []
        first = humaneval.score_code(samples, path)
        assert first == {"python": {"problems": 1, "passed": 1, "samples": 3, "pass@1": 2 / 3}}
        results = Path(f"{samples}.results.jsonl")
        lines = results.read_text().splitlines()
        assert len(lines) == 2                                          # equal ones are run once
        odd = "\n".join(["[]", "3", '{"key": []}', 20000 * "[", '{"verdict": "passed"}'])
        results.write_text(odd + "\n" + lines[0] + "\n" + lines[1][:20])
        real = humaneval.judge

        def noted(*given, **named):
            judged.append(given[2])
            return real(*given, **named)
        with patch.object(humaneval, "judge", noted):
            for _ in range(2):                          # the probe, and what was lost; then nothing
                assert humaneval.score_code(samples, path) == first and len(judged) == 2
        results.unlink()
        results.mkdir()
        refused(lambda: humaneval.score_code(samples, path), results)


def test_a_language_without_its_tools_is_not_run():
    # kills: 0 for it; 0 for all where no language could be run
    boxes()
    with folder() as path:
        samples = samples_in(problems_in(path, ONE), [{"task_id": "Python/0", "generation": "x"}])
        which = shutil.which
        with patch.object(shutil, "which", lambda name: None if name in (
                "python3", "g++", "go", "javac") else which(name)):
            found = humaneval.score_code(samples, path)
            assert found == {"python": {"not run": "no python3 on PATH"}}
            with contextlib.redirect_stdout(io.StringIO()) as said:
                humaneval.report(found)
            assert said.getvalue() == "python   not run: no python3 on PATH\n"
            cfg = code_cfg(BUNDLED_DATA, eval_limit=1)
            refused(lambda: humaneval.score(lm(), tokenizer(), cfg, "x"), "--run-code", "no go on")


def test_mistakes_in_code_predictions_are_one_line_each():
    # kills: any of the checks; a file without rows as 0 %
    good = {"task_id": "Python/0", "generation": ""}
    for lines, k, words in (([good, {**good, "task_id": "Rust/0"}], 0, ("row 2", "Rust/0", "Java")),
                            ([good, {**good, "task_id": "Python/9"}], 0, ("row 2", "Python/9")),
                            ([good, "{\n"], 0, ("samples.jsonl, line 2",)),
                            ([{"task_id": 3}], 0, ("row 1", "task_id")),
                            ([{**good, "generation": 3}], 0, ("row 1", "generation")),
                            ([good], 2, ("--k 2", "Python/0", "1")), ([], 0, ("no rows",)),
                            (["\n"], 0, ("samples.jsonl", "no rows"))):
        with folder() as path:
            samples = samples_in(problems_in(path, ONE), lines)
            cfg = code_cfg(path, predictions=samples, k=k)
            refused(lambda: humaneval.score_predictions(cfg), *words)
    with folder() as path:
        samples = samples_in(problems_in(path, ONE), [good])
        cfg = code_cfg(path, predictions=samples)
        refused(lambda: humaneval.score_predictions(
            code_cfg(path, predictions=samples, run_code=False)), "--run-code")
        (path / "humaneval_x/python/humaneval_python.jsonl.gz").write_bytes(b"no archive")
        refused(lambda: humaneval.score_predictions(cfg), "humaneval_python.jsonl.gz")


def tokenizer():
    return model.Tokenizer(BUNDLED_TOKENIZER)


def lm():
    return tiny_lm(vocab_size=1024)


def test_every_file_is_read_and_the_sandbox_tried_before_they_are_needed():
    # kills: prepare that finds files without reading them; a language, the sandbox, Go's modules,
    # or the place of the samples forgotten; Go's modules asked for where nothing is run
    go = {**GO, "test_setup": GO["test_setup"].replace(
        '"testing"', '"testing"\n    "github.com/stretchr/testify/assert"')}
    with folder() as path, patch.object(shutil, "which", lambda name: None):
        problems_in(path, PYTHON, CPP, go, JAVA)
        quietly = code_cfg(path, run_code=False)
        found = humaneval.prepare(quietly)
        assert [p.name for p in found] == [f"humaneval_{lang}.jsonl.gz" for lang in
                                           ("python", "cpp", "go", "java")]
        refused(lambda: humaneval.prepare(code_cfg(path)), "bwrap", "--unsafe-no-sandbox")
        cfg = code_cfg(path, unsafe_no_sandbox=True)
        with contextlib.redirect_stderr(io.StringIO()):
            assert humaneval.prepare(cfg) == found, "no go here: its modules are not needed"
        archive = path / humaneval.VENDOR
        archive.parent.mkdir()
        archive.write_bytes(b"no archive")
        humaneval.prepare(quietly)
        with patch.object(shutil, "which", lambda name: "/bin/go" if name == "go" else None):
            refused(lambda: humaneval.prepare(cfg), archive)
            with tarfile.open(archive, "w:gz") as tar:
                tar.addfile(tarfile.TarInfo("vendor/a.go"))
            with contextlib.redirect_stderr(io.StringIO()):
                assert humaneval.prepare(cfg) == [*found, archive]
        refused(lambda: humaneval.prepare(code_cfg(path, k=2)), "--k 2", "--samples")
        for place in (path, path / "absent" / "s.jsonl"):
            wrong = code_cfg(path, run_code=False, save_predictions=str(place))
            refused(lambda: humaneval.prepare(wrong), "--save-predictions", place)
        for lang, row in (("java", JAVA), ("cpp", CPP), ("go", go)):
            file = path / f"humaneval_x/{lang}/humaneval_{lang}.jsonl.gz"
            good = file.read_bytes()
            for content in (b"", b"junk", gzip.compress(b""), gzip.compress(b"{}"), gzip.compress(
                    json.dumps(row | {"test": "", "prompt": ""}).encode())):
                file.write_bytes(content)
                refused(lambda: humaneval.prepare(quietly), file)
            file.write_bytes(good)


def test_problems_stand_once_under_their_languages_name_and_have_tests():
    # kills: of two problems with one task_id the last taken; another language's found out when its
    # samples are scored; a program without tests, which any body passes
    with folder() as path:
        problems_in(path, PYTHON)
        file = path / "humaneval_x/python/humaneval_python.jsonl.gz"
        for odd, word in ((PYTHON, "once"), (PYTHON | {"task_id": "CPP/0"}, "CPP/0"),
                          (PYTHON | {"task_id": "Python"}, "Python/0"),
                          (PYTHON | {"task_id": "Python/1", "test": " \n"}, "test")):
            file.write_bytes(gzip.compress("\n".join(map(json.dumps, (PYTHON, odd))).encode()))
            refused(lambda: humaneval.read_problems(path, "python"), file, "row 2", word)


def test_a_model_is_sampled_and_its_programs_are_scored():
    # kills: a text cut short at its spaces; --eval-limit of all languages together; tokenizer.eos
    # for tokenizer.ends; a share of samples as pass@1
    boxes()
    with folder() as path:
        saved = path / "kept.jsonl"
        cfg = code_cfg(BUNDLED_DATA, eval_limit=2, samples=2, save_predictions=str(saved),
                       run_code=False, temperature=1.0)
        found = humaneval.score(lm(), tokenizer(), cfg, "x")
        rows = [json.loads(line) for line in saved.read_text().splitlines()]
        assert found["total"] == len(rows) == 16 and "--run-code" in found["metric"]
        assert [row["task_id"] for row in rows[2:6]] == ["Python/1", "Python/1", "CPP/0", "CPP/0"]
        t = tokenizer()
        ids = t.encode(humaneval.read_problems(BUNDLED_DATA, "python")["Python/0"]["prompt"])
        greedy = code_cfg(BUNDLED_DATA, eval_limit=1)
        whole = model.generate(lm(), [[t.bos] + ids], 4, t.eos)[0]
        assert humaneval.sample_code(lm(), t, greedy, "x")[0]["generation"] == (
            t.decode(ids + whole)[len(t.decode(ids)):])
        with patch.object(humaneval, "generate", lambda *given, **named: 4 * [t.encode("a + b")]):
            assert humaneval.sample_code(lm(), t, greedy, "x")[0]["generation"] == " a + b"
        t.ends = (t.eos, whole[1])
        assert len(humaneval.sample_code(lm(), t, greedy, "x")[0]["generation"]) < len(
            t.decode(ids + whole)) - len(t.decode(ids))
        problems_in(path, ONE)
        right, wrong = ({"task_id": "Python/0", "generation": f"    return {n}\n"} for n in (1, 2))
        with patch.object(humaneval, "sample_code", lambda *given: [right, wrong, wrong, wrong]):
            found = humaneval.score(None, None, code_cfg(path), "x")
        assert (found["accuracy"], found["correct"], found["total"]) == (0.25, 0.25, 1), found
        with contextlib.redirect_stdout(io.StringIO()) as said:
            humaneval.report(found)
        assert said.getvalue().splitlines()[1].split() == (
            "python 1 of 1 problems passed pass@1 25.00%".split())


# ---- the sandbox --------------------------------------------------------------------------------

def programs_in(path: Path, name="") -> list[str]:
    """The command lines, with `name` in front, of all processes whose environment names a sandbox
    in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_text(errors="replace")
            inside = f"HOME={path}/fedbiot-sandbox".encode() in (process / "environ").read_bytes()
            found += [line] if inside and line.startswith(name) else []
    return found


def wait_for(condition, what: str, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"expected {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def unguarded():
    """As on a machine whose kernel has no seccomp."""
    with patch.object(sandbox, "guard", lambda fork=True: []), \
            patch.object(humaneval, "guard", lambda fork=True: []):
        yield


def attack(body: str, *ways: str, seconds=30):
    """A hostile body of `f`, which returns 1 where it gets its way. It scores 0 in one of the
    `ways`; no process and no file is left, and the next program is scored as ever."""
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    for box in boxes():
        with folder() as path, patch.object(tempfile, "tempdir", str(path)):
            verdict = humaneval.judge(ONE, "python", body, box, seconds)
            assert any(way in verdict for way in ways), f"{box.kind}: {verdict!r}, expected {ways}"
            assert not list(path.iterdir()) and not programs_in(path), (box.kind, "left behind")
            again = humaneval.judge(ONE, "python", ONE["canonical_solution"], box)
            assert again == "passed", box.kind


def run_python(body: str, box, **limits) -> str:
    """Why our Python code, with no test behind it, was ended in the sandbox."""
    command = [sys.executable, "-I", "-c", textwrap.dedent(body)]
    return sandbox.run_sandboxed(command, {}, box, **limits)[0]


def test_sandbox_starts_no_process_in_a_program():
    # kills: guard left out of a program's run
    attack("""
        import os
        while True:
            try: os.fork()
            except OSError: pass""", "killed", seconds=1)
    attack("import os\nos.posix_spawn('/bin/true', ['true'], {})\nreturn 1", "exit status 1")


def test_sandbox_stops_a_fork_bomb():
    # kills: prlimit without --nproc, where nothing else refuses processes
    with unguarded():
        attack("""
            import os
            for n in range(400): os.posix_spawn('/bin/sleep', ['sleep', '60'], {})
            return 1""", "exit status 1")
        attack("""
            import os
            while True:
                try: os.fork()
                except OSError: pass""", "memory", "killed", "time", "processes", seconds=2)


def test_sandbox_stops_an_endless_loop_that_ignores_signals():
    # kills: timeout without -s KILL
    attack("""
        import signal
        for s in range(1, 64):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass""", "killed", seconds=1)


def test_sandbox_stops_endless_output():
    # kills: watch without its look at the output; a look only while the program runs
    attack("while True: print('passed ' * 1000)", "output")
    for box in boxes():
        assert run_python("print('x' * 5_000_000)", box) == "output", box.kind


def test_sandbox_stops_a_20_gb_allocation():
    # kills: prlimit without --as; watch without the sum over all processes
    attack("return len(bytearray(20 << 30)) > 0", "exit status 1")
    for box in boxes():
        assert run_python("""
            import os, time
            for _ in range(4): os.fork()
            block = b'x' * (200 << 20)
            time.sleep(9)""", box) == "memory", box.kind


HIDING = {"in memfd files": """
    files = [os.memfd_create('x') for _ in range(9)]
    for file in files: os.write(file, bytes(30 << 20))""", "in deleted files": """
    files = [open(str(i), 'wb') for i in range(9)]
    for i, file in enumerate(files): os.remove(str(i)), file.write(bytes(30 << 20)), file.flush()
    """, "in deleted files that are mapped": """
    files = []
    for i in range(9):
        with open(str(i), 'w+b') as file:
            os.remove(str(i)), file.write(bytes(30 << 20)), file.flush()
            files.append(mmap.mmap(file.fileno(), 30 << 20))""", "behind shared mappings": """
    files = [mmap.mmap(-1, 30 << 20) for i in range(9)]
    for file in files: file[:] = bytes(30 << 20); file.madvise(mmap.MADV_DONTNEED)""",
          "in attached segments": """
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    for i in range(9):
        place = libc.shmat(libc.shmget(0, 30 << 20, 0o1600), None, 0)
        ctypes.memset(place, 1, 30 << 20), libc.madvise(ctypes.c_void_p(place), 30 << 20, 4)"""}


def test_sandbox_counts_memory_that_no_process_shows():
    # kills: watch without unnamed; unnamed without what is open, or without what is mapped
    head = "import ctypes, mmap, os, time\n"
    for kind, body in HIDING.items():
        box = boxes()[0]
        with unguarded():
            code = head + textwrap.dedent(body) + "\ntime.sleep(9)"
            assert run_python(code, box, memory_mb=200) == "memory", kind


def test_sandbox_refuses_what_nothing_could_count():
    # kills: a system call left out of HIDDEN; shared memory without an owner
    box = boxes()[0]
    if not sandbox.guard():
        raise Skip("no filter of system calls for this machine")
    assert run_python("""
        import ctypes, errno, os, socket
        libc = ctypes.CDLL(None, use_errno=True)
        calls = {"shmget": (0, 99, 0o1600), "semget": (0, 9, 0o1600), "msgget": (0, 0o1600),
                 "unshare": (0x400,), "memfd_create": (b"x", 0), "sendmsg": (0, 0, 0),
                 "socket": (2, 1, 0)}
        for name, given in calls.items():
            found = getattr(libc, name)(*given)
            assert (found, ctypes.get_errno()) == (-1, errno.ENOSYS), name
        one, other = socket.socketpair()                        # asyncio's, and each is counted
        one.send(b'x')
        assert os.fork() == 0 or os.wait()[1] == 0""", box) == ""
    many = "import socket, time\nall = [socket.socketpair() for _ in range(200)]\ntime.sleep(9)"
    assert run_python(many, box, memory_mb=150) == "memory"


def test_sandbox_stops_a_program_that_fills_the_disk():
    # kills: watch without disk_use; prlimit without --fsize
    attack("""
        for i in range(10000): open(str(i), 'wb').write(bytes(30 << 20))
        return 1""", "files", seconds=120)
    attack("return open('big', 'wb').write(bytes(100 << 20)) > 0", "exit status 1")


def test_sandbox_outlives_a_program_that_kills_its_parent():
    # kills: no PID namespace
    attack(f"""
        import os
        if open('/proc/1/cmdline').read() == {Path("/proc/1/cmdline").read_text()!r}: return 1
        for pid in (os.getppid(), 1, -1):
            try: os.kill(pid, 9)
            except OSError: pass
        os._exit(0)""", "killed", "left", "exit status")


def test_sandbox_is_read_only_but_for_the_programs_own_folder():
    # kills: no --remount-ro / (as an ordinary user; under root the user id alone would hold)
    target = HERE / "evil"
    attack(f"""
        done = []
        for name in ('/', '/usr', '/tmp', '/dev', '/dev/shm', '/etc', '/var/tmp', '/home', '/root',
                     '/old', '/proc/sys/kernel', '..', {str(HERE)!r}, {tempfile.gettempdir()!r}):
            try: done.append(open(name + '/evil', 'w').write('x'))
            except OSError: pass
        open('mine', 'w').write('x')
        return len(done) > 0""", "exit status 1")
    assert not target.exists() and not Path("/tmp/evil").exists()


def test_sandbox_shows_none_of_the_users_files():
    # kills: more folders shown than the toolchain needs
    attack(f"""
        import os
        for name in ('/etc/shadow', '/etc/passwd', '~/.ssh', '~/.bashrc', '/old/etc', '/home',
                     '/proc/1/root/etc/shadow', '/var', {str(HERE / 'eval.py')!r},
                     {str(HERE / 'tiny')!r}):
            name = os.path.expanduser(name)
            try: return os.listdir(name) and 1
            except OSError: pass
            try: return open(name).read() and 1
            except OSError: pass
        return any(word in os.environ for word in ('USER', 'LOGNAME', 'SSH_AUTH_SOCK', 'TERM'))
        """, "exit status 1")


def test_sandbox_has_no_network():
    # kills: no network namespace, where no filter refuses sockets
    with unguarded(), socket.create_server(("127.0.0.1", 0)) as server, \
            socket.socket(socket.AF_UNIX) as local:
        name = f"\0fedbiot-{os.getpid()}"       # abstract: such a name is reached without a file
        local.bind(name)
        local.listen()
        attack(f"""
            import socket
            for family, name in ((socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})),
                                 (socket.AF_INET, ('1.1.1.1', 53)), (socket.AF_UNIX, {name!r})):
                try: return socket.socket(family).connect(name) is None
                except OSError: pass""", "exit status 1")


def test_sandbox_lets_no_daemon_live():
    # kills: no count of the processes after the program
    with unguarded():
        attack("""
            import os, time
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0: time.sleep(1000)
                os._exit(0)
            os.wait()
            return 1""", "left a process behind")


def test_sandbox_gives_no_rights():
    # kills: no chroot, in which user namespaces are refused
    known = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout \
        if shutil.which("bwrap") else ""
    if os.getuid() and "--disable-userns" not in known:
        raise Skip("this bwrap cannot refuse user namespaces")
    with unguarded():
        attack("""
            import ctypes, re
            status = open('/proc/self/status').read()
            rights = re.findall('Cap(?:Eff|Prm|Bnd).([0-9a-f]+)', status)
            made = ctypes.CDLL(None).unshare(0x10000000) == 0
            return any(int(right, 16) for right in rights) or made""", "exit status 1")


def test_a_program_cannot_say_that_it_passed():
    # kills: exit status 0 taken as a pass
    for end in ("raise SystemExit(0)", "os._exit(0)", "os.execv('/bin/true', ['true'])"):
        attack(f"import os\nprint('passed', 'OK', '1 passed', flush=True)\n{end}",
               "left before the end of its tests")
    attack("print(open('main.py').read()); return 1", "exit status 1")


def test_nothing_stays_behind_where_the_harness_is_killed():
    # kills: folders removed by the harness alone; unshare without --pdeathsig
    script = ("import sys, types; sys.path.insert(0, sys.argv[1])\n"
              "sys.modules['model'] = types.SimpleNamespace(UserError=ValueError)    # no torch\n"
              "from tasks import sandbox\n"
              "with sandbox.scratch('tools'):\n"
              "    sandbox.run_sandboxed(['sleep', '1000'], {}, sandbox.Box(sys.argv[2]), 60)")
    for box, number in itertools.product(boxes(), (signal.SIGTERM, signal.SIGKILL)):
        with folder() as path:
            harness = subprocess.Popen([sys.executable, "-c", script, str(HERE), box.kind],
                                       env={**os.environ, "TMPDIR": str(path)})
            wait_for(lambda: programs_in(path, "sleep"), "a program that runs")
            harness.send_signal(number)
            assert harness.wait() == -number
            wait_for(lambda: not list(path.iterdir()) and not programs_in(path),
                     f"nothing left ({box.kind}, {number})")


def test_ctrl_c_ends_running_programs_at_once():
    # kills: a pool that waits for its programs; watch that does not look at cancel
    boxes()
    script = ("import sys; sys.path.insert(0, sys.argv[1]); from tasks import code\n"
              "code.score_code(sys.argv[2], sys.argv[3], workers=2)")
    with folder() as path:
        problems_in(path, ONE)
        rows = [{"task_id": "Python/0", "generation": f"    n = {n}\n    while True: pass\n"}
                for n in range(9)]
        samples = samples_in(path, rows)
        (path / "temporary").mkdir()
        harness = subprocess.Popen([sys.executable, "-c", script, HERE, samples, path],
                                   env={**os.environ, "TMPDIR": str(path / "temporary")},
                                   stderr=subprocess.PIPE)
        running = f"{sys.executable}\0-I\0-B"
        wait_for(lambda: len(programs_in(path / "temporary", running)) == 2, "two programs")
        start = time.monotonic()
        harness.send_signal(signal.SIGINT)
        said = harness.communicate()[1]
        assert time.monotonic() - start < 10, "one second on an idle machine; 20 where it waits"
        assert harness.returncode and b"KeyboardInterrupt" in said
        wait_for(lambda: not list((path / "temporary").iterdir()), "the cleaner's end", 5)
        assert not programs_in(path)


def test_without_a_sandbox_programs_are_refused():
    # kills: unsafe by default
    with patch.object(shutil, "which", lambda name: None):
        refused(sandbox.make_box, "bwrap", "--unsafe-no-sandbox")
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert sandbox.make_box(unsafe=True).kind == "none"
        assert "no sandbox" in said.getvalue()
