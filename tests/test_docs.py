"""What README.md says of the code."""
import importlib
import inspect
import re

from tests.common import HERE

MAP = re.compile(r"^\| (Eq\. [\d–-]+|Algorithm [12](?:, lines? [\d–-]+)?|AdapEmu, AdapFu) "
                 r"\| (.*) \| `(\w+\.py)`: (.*) \|$", re.MULTILINE)


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


def test_the_readmes_map_holds_all_of_the_paper():
    # kills: an equation or an algorithm left out
    papers = [paper for paper, *_ in MAP.findall((HERE / "README.md").read_text())]
    covered = set().union(*(named(paper, "Eq\\.") for paper in papers))
    assert covered == set(range(3, 12)) and {"Algorithm 1", "Algorithm 2"} <= set(papers), covered
