"""What README.md says of the code, and what the lesson is held to."""
import importlib
import inspect
import re

from docs import run_lesson
from tests.common import HERE

MAP = re.compile(r"^\| (Eq\. [\d–-]+|Algorithm [12](?:, lines? [\d–-]+)?|AdapEmu, AdapFu) "
                 r"\| (.*) \| `(\w+\.py)`: (.*) \|$", re.MULTILINE)

EQUATIONS = {       # as the paper prints them, by a word that the map has to use of each
    1: "F_m",                   # a client's loss, the mean over its samples
    2: "Σ p_m F_m",             # the objective of federated learning
    3: "E(x) − E*(x)",          # L_repr, the squared distance at the adapter's input
    4: "KL",                    # L_kd, of the outputs of the full and the compressed model
    5: "before",                # alignment before the first round: L_repr + lambda L_kd
    6: "ε/2",                   # upper level: the clients' losses and the pull to the broadcast
    7: "LoRA of E",             # lower level: alignment under the current adapter
    8: "broadcast",             # a client's start
    9: "gradient",              # of Eq. 6 at a client
    10: "optimizer",            # its step
    11: "Σ p_m A_m",            # the weighted average
}


def numbers(text: str) -> set[int]:
    """`3-5, 7` and `4 and 5` -> the numbers meant."""
    spans = re.findall(r"(\d+)(?:[-–](\d+))?", text)
    return {n for a, b in spans for n in range(int(a), int(b or a) + 1)}


def named(text: str, word: str) -> set[int]:
    """The numbers that stand behind a word: `Eq. 3-5, 7`."""
    found = re.findall(word + r" (\d+(?:(?:, | and |[-–])\d+)*)", text)
    return set().union(*map(numbers, found))


def thing_of(module, place: str):
    """`Server.align` of a module; None where it is not there."""
    thing = module
    for part in place.split("."):
        thing = getattr(thing, part, None)
    return thing


def test_the_readmes_map_of_the_paper_points_at_code_that_says_so():
    # kills: a function renamed; an equation's number changed in the code or in the table
    for paper, _, file, places in MAP.findall((HERE / "README.md").read_text()):
        module = importlib.import_module(file.removesuffix(".py"))
        for place in re.findall(r"`([\w.]+)`", places):
            thing = thing_of(module, place)
            assert thing is not None, f"README.md: {paper}: {file} has no {place}"
            source = inspect.getsource(thing)
            for word in ("Eq\\.", "[Ll]ines?", "Algorithm"):
                if word == "Algorithm" and "line" in paper:
                    continue                                # the line's number is enough there
                missing = named(paper, word) - named(source, word)
                assert not missing, f"README.md: {paper}: {place} does not name {sorted(missing)}"


def test_the_readmes_map_numbers_the_equations_as_the_paper_does():
    # kills: two numbers exchanged in the table; an equation or an algorithm left out
    papers = set()
    for paper, what, *_ in MAP.findall((HERE / "README.md").read_text()):
        papers |= {paper, *named(paper, "Eq\\.")}
        for n in named(paper, "Eq\\."):
            word = EQUATIONS[n]
            assert word in what, f"README.md: {paper}: {what!r} does not speak of {word!r}, Eq. {n}"
    missing = {"Algorithm 1", "Algorithm 2", *EQUATIONS} - papers
    assert not missing, f"README.md's map of the paper: not there: {missing}"


def test_the_lesson_is_compared_word_by_word_and_number_by_number():
    # kills: numbers not compared; two results that changed places; words passed over; no tolerance
    # for another CPU's sums
    said = "base 0.22\nadapemu 0.36\nadapfu 0.74\n"
    assert run_lesson.alike(said, said)
    assert run_lesson.alike(said, "base 0.23\nadapemu 0.34\nadapfu 0.78\n")
    for other in ("base 0.36\nadapemu 0.22\nadapfu 0.74\n", said.replace("0.74", "0.60"),
                  said.replace("0.74", "-0.74"), "base 0.22\nadapemu 0.36\n",
                  said.replace("adapfu", "full"), said + "1 of 2\n"):
        assert not run_lesson.alike(said, other), other
    assert not run_lesson.alike("layers 8\n", "layers 9\n"), "a whole number is a word"
    near = "0.171\n0.178\n", "0.178\n0.171\n"
    assert run_lesson.alike(*near), "less than 0.01 apart: either order"
    assert not run_lesson.alike("0.30\n0.32\n", "0.32\n0.30\n")
