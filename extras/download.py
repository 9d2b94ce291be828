"""The official data files: pinned commits, fetched once, checked, renamed into place.

    fetch(Path("data/gsm8k/train.jsonl"), "gsm8k/train.jsonl")
"""
import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from data import read_rows
from model import UserError, replacing

GITHUB = "https://raw.githubusercontent.com/"
CODEGEEX = (GITHUB + "THUDM/CodeGeeX/e64e88e40a73358bb4ad60ef24114355e7141880/"
            "codegeex/benchmark/humaneval-x/")
GRADE_SCHOOL = (GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
                "grade_school_math/data/")
SOURCES = {             # path in --data-dir: (pinned URL, sha256 or number of rows of the download)
    "gsm8k/train.jsonl": (GRADE_SCHOOL + "train.jsonl",
                          "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "gsm8k/test.jsonl": (GRADE_SCHOOL + "test.jsonl",
                         "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    "alpaca/alpaca_data.json": (GITHUB + "tatsu-lab/stanford_alpaca/"
                                "761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json", 52002),
    "rosetta/rosetta_alpaca.json": (
        GITHUB + "sahil280114/codealpaca/d269da106a579a623a654529b3cb91b5dfa9c72f/data/"
        "rosetta_alpaca.json", None),
    "dolly/databricks-dolly-15k.jsonl": (
        GITHUB + "databrickslabs/dolly/d000e3030970379aabbf6d291f50ffdd3b715b64/data/"
        "databricks-dolly-15k.jsonl", None),
    **{f"humaneval_x/{lang}/humaneval_{lang}.jsonl.gz": (
        f"{CODEGEEX}{lang}/data/humaneval_{lang}.jsonl.gz", 164)
       for lang in ("python", "cpp", "go", "java")},
    "humaneval_x/go/evaluation/vendor.tar.gz": (
        CODEGEEX + "go/evaluation/vendor.tar.gz",
        "46dcd59eb54c4eb2ee36e9dbd64be55628e3e19b1a8e87c3b1f74700a81ccfd5"),
}


def fetch(path: Path, name: str):
    """Downloads SOURCES[name] to `path`; with no network the error names the URL and the path."""
    if name not in SOURCES:
        raise UserError(f"{path}: no such file; --data-dir needs it there (docs/formats.md says "
                        f"where it comes from)")
    url, check = SOURCES[name]
    with contextlib.ExitStack() as stack:
        with fetching(path, url):
            answer = stack.enter_context(urllib.request.urlopen(url, timeout=60))
        part = stack.enter_context(replacing(path))     # no folder before there is something
        with fetching(path, url), open(part, "xb") as file:
            download(answer, file, Path(url).name)
        verify(part, url, check)


@contextlib.contextmanager
def fetching(path: Path, url: str):
    """A failed transfer in the block becomes one line: what is missing, and where it comes from."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:       # urllib's are OSErrors
        raise UserError(f"{path}: not there, and {url} cannot be fetched ({error}); download it to "
                        f"that path") from None


def download(answer, file, name: str):
    size = int(answer.headers.get("Content-Length") or 0) or None
    with tqdm(None, f"download {name}", size, unit="B", unit_scale=True, disable=None) as bar:
        while block := answer.read(1 << 20):
            file.write(block)
            bar.update(len(block))
    if size and file.tell() != size:                # read() ends without a word where the wire does
        raise OSError(f"{file.tell():,} of {size:,} bytes came")
    file.flush()
    os.fsync(file.fileno())


def verify(path: Path, url: str, check):
    """`check` is the sha256, or the number of rows, or None: that it can be read is enough."""
    if isinstance(check, str):
        kind, found = "sha256", hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        kind, found = "rows:", len(read_rows(path))
    if check not in (None, found):
        raise UserError(f"{url}: expected {kind} {check}, the download has {found}; try again, or "
                        f"place the file by hand")
