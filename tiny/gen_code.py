"""Small functions in nine languages: tiny Rosetta, tiny HumanEval-X and pre-training's code.

A Spec says what a function does (words, an expression, a shape); `body` and `head` write it in a
language from one row of LANGS. `humaneval` gives the official HumanEval-X fields for four of them.
Which specs are kept for the tests is again a hash, of the words: see `gen_maths.split_of`.
"""
import random
from dataclasses import dataclass, replace
from functools import partial

from gen_maths import split_of

# A language: function head, scalar argument, list argument, types (int, bool, list), then the lines of
# init, loop, loop's variable test, update, end of a block, return, end of the function; and its words.
KEYS = "head arg list int bool init loop cond update end ret close and_ true false".split()
LANGS = {
    "Python": ("def {f}({a}):", "{v}: int", "{v}: list", "int", "bool", "total = {z}", "for x in xs:", "if {c}:",
               "total {o}= {e}", "", "return {e}", "", "and", "True", "False"),
    "C++": ("{t} {f}({a}) {{", "int {v}", "vector<int> {v}", "int", "bool", "int total = {z};", "for (int x : xs) {{",
            "if ({c}) {{", "total {o}= {e};", "}", "return {e};", "}", "&&", "true", "false"),
    "Java": ("public {t} {f}({a}) {{", "int {v}", "List<Integer> {v}", "int", "boolean", "int total = {z};",
             "for (int x : xs) {{", "if ({c}) {{", "total {o}= {e};", "}", "return {e};", "}", "&&", "true", "false"),
    "Go": ("func {f}({a}) {t} {{", "{v} int", "{v} []int", "int", "bool", "total := {z}", "for _, x := range xs {{",
           "if {c} {{", "total {o}= {e}", "}", "return {e}", "}", "&&", "true", "false"),
    "JavaScript": ("function {f}({a}) {{", "{v}", "{v}", "", "", "let total = {z};", "for (const x of xs) {{",
                   "if ({c}) {{", "total {o}= {e};", "}", "return {e};", "}", "&&", "true", "false"),
    "C": ("{t} {f}({a}) {{", "int {v}", "int *{v}, int n", "int", "bool", "int total = {z};",
          "for (int i = 0; i < n; i++) {{\n    int x = xs[i];", "if ({c}) {{", "total {o}= {e};", "}", "return {e};", "}",
          "&&", "true", "false"),
    "Ruby": ("def {f}({a})", "{v}", "{v}", "", "", "total = {z}", "for x in xs", "if {c}", "total {o}= {e}", "end",
             "return {e}", "end", "&&", "true", "false"),
    "Lua": ("function {f}({a})", "{v}", "{v}", "", "", "local total = {z}", "for _, x in ipairs(xs) do", "if {c} then",
            "total = total {o} {e}", "end", "return {e}", "end", "and", "true", "false"),
    "Rust": ("fn {f}({a}) -> {t} {{", "{v}: i32", "{v}: &[i32]", "i32", "bool", "let mut total = {z};",
             "for &x in xs {{", "if {c} {{", "total {o}= {e};", "}", "return {e};", "}", "&&", "true", "false"),
}
SYNTAX = {lang: dict(zip(KEYS, row)) for lang, row in LANGS.items()}
# Rosetta's languages are uneven: that is what makes the clients' shards non-i.i.d.
LANG_WEIGHTS = dict(zip(LANGS, (22, 13, 14, 15, 10, 12, 6, 4, 4)))
TESTED = {"Python": "python", "C++": "cpp", "Java": "java", "Go": "go"}   # HumanEval-X's four


@dataclass(frozen=True)
class Spec:
    """words: what is returned. shape: expr | test | choose | fold. name and args are Python's."""
    words: str
    shape: str
    name: str
    args: tuple
    expr: str = ""        # the value (expr, choose), or what is folded
    cond: tuple = ()      # conditions joined by "and"
    other: str = ""       # choose: the value otherwise
    op: str = ""          # fold: + or *
    digit: bool = False   # fold: only the result's last digit


def condition(r, v):
    k = r.randint(2, 9)
    return r.choice(((f"{v} is even", f"{v} % 2 == 0"), (f"{v} is divisible by {k}", f"{v} % {k} == 0"),
                     (f"{v} is greater than {k}", f"{v} > {k}"), (f"{v} is less than {k}", f"{v} < {k}"),
                     (f"{v} is not {k}", f"{v} != {k}")))


def value(r, v):
    """Words and expression of one or two operations on v."""
    k, c = r.randint(2, 9), r.randint(1, 20)
    return r.choice(((f"{v} times {k}", f"{v} * {k}"), (f"{v} plus {c}", f"{v} + {c}"),
                     (f"{v} minus {c}", f"{v} - {c}"), (f"{v} times {k} plus {c}", f"{v} * {k} + {c}"),
                     (f"{v} times {k} minus {c}", f"{v} * {k} - {c}"), (f"the square of {v}", f"{v} * {v}")))


def make_spec(r) -> Spec:
    shape = r.choice(("expr", "expr", "test", "choose", "fold", "fold"))
    if shape == "expr" and r.random() < .5:
        word, op = r.choice((("sum", "+"), ("product", "*"), ("difference", "-")))
        k, c = r.randint(2, 9), r.randint(1, 20)
        words, expr = r.choice(((f"the {word} of a and b", f"a {op} b"),
                                (f"the {word} of a and b plus {c}", f"a {op} b + {c}"),
                                (f"{k} times the {word} of a and b", f"{k} * (a {op} b)")))
        return Spec(words, shape, word + "_two", ("a", "b"), expr)
    if shape == "expr":
        words, expr = value(r, "n")
        return Spec(words, shape, r.choice(("get_value", "change_number")), ("n",), expr)
    (w1, c1), (w2, c2) = condition(r, "n"), condition(r, "n")
    if shape == "test":
        both = c1 != c2 and r.random() < .6
        return Spec(f"true if {w1}" + (f" and {w2}" if both else "") + ", else false", shape,
                    r.choice(("check_number", "is_good")), ("n",), cond=(c1, c2) if both else (c1,))
    if shape == "choose":
        (v1, e1), (v2, e2) = value(r, "n"), value(r, "n")
        return Spec(f"{v1} if {w1}, else {v2}", shape, "pick_number", ("n",), e1, (c1,), e2)
    word, op = r.choice((("sum", "+"), ("product", "*"), ("count", "+")))
    (w, c), (v, e) = condition(r, "x"), value(r, "x") if r.random() < .5 and word != "count" else ("x", "x")
    some = r.random() < .7
    words = f"the {word} of {v} for each x in xs" if word != "count" else "the count of x in xs"
    return Spec(words + (f" where {w}" if some else ""), "fold", word + "_list", ("xs",),
                "1" if word == "count" else e, (c,) if some else (), op=op)


def digit_spec(r) -> Spec:
    """The last digit of a sum: what pre-training has never seen, and the clients' code teaches."""
    (w, c), (v, e) = condition(r, "x"), r.choice((("x", "x"), value(r, "x")))
    some = r.random() < .7
    spec = Spec(f"the last digit of the sum of {v} for each x in xs" + (f" where {w}" if some else ""), "fold",
                "last_digit", ("xs",), e, (c,) if some else (), op="+", digit=True)
    # % of a negative sum differs by language; a small sum is its own last digit
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


def body(spec: Spec, lang: str) -> str:
    """The lines after `head`, with the function's closing line."""
    s, lines, depth = SYNTAX[lang], [], 1

    def put(text, deeper=0):
        nonlocal depth
        lines.extend("    " * depth + line for line in text.split("\n") if line)
        depth += deeper

    def end():
        nonlocal depth
        depth -= 1
        put(s["end"])

    cond = f" {s['and_']} ".join(spec.cond)
    ret = s["ret"]
    if lang == "Lua":
        cond = cond.replace("!=", "~=")
    if spec.shape == "expr":
        put(ret.format(e=spec.expr))
    elif spec.shape == "test":
        put(ret.format(e=cond))
    elif spec.shape == "choose":
        put(s["cond"].format(c=cond), 1), put(ret.format(e=spec.expr)), end()
        put(ret.format(e=spec.other))
    else:
        put(s["init"].format(z=0 if spec.op == "+" else 1))
        put(s["loop"].format(), 1)
        if cond:
            put(s["cond"].format(c=cond), 1)
        simple = lang != "Lua" or not set(" ") & set(spec.expr)      # Lua has no +=, so it needs brackets
        put(s["update"].format(o=spec.op, e=spec.expr if simple else f"({spec.expr})"))
        if cond:
            end()
        end()
        put(ret.format(e="total % 10" if spec.digit else "total"))
    return "\n".join(lines) + (f"\n{s['close']}" if s["close"] else "") + "\n"


def prose(spec: Spec) -> str:
    what = {"expr": "It computes", "test": "It returns", "choose": "It picks", "fold": "It goes over xs and returns"}
    return f"The function takes {' and '.join(spec.args)}. {what[spec.shape]} {spec.words}."


def rosetta_row(rng, split="train", codes=1.0) -> dict:
    """Clients always answer with code; `codes` < 1 gives pre-training's mix with prose."""
    spec, lang = spec_of(rng, split), rng.choices(list(LANG_WEIGHTS), LANG_WEIGHTS.values())[0]
    code = f"{head(spec, lang)}\n{body(spec, lang)}"
    ask = rng.choice(("Write a function that returns", "Make a function to return"))
    return {"instruction": f"{ask} {spec.words}.", "input": lang,
            "output": code.rstrip("\n") if rng.random() < codes else prose(spec)}


# ---- HumanEval-X: official fields; the completion is what follows `prompt` ----

def run(spec: Spec, *args):
    """The spec's own value: what the tests expect, computed apart from the written code."""
    if spec.shape == "fold":
        total = 0 if spec.op == "+" else 1
        for x in args[0]:
            if all(eval(c, {"x": x}) for c in spec.cond):
                total = total + eval(spec.expr, {"x": x}) if spec.op == "+" else total * eval(spec.expr, {"x": x})
        return total % 10 if spec.digit else total
    env = dict(zip(spec.args, args))
    hit = all(eval(c, env) for c in spec.cond)
    return hit if spec.shape == "test" else eval(spec.expr if hit else spec.other, env)


def wrong_bodies(spec: Spec) -> list:
    """Functions that a test must tell from the spec: its first argument, and itself less a condition, a choice, the digit."""
    specs = [replace(spec, cond=spec.cond[:i] + spec.cond[i + 1:]) for i in range(len(spec.cond))]
    specs += [replace(spec, expr=spec.other)] * (spec.shape == "choose") + [replace(spec, digit=False)] * spec.digit
    return [lambda *args: args[0], lambda *args: bool(args[0]), *(partial(run, other) for other in specs)]  # bool: in C++


def cases(spec: Spec, rng, n=6):
    """n of them, and for each wrong body that would pass those, and for a constant, one that it fails."""
    most = 3 if spec.op == "*" else 5                                 # products must fit 32 bits

    def draw(r, largest):
        args = tuple([r.randint(1, largest) for _ in range(r.randint(0, most))] if spec.args == ("xs",) else r.randint(0, 40)
                     for _ in spec.args)
        return args, run(spec, *args)

    tests, more = [draw(rng, 9) for _ in range(n)], random.Random(spec.words)     # rng's stream is as long for every spec
    for wrong in (lambda *args: tests[0][1], *wrong_bodies(spec)):
        if all(wrong(*args) == v for args, v in tests):               # a condition that says nothing new never fails
            others = (draw(more, 12) for _ in range(1000))
            tests += next(([(args, v)] for args, v in others if wrong(*args) != v), [])
    return tests


def literal(v, lang):
    if isinstance(v, bool):
        return SYNTAX[lang][str(v).lower() if lang != "Python" else ("true" if v else "false")]
    if isinstance(v, int):
        return str(v)
    inner = ", ".join(map(str, v))
    return {"Python": f"[{inner}]", "C++": f"vector<int>{{{inner}}}", "Go": f"[]int{{{inner}}}",
            "Java": f"Arrays.<Integer>asList({inner})"}[lang]


def humaneval(spec: Spec, lang: str, number: int, rng) -> dict:
    h, solution = head(spec, lang), body(spec, lang)
    f = h.split("(")[0].split()[-1]
    tests = cases(spec, rng)

    def calls(some):
        return [(f"{f}({', '.join(literal(a, lang) for a in args)})", literal(v, lang)) for args, v in some]

    def checks(some):
        if lang == "Python":
            return f"def check({f}):\n" + "".join(f"    assert {c} == {v}\n" for c, v in calls(some)) + f"\ncheck({f})\n"
        if lang == "C++":
            return "#undef NDEBUG\n#include<assert.h>\nint main(){\n" + \
                "".join(f"    assert ({c} == {v});\n" for c, v in calls(some)) + "}\n"
        if lang == "Go":
            return f"func Test{f}(t *testing.T) {{\n" + "".join(
                f"    if {c} != {v} {{\n        t.Fatal(\"wrong\")\n    }}\n" for c, v in calls(some)) + "}\n"
        rows = ",\n".join(f"                s.{c} == {v}" for c, v in calls(some))
        return ("public class Main {\n    public static void main(String[] args) {\n        Solution s = new Solution();\n"
                f"        List<Boolean> correct = Arrays.asList(\n{rows}\n        );\n"
                "        if (correct.contains(false)) {\n            throw new AssertionError();\n        }\n    }\n}\n")

    words = f"Return {spec.words}."
    before, doc, after, setup = {
        "Python": ("", "", f"    \"\"\" {words}\n    \"\"\"\n", None),
        "C++": ("#include<vector>\nusing namespace std;\n", f"/*\n{words}\n*/\n", "", None),
        "Go": ("", f"// {words}\n", "", "package main\n\nimport (\n    \"testing\"\n)\n"),
        "Java": ("import java.util.*;\nimport java.lang.*;\n\nclass Solution {\n", f"    /**\n    {words}\n     */\n", "", None),
    }[lang]
    if lang == "Java":
        h = "    " + h
        solution = "".join("    " + line + "\n" for line in solution.rstrip("\n").split("\n")) + "}\n"
    prompt = doc + before + h + "\n" + after if lang == "C++" else before + doc + h + "\n" + after
    label = {"C++": "CPP"}.get(lang, lang)
    row = {"task_id": f"{label}/{number}", "prompt": prompt, "canonical_solution": solution, "test": checks(tests)}
    if lang == "Go":
        row.update({"import": "", "docstring": doc, "declaration": "\n" + h + "\n", "test_setup": setup})
    elif lang == "C++":
        row["declaration"] = before + h + "\n"
    else:
        row.update({"text": f"    {words}", "declaration": before + h + "\n"})
    return {**row, "example_test": checks(tests[:2])}


def raw_text(rng) -> str:
    """A whole function as HumanEval-X shows it: pre-training's raw code, with no template around it."""
    lang = rng.choice(list(TESTED))
    row = humaneval(spec_of(rng, "pretrain"), lang, 0, rng)
    return row["prompt"] + row["canonical_solution"].rstrip("\n")
