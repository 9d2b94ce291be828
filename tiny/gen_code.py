"""Small functions in nine languages: tiny Rosetta, tiny HumanEval-X and pre-training's code.

A Spec says what a function does: in words, as an expression, and which shape the function has.
`head` and `body` write it in a language by that language's templates in SYNTAX. `humaneval` gives
a row with HumanEval-X's official fields, in four of the languages. Whether a Spec is for
pre-training, for clients or for tests is decided by a hash of its words: `gen_maths.split_of`.
"""
import math
import random
from dataclasses import dataclass, replace
from functools import partial

from gen_maths import split_of

# A language's templates: the head of a function, a scalar and a list as its argument, the types int
# and bool; the lines that fold a list (start value, loop, condition, update, end of a block); the
# return statement and the function's last line; the words for "and", true and false. What they are
# filled with: {f} name, {a} arguments, {t} return type, {v} an argument's name, {z} start value,
# {c} condition, {o} operator, {e} expression.
BRACES = {
    "cond": "if ({c}) {{",
    "update": "total {o}= {e};",
    "end": "}",
    "ret": "return {e};",
    "close": "}",
    "and": "&&",
    "true": "true",
    "false": "false",
}
TYPED = BRACES | {
    "head": "{t} {f}({a}) {{",
    "arg": "int {v}",
    "int": "int",
    "bool": "bool",
    "init": "int total = {z};",
}
SYNTAX = {
    "Python": {
        "head": "def {f}({a}):",
        "arg": "{v}: int",
        "list": "{v}: list",
        "int": "int",
        "bool": "bool",
        "init": "total = {z}",
        "loop": "for x in xs:",
        "cond": "if {c}:",
        "update": "total {o}= {e}",
        "end": "",
        "ret": "return {e}",
        "close": "",
        "and": "and",
        "true": "True",
        "false": "False",
    },
    "C++": TYPED | {
        "list": "vector<int> {v}",
        "loop": "for (int x : xs) {{",
    },
    "Java": TYPED | {
        "head": "public {t} {f}({a}) {{",
        "list": "List<Integer> {v}",
        "bool": "boolean",
        "loop": "for (int x : xs) {{",
    },
    "Go": BRACES | {
        "head": "func {f}({a}) {t} {{",
        "arg": "{v} int",
        "list": "{v} []int",
        "int": "int",
        "bool": "bool",
        "init": "total := {z}",
        "loop": "for _, x := range xs {{",
        "cond": "if {c} {{",
        "update": "total {o}= {e}",
        "ret": "return {e}",
    },
    "JavaScript": BRACES | {
        "head": "function {f}({a}) {{",
        "arg": "{v}",
        "list": "{v}",
        "int": "",
        "bool": "",
        "init": "let total = {z};",
        "loop": "for (const x of xs) {{",
    },
    "C": TYPED | {
        "list": "int *{v}, int n",
        "loop": "for (int i = 0; i < n; i++) {{\n    int x = xs[i];",
    },
    "Ruby": {
        "head": "def {f}({a})",
        "arg": "{v}",
        "list": "{v}",
        "int": "",
        "bool": "",
        "init": "total = {z}",
        "loop": "for x in xs",
        "cond": "if {c}",
        "update": "total {o}= {e}",
        "end": "end",
        "ret": "return {e}",
        "close": "end",
        "and": "&&",
        "true": "true",
        "false": "false",
    },
    "Lua": {
        "head": "function {f}({a})",
        "arg": "{v}",
        "list": "{v}",
        "int": "",
        "bool": "",
        "init": "local total = {z}",
        "loop": "for _, x in ipairs(xs) do",
        "cond": "if {c} then",
        "update": "total = total {o} {e}",
        "end": "end",
        "ret": "return {e}",
        "close": "end",
        "and": "and",
        "true": "true",
        "false": "false",
    },
    "Rust": BRACES | {
        "head": "fn {f}({a}) -> {t} {{",
        "arg": "{v}: i32",
        "list": "{v}: &[i32]",
        "int": "i32",
        "bool": "bool",
        "init": "let mut total = {z};",
        "loop": "for &x in xs {{",
        "cond": "if {c} {{",
    },
}
# Rosetta has more of some languages than of others, which makes the clients' shards non-i.i.d.
LANG_WEIGHTS = {"Python": 22, "C++": 13, "Java": 14, "Go": 15, "JavaScript": 10, "C": 12,
                "Ruby": 6, "Lua": 4, "Rust": 4}
TESTED = {"Python": "python", "C++": "cpp", "Java": "java", "Go": "go"}   # HumanEval-X: its folders


@dataclass(frozen=True)
class Spec:
    """What a function does. Expressions and conditions are Python; other languages adapt them."""
    words: str            # what is returned
    shape: str            # expr | test | choose | fold
    name: str             # in Python's style, as it_is_here
    args: tuple           # ("n",), ("a", "b") or ("xs",)
    expr: str = ""        # the value (expr, choose), or what is folded
    cond: tuple = ()      # conditions joined by "and"
    other: str = ""       # choose: the value otherwise
    op: str = ""          # fold: + or *
    digit: bool = False   # fold: only the result's last digit


# ---- drawing a Spec: what is drawn, and in which order, decides the data files' bytes ----

def condition(r, v):
    """(words, expression) of a condition on v."""
    k = r.randint(2, 9)
    return r.choice((
        (f"{v} is even", f"{v} % 2 == 0"),
        (f"{v} is divisible by {k}", f"{v} % {k} == 0"),
        (f"{v} is greater than {k}", f"{v} > {k}"),
        (f"{v} is less than {k}", f"{v} < {k}"),
        (f"{v} is not {k}", f"{v} != {k}"),
    ))


def value(r, v):
    """(words, expression) of one or two operations on v."""
    k, c = r.randint(2, 9), r.randint(1, 20)
    return r.choice((
        (f"{v} times {k}", f"{v} * {k}"),
        (f"{v} plus {c}", f"{v} + {c}"),
        (f"{v} minus {c}", f"{v} - {c}"),
        (f"{v} times {k} plus {c}", f"{v} * {k} + {c}"),
        (f"{v} times {k} minus {c}", f"{v} * {k} - {c}"),
        (f"the square of {v}", f"{v} * {v}"),
    ))


def two_argument_spec(r) -> Spec:
    word, op = r.choice((("sum", "+"), ("product", "*"), ("difference", "-")))
    k, c = r.randint(2, 9), r.randint(1, 20)
    words, expr = r.choice((
        (f"the {word} of a and b", f"a {op} b"),
        (f"the {word} of a and b plus {c}", f"a {op} b + {c}"),
        (f"{k} times the {word} of a and b", f"{k} * (a {op} b)"),
    ))
    return Spec(words, "expr", word + "_two", ("a", "b"), expr)


def one_argument_spec(r) -> Spec:
    words, expr = value(r, "n")
    return Spec(words, "expr", r.choice(("get_value", "change_number")), ("n",), expr)


def test_spec(r, first, second) -> Spec:
    """True or false by one condition or by two."""
    (words, c1), (words2, c2) = first, second
    both = c1 != c2 and r.random() < .6
    if both:
        words = f"{words} and {words2}"
    name = r.choice(("check_number", "is_good"))
    return Spec(f"true if {words}, else false", "test", name, ("n",),
                cond=(c1, c2) if both else (c1,))


def choose_spec(r, condition_on_n) -> Spec:
    words, cond = condition_on_n
    (v1, e1), (v2, e2) = value(r, "n"), value(r, "n")
    return Spec(f"{v1} if {words}, else {v2}", "choose", "pick_number", ("n",), e1, (cond,), e2)


def fold_spec(r) -> Spec:
    """A sum, a product or a count over a list, of all its members or of those that fit."""
    word, op = r.choice((("sum", "+"), ("product", "*"), ("count", "+")))
    where, cond = condition(r, "x")
    v, e = value(r, "x") if r.random() < .5 and word != "count" else ("x", "x")
    some = r.random() < .7
    words = f"the {word} of {v} for each x in xs" if word != "count" else "the count of x in xs"
    return Spec(words + (f" where {where}" if some else ""), "fold", word + "_list", ("xs",),
                "1" if word == "count" else e, (cond,) if some else (), op=op)


def make_spec(r) -> Spec:
    shape = r.choice(("expr", "expr", "test", "choose", "fold", "fold"))
    if shape == "expr":
        return two_argument_spec(r) if r.random() < .5 else one_argument_spec(r)
    first, second = condition(r, "n"), condition(r, "n")    # drawn, though unused, for a fold too
    if shape == "test":
        return test_spec(r, first, second)
    return choose_spec(r, first) if shape == "choose" else fold_spec(r)


def digit_spec(r) -> Spec:
    """The last digit of a sum: pre-training has none, the clients' code teaches it."""
    where, cond = condition(r, "x")
    v, e = r.choice((("x", "x"), value(r, "x")))
    some = r.random() < .7
    words = f"the last digit of the sum of {v} for each x in xs"
    spec = Spec(words + (f" where {where}" if some else ""), "fold", "last_digit", ("xs",), e,
                (cond,) if some else (), op="+", digit=True)
    # Languages differ in % of a negative sum, and a sum below 10 is its own last digit.
    fine = "minus" not in v and run(replace(spec, digit=False), range(1, 10)) >= 15
    return spec if fine else digit_spec(r)


def spec_of(rng, split: str) -> Spec:
    while True:
        spec = make_spec(rng) if split == "pretrain" or rng.random() < .4 else digit_spec(rng)
        if split_of(spec.words) == split:
            return spec


# ---- writing a Spec in a language ----

def head(spec: Spec, lang: str) -> str:
    s, f = SYNTAX[lang], spec.name
    if lang in ("Go", "Java", "JavaScript"):
        f = "".join(w.capitalize() for w in f.split("_"))
        f = f if lang == "Go" else f[0].lower() + f[1:]
    args = ", ".join(s["list" if v == "xs" else "arg"].format(v=v) for v in spec.args)
    return s["head"].format(f=f, a=args, t=s["bool" if spec.shape == "test" else "int"])


def fold_statements(spec: Spec, lang: str, cond: str) -> list[tuple[int, str]]:
    s, expr = SYNTAX[lang], spec.expr
    if lang == "Lua" and " " in expr:
        expr = f"({expr})"                  # Lua has no +=, so its update needs brackets
    update = s["update"].format(o=spec.op, e=expr)
    inner = [(2, update)]
    if cond:
        inner = [(2, s["cond"].format(c=cond)), (3, update), (2, s["end"])]
    return [(1, s["init"].format(z=0 if spec.op == "+" else 1)),
            (1, s["loop"].format()),
            *inner,
            (1, s["end"]),
            (1, s["ret"].format(e="total % 10" if spec.digit else "total"))]


def statements(spec: Spec, lang: str) -> list[tuple[int, str]]:
    """(depth of indentation, text) of all that stands between a function's head and its end."""
    s = SYNTAX[lang]
    cond = f" {s['and']} ".join(spec.cond)
    if lang == "Lua":
        cond = cond.replace("!=", "~=")
    if spec.shape == "fold":
        return fold_statements(spec, lang, cond)
    if spec.shape == "test":
        return [(1, s["ret"].format(e=cond))]
    value_returned = s["ret"].format(e=spec.expr)
    if spec.shape == "expr":
        return [(1, value_returned)]
    return [(1, s["cond"].format(c=cond)),
            (2, value_returned),
            (1, s["end"]),
            (1, s["ret"].format(e=spec.other))]


def body(spec: Spec, lang: str) -> str:
    """The lines after `head`, with the function's closing line."""
    close = SYNTAX[lang]["close"]
    lines = ["    " * depth + line for depth, text in statements(spec, lang)
             for line in text.split("\n") if line]
    return "\n".join([*lines, close] if close else lines) + "\n"


def prose(spec: Spec) -> str:
    what = {"expr": "It computes", "test": "It returns", "choose": "It picks",
            "fold": "It goes over xs and returns"}
    return f"The function takes {' and '.join(spec.args)}. {what[spec.shape]} {spec.words}."


def rosetta_row(rng, split="train", codes=1.0) -> dict:
    """A request for a function, answered by code with probability `codes`, else by prose.

    The clients' rows are all code; pre-training's are mixed.
    """
    spec, lang = spec_of(rng, split), rng.choices(list(LANG_WEIGHTS), LANG_WEIGHTS.values())[0]
    code = f"{head(spec, lang)}\n{body(spec, lang)}"
    ask = rng.choice(("Write a function that returns", "Make a function to return"))
    return {"instruction": f"{ask} {spec.words}.", "input": lang,
            "output": code.rstrip("\n") if rng.random() < codes else prose(spec)}


# ---- HumanEval-X: the cases that a function must pass ----

def run_fold(spec: Spec, xs) -> int:
    fit = [x for x in xs if all(eval(c, {"x": x}) for c in spec.cond)]
    values = [eval(spec.expr, {"x": x}) for x in fit]
    total = sum(values) if spec.op == "+" else math.prod(values)
    return total % 10 if spec.digit else total


def run(spec: Spec, *args):
    """What the function returns for args, by the Spec and not by the code written from it."""
    if spec.shape == "fold":
        return run_fold(spec, args[0])
    env = dict(zip(spec.args, args))
    hit = all(eval(c, env) for c in spec.cond)
    return hit if spec.shape == "test" else eval(spec.expr if hit else spec.other, env)


def wrong_bodies(spec: Spec) -> list:
    """Functions that the tests must tell from the Spec's: its first argument, as it is and as bool
    (to which C++ converts it), and the Spec less a condition, a choice, or its last-digit step."""
    wrong = [lambda *args: args[0], lambda *args: bool(args[0])]
    for i in range(len(spec.cond)):
        wrong.append(partial(run, replace(spec, cond=spec.cond[:i] + spec.cond[i + 1:])))
    if spec.shape == "choose":
        wrong.append(partial(run, replace(spec, expr=spec.other)))
    if spec.digit:
        wrong.append(partial(run, replace(spec, digit=False)))
    return wrong


def draw_case(spec: Spec, r, largest: int):
    """(arguments, value); a list has small members, up to `largest`, so that int is wide enough."""
    if spec.args == ("xs",):
        longest = 3 if spec.op == "*" else 5            # products must fit 32 bits
        args = ([r.randint(1, largest) for _ in range(r.randint(0, longest))],)
    else:
        args = tuple(r.randint(0, 40) for _ in spec.args)
    return args, run(spec, *args)


def cases(spec: Spec, rng, n=6):
    """n cases. For a constant and for each wrong body that passes all of them, one more that it
    fails, unless none is found: a condition that says nothing new can be left out unnoticed."""
    tests = [draw_case(spec, rng, 9) for _ in range(n)]
    more = random.Random(spec.words)        # so that as much is drawn from rng for every Spec
    for wrong in (lambda *args: tests[0][1], *wrong_bodies(spec)):
        if all(wrong(*args) == v for args, v in tests):
            others = (draw_case(spec, more, 12) for _ in range(1000))
            tests += next(([(args, v)] for args, v in others if wrong(*args) != v), [])
    return tests


# ---- HumanEval-X: the official fields; the completion is what follows `prompt` ----

def literal(v, lang):
    if isinstance(v, bool):
        return SYNTAX[lang]["true" if v else "false"]
    if isinstance(v, int):
        return str(v)
    inner = ", ".join(map(str, v))
    return {"Python": f"[{inner}]", "C++": f"vector<int>{{{inner}}}", "Go": f"[]int{{{inner}}}",
            "Java": f"Arrays.<Integer>asList({inner})"}[lang]


def java_test(calls) -> str:
    rows = ",\n".join(f"                s.{call} == {v}" for call, v in calls)
    return ("public class Main {\n"
            "    public static void main(String[] args) {\n"
            "        Solution s = new Solution();\n"
            "        List<Boolean> correct = Arrays.asList(\n"
            f"{rows}\n"
            "        );\n"
            "        if (correct.contains(false)) {\n"
            "            throw new AssertionError();\n"
            "        }\n"
            "    }\n"
            "}\n")


def test_program(f: str, lang: str, tests) -> str:
    """The `test` field: a program part that fails unless the function f passes all the tests."""
    calls = [(f"{f}({', '.join(literal(a, lang) for a in args)})", literal(v, lang))
             for args, v in tests]
    if lang == "Python":
        asserts = "".join(f"    assert {call} == {v}\n" for call, v in calls)
        return f"def check({f}):\n{asserts}\ncheck({f})\n"
    if lang == "C++":
        asserts = "".join(f"    assert ({call} == {v});\n" for call, v in calls)
        return f"#undef NDEBUG\n#include<assert.h>\nint main(){{\n{asserts}}}\n"
    if lang == "Go":
        checks = "".join(f"    if {call} != {v} {{\n        t.Fatal(\"wrong\")\n    }}\n"
                         for call, v in calls)
        return f"func Test{f}(t *testing.T) {{\n{checks}}}\n"
    return java_test(calls)


def prompt_fields(lang: str, words: str, declared: str) -> tuple[str, dict]:
    """(prompt, the fields that only this language's file has); `declared` is the head's line."""
    if lang == "Python":
        prompt = f'{declared}    """ {words}\n    """\n'
        return prompt, {"text": f"    {words}", "declaration": declared}
    if lang == "Go":
        comment = f"// {words}\n"
        setup = "package main\n\nimport (\n    \"testing\"\n)\n"
        return comment + declared, {"import": "", "docstring": comment,
                                    "declaration": "\n" + declared, "test_setup": setup}
    if lang == "C++":
        declaration = "#include<vector>\nusing namespace std;\n" + declared
        return f"/*\n{words}\n*/\n{declaration}", {"declaration": declaration}
    opening = "import java.util.*;\nimport java.lang.*;\n\nclass Solution {\n"
    prompt = f"{opening}    /**\n    {words}\n     */\n{declared}"
    return prompt, {"text": f"    {words}", "declaration": opening + declared}


def humaneval(spec: Spec, lang: str, number: int, rng) -> dict:
    declared, solution = head(spec, lang) + "\n", body(spec, lang)
    f = declared.split("(")[0].split()[-1]
    if lang == "Java":                      # a method of a class, which the solution closes
        declared = "    " + declared
        solution = "".join(f"    {line}\n" for line in solution.splitlines()) + "}\n"
    tests = cases(spec, rng)
    prompt, own_fields = prompt_fields(lang, f"Return {spec.words}.", declared)
    return {"task_id": f"{'CPP' if lang == 'C++' else lang}/{number}",
            "prompt": prompt,
            "canonical_solution": solution,
            "test": test_program(f, lang, tests),
            **own_fields,
            "example_test": test_program(f, lang, tests[:2])}


def raw_text(rng) -> str:
    """A function as HumanEval-X shows it: pre-training's raw code, with no template around it."""
    lang = rng.choice(list(TESTED))
    row = humaneval(spec_of(rng, "pretrain"), lang, 0, rng)
    return row["prompt"] + row["canonical_solution"].rstrip("\n")
