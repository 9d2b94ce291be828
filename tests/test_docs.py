"""docs"""
import importlib.util
import inspect
import re

from tests.common import HERE, Skip


def numbers(text: str) -> set[int]:
    """`3-5, 7` and `4 and 5` -> the numbers meant."""
    spans = re.findall(r"(\d+)(?:[-–](\d+))?", text)
    return {n for a, b in spans for n in range(int(a), int(b or a) + 1)}


def named(source: str, word: str) -> set[int]:
    return {n for found in re.findall(word + r" (\d+(?:(?:, | and |[-–])\d+)*)", source) for n in numbers(found)}


def test_the_readmes_map_of_the_paper_points_at_code_that_says_so():
    # kills: a function renamed; an equation's number changed in the code or in the table; an equation left out
    text = (HERE / "README.md").read_text() if (HERE / "README.md").is_file() else ""
    rows = re.findall(r"^\| (Eq\. [\d–-]+|Algorithm [12](?:, lines? [\d–-]+)?|AdapEmu, AdapFu) \|.*\| `(\w+\.py)`: (.*) \|$", text, re.M)
    if not rows:
        raise Skip("README.md has no map of the paper yet")
    for paper, file, places in rows:
        module = importlib.import_module(file.removesuffix(".py"))
        for place in re.findall(r"`([\w.]+)`", places):
            thing = module
            for part in place.split("."):
                assert hasattr(thing, part), f"README.md: {paper}: {file} has no {place}"
                thing = getattr(thing, part)
            source = inspect.getsource(thing)
            for word, where in (("Eq\\.", "Eq\\."), ("lines?", "[Ll]ines?"), ("Algorithm", "Algorithm")):
                wanted = named(paper, word) if word != "Algorithm" or "line" not in paper else set()
                assert wanted <= named(source, where), f"README.md: {paper}: {place} names {sorted(named(source, where))}"
    covered = {n for paper, *_ in rows for n in named(paper, "Eq\\.")}
    assert covered == set(range(3, 12)) and {"Algorithm 1", "Algorithm 2"} <= {r[0] for r in rows}, covered
