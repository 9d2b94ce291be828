"""Data: prompts, masks, tasks and their partitions, the public set, files and downloads.

In order: files (official formats, pinned downloads); tasks (rows of instruction, input, output,
label); Examples (token ids and where the answer begins); partition; Batch and Shard (what a client,
or the server, draws its batches from). FedBiOT section 5.1 and appendix; Alpaca's prompt template.

    shards = make_shards("gsm8k", "tiny/data", tokenizer, clients=3, max_len=256, seed=0)
"""
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import UserError

# ---- files --------------------------------------------------------------------------------------

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
LARGEST = 2**31         # bytes of a data file once unpacked: more is no data set but a gzip bomb


def find_file(data_dir, name: str) -> Path:
    """data_dir/name. What the user placed is used as it is; what is missing is downloaded once."""
    path = Path(data_dir) / name
    if path.is_file():
        return path
    if name not in SOURCES:
        raise UserError(f"{path}: no such file; --data-dir needs it there (the README says where "
                        f"it comes from)")
    url, check = SOURCES[name]
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(url, part)
        verify(part, url, check)
        part.rename(path)
    except OSError as error:                            # urllib's errors are OSErrors
        raise UserError(f"{path}: not there, and {url} cannot be fetched ({error}); download it to "
                        f"that path") from None
    finally:
        with contextlib.suppress(OSError):              # --data-dir is a file
            part.unlink()
    return path


def download(url: str, path: Path):
    with urllib.request.urlopen(url, timeout=60) as answer, open(path, "wb") as file:
        size, name = int(answer.headers.get("Content-Length") or 0) or None, Path(url).name
        with tqdm(None, f"download {name}", size, unit="B", unit_scale=True, disable=None) as bar:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))


def verify(path: Path, url: str, check):
    """`check` is the sha256, or the number of rows, or None: that it can be read is enough."""
    if isinstance(check, str):
        kind, found = "sha256", hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        kind, found = "rows:", len(read_rows(path, Path(url).name))
    if check not in (None, found):
        raise UserError(f"{url}: expected {kind} {check}, the download has {found}; try again, or "
                        f"place the file by hand")


def read_text(path: Path, name: str) -> str:
    """A file's text, unpacked where `name` ends in .gz or .zip (first member); at most LARGEST."""
    try:
        if name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
                blob = file.read(LARGEST + 1)
        else:
            with (gzip.open if name.endswith(".gz") else open)(path, "rb") as file:
                blob = file.read(LARGEST + 1)
        text = blob.decode()
    except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error, zipfile.BadZipFile, LookupError,
            NotImplementedError, RuntimeError) as error:        # the last: an encrypted archive
        packed = "packed " if name.endswith((".gz", ".zip")) else ""
        raise UserError(f"{path}: cannot be read as {packed}UTF-8 text: {error}") from None
    if len(blob) > LARGEST:
        raise UserError(f"{path}: expected at most {LARGEST:,} bytes once unpacked, it has more")
    return text


def read_rows(path: Path, name: str | None = None) -> list:
    """The objects of a .jsonl or .json (an array) file, packed or not, or the lists of texts of a
    .csv or .tsv; `name` tells the format where path does not."""
    name = name or path.name
    text = read_text(path, name)
    if name.endswith((".csv", ".tsv")):
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name[-3:] == "tsv" else {}
        try:
            return [row for row in csv.reader(io.StringIO(text, newline=""), **form) if row]
        except csv.Error as error:
            raise UserError(f"{path}: not a table in {name[-3:]} format: {error}") from None
    if name.removesuffix(".zip").endswith(".json"):
        rows = parse(text, path, "")
        rows = rows.get("data", rows) if isinstance(rows, dict) else rows   # SQuAD's form, QuAC's
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a JSON array, found {type(rows).__name__}")
        where = [f"{path}, row {i}" for i in range(1, len(rows) + 1)]
    else:
        numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [parse(line, path, f", line {i}") for i, line in numbered]
        where = [f"{path}, line {i}" for i, _ in numbered]
    for place, row in zip(where, rows):
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return rows


def parse(text: str, path, place: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:       # ValueError: also a number of 5,000 digits
        raise UserError(f"{path}{place}: malformed JSON: {error}") from None


def fields(rows: list[dict], path, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named text fields of every row, each of which must be there."""
    for i, row in enumerate(rows, 1):
        for name in names:
            if not isinstance(row.get(name), str):
                raise UserError(f"{path}, row {i}: expected a text field {name!r}, found "
                                f"{sorted(row)[:8]}")
    return [tuple(row[name] for name in names) for row in rows]


# ---- tasks --------------------------------------------------------------------------------------

class Row(NamedTuple):
    instruction: str
    input: str
    output: str
    label: str = ""             # what a task is partitioned by; "": i.i.d.


PREAMBLE = ("Below is an instruction that describes a task{}. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{}\n\n")
WITH_INPUT = ", paired with an input that provides further context"
CLIENTS = {"gsm8k": 3, "rosetta": 9, "dolly": 8}        # the paper's numbers of clients
MAX_LEN = {"gsm8k": 512, "rosetta": 1024, "dolly": 1024}


def prompt_of(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's template up to where the answer begins."""
    if input:
        return PREAMBLE.format(WITH_INPUT, instruction) + f"### Input:\n{input}\n\n### Response:"
    return PREAMBLE.format("", instruction) + "### Response:"


def read_gsm8k(data_dir, split: str = "train") -> list[Row]:
    path = find_file(data_dir, f"gsm8k/{split}.jsonl")
    pairs = fields(read_rows(path), path, ("question", "answer"))
    return [Row(q, "", answer.replace("####", "The answer is")) for q, answer in pairs]


def read_rosetta(data_dir) -> list[Row]:
    """One label (the paper's nine after dropping `X86-64 Assembly`) a programming language."""
    path = find_file(data_dir, "rosetta/rosetta_alpaca.json")
    triples = fields(read_rows(path), path, ("instruction", "input", "output"))
    rows = [Row(*t, label=t[1]) for t in triples if t[1] != "X86-64 Assembly"]
    if left := len(triples) - len(rows):
        print(f"note: {path.name}: {left} rows in X86-64 Assembly left out, as in the paper",
              file=sys.stderr)
    return rows


def read_dolly(data_dir) -> list[Row]:
    path = find_file(data_dir, "dolly/databricks-dolly-15k.jsonl")
    names = ("instruction", "context", "response", "category")
    return [Row(*t) for t in fields(read_rows(path), path, names)]


def read_alpaca(data_dir) -> list[Row]:
    """The server's public set, the same for all tasks."""
    path = find_file(data_dir, "alpaca/alpaca_data.json")
    return [Row(*t) for t in fields(read_rows(path), path, ("instruction", "input", "output"))]


READERS = {"gsm8k": read_gsm8k, "rosetta": read_rosetta, "dolly": read_dolly}


# ---- examples -----------------------------------------------------------------------------------

class Example(NamedTuple):
    ids: list[int]              # BOS, prompt, answer, EOS
    answer: int                 # ids[answer:] are the targets


class Examples:
    """Rows as token ids of at most max_len, tokenised when first asked for: a run starts at once.

    Prompt and answer are tokenised apart, so that the boundary is exact. A row whose prompt alone
    fills max_len would have no target: it is dropped, and the number of those printed.
    """
    def __init__(self, rows: list[Row], tokenizer, max_len: int, what: str):
        self.tokenizer, self.max_len, self.cache = tokenizer, max_len, {}
        self.template = len(tokenizer.encode(prompt_of("?", "?")))
        self.rows = [row for row in rows if self.fits(row)]
        if not self.rows:
            raise UserError(f"{what}: no example fits --max-len {max_len}; raise it" if rows else
                            f"{what}: the file has no rows; expected at least one")
        dropped = len(rows) - len(self.rows)
        if dropped:
            print(f"note: {what}: {dropped} of {len(rows)} examples dropped, their prompts fill "
                  f"--max-len {max_len}", file=sys.stderr)

    def fits(self, row: Row) -> bool:
        """Does BOS + prompt leave room? A text has no more tokens than bytes (32 to spare for what
        merges where it meets the template); a long one mostly has too many in its first part (a cut
        piece: 100 at most)."""
        size = len(row.instruction.encode()) + len(row.input.encode())
        if self.template + size + 32 < self.max_len:
            return True
        prompt = prompt_of(row.instruction, row.input)
        start, encode = prompt[:5 * self.max_len], self.tokenizer.encode
        if len(start) < len(prompt) and len(encode(start)) > self.max_len + 100:
            return False
        return len(encode(prompt)) + 1 < self.max_len

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        if i not in self.cache:
            row, tokenizer = self.rows[i], self.tokenizer
            prompt = [tokenizer.bos] + tokenizer.encode(prompt_of(row.instruction, row.input))
            answer = tokenizer.encode(row.output) + [tokenizer.eos]
            self.cache[i] = Example((prompt + answer)[:self.max_len], len(prompt))
        return self.cache[i]


def partition(labels: list[str], clients: int, seed: int) -> list[list[int]]:
    """Index lists, one a client, every row in exactly one. Rows without labels: i.i.d., sizes
    differing by at most one. Labels: one a client; more labels than clients share (the smallest
    join up), fewer are split (the largest first)."""
    if clients < 1 or clients > len(labels):
        raise UserError(f"--clients {clients}: there are {len(labels)} training examples, so "
                        f"choose 1..{len(labels)}")
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    groups: dict[str, list[int]] = {}
    for i in order:
        groups.setdefault(labels[i], []).append(i)
    if len(groups) == 1:
        return [chunk.tolist() for chunk in np.array_split(order, clients)]
    parts = sorted(groups.values(), key=len, reverse=True)
    if len(parts) > clients:
        print(f"note: {len(parts)} labels for {clients} clients: the smallest share a client; no "
              f"row is left out", file=sys.stderr)
    while len(parts) > clients:
        parts[-2:] = [parts[-2] + parts[-1]]
        parts.sort(key=len, reverse=True)
    while len(parts) < clients:
        largest = parts.pop(0)
        parts += [largest[::2], largest[1::2]]
        parts.sort(key=len, reverse=True)
    return parts


# ---- batches ------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """B sequences, right-padded to T. The N rows are positions b T + t that predict an answer's
    token; N is padded to a multiple of 128 with rows of weight 0, so that few shapes occur."""
    tokens: Tensor              # (B, T) int64
    rows: Tensor                # (N,) int64
    targets: Tensor             # (N,) int64
    weights: Tensor             # (N,) fp32, their sum is 1

    def to(self, device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self))


def collate(examples: list[Example]) -> Batch:
    width = max(len(e.ids) for e in examples) - 1           # the last token is only a target
    tokens = torch.zeros(len(examples), width, dtype=torch.int64)
    rows, targets = [], []
    for b, e in enumerate(examples):
        tokens[b, :len(e.ids) - 1] = torch.tensor(e.ids[:-1])
        rows += range(b * width + e.answer - 1, b * width + len(e.ids) - 1)
        targets += e.ids[e.answer:]
    pad = [0] * (-len(rows) % 128)
    weights = torch.tensor([1 / len(rows)] * len(rows) + [0.0] * len(pad))
    return Batch(tokens, torch.tensor(rows + pad), torch.tensor(targets + pad), weights)


class Shard:
    """One owner's examples: a view (an index list) of the examples that all shards share."""

    def __init__(self, examples: Examples, indices: list[int]):
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, steps: int, batch_size: int, key: tuple[int, ...]):
        """`steps` batches; which and in which order is a function of `key` = (seed, round, client).

        Whole passes in random order, a new order when one is used up. Within ten batches the
        examples are sorted by length, so that little of a batch is padding.
        """
        rng = np.random.default_rng(key)
        size = min(batch_size, len(self))
        passes = max(-(-steps * size // len(self)), 1)      # steps 0: an empty draw of one
        drawn = np.concatenate([rng.permutation(len(self)) for _ in range(passes)])[:steps * size]
        width = size * min(10, len(self) // size)           # at most a pass: no copies in a batch
        for window in np.split(drawn, range(width, len(drawn), width)):
            examples = [self.examples[self.indices[i]] for i in window]
            examples.sort(key=lambda e: len(e.ids))
            for b in rng.permutation(-(-len(examples) // size)):
                yield collate(examples[b * size:(b + 1) * size])


def make_shards(task: str, data_dir, tokenizer, clients: int, max_len: int, seed: int,
                hold_out: int = 0, strip_annotations: bool = False) -> list[Shard]:
    """The clients' training data of a task, one Shard a client, without the file's last `hold_out`
    rows. GSM8K's calculator annotations `<<48/2=24>>` stay in, as in the authors' code, unless they
    are stripped."""
    rows = READERS[task](data_dir)
    if strip_annotations:
        rows = [row._replace(output=re.sub("<<[^<>]*>>", "", row.output)) for row in rows]
    rows = rows[:max(len(rows) - hold_out, 0)]
    examples = Examples(rows, tokenizer, max_len, f"{task}'s training data")
    labels = [row.label for row in examples.rows]
    return [Shard(examples, part) for part in partition(labels, clients, seed)]


def make_public(data_dir, tokenizer, max_len: int) -> Shard:
    """The server's public data."""
    examples = Examples(read_alpaca(data_dir), tokenizer, max_len, "the public data")
    return Shard(examples, list(range(len(examples))))
