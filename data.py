"""Data: prompts, masks, tasks and partitions, the public set, batches. FedBiOT section 4.1.

    shards = make_shards("gsm8k", "tiny/data", tokenizer, clients=3, max_len=256, seed=0)
"""
import gzip
import hashlib
import io
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import UserError, clean_text, expecting, parse_json, read_bytes, room

# ---- files --------------------------------------------------------------------------------------
LARGEST = 2**31  # bytes of a data file once unpacked: more is a gzip bomb

def find_file(data_dir, name: str) -> Path:
    """data_dir/name, as the user placed it; what is missing is downloaded once."""
    path = Path(data_dir) / name
    if not os.path.exists(path):
        room("extras.download").fetch(path, name)  # pinned commits, checked, renamed
    return path

def read_rows(path: Path) -> list[dict]:
    """The objects, at least one, of a .jsonl or .json (an array) file, gzipped or not."""
    blob, name = read_bytes(path), path.name.removesuffix(".gz")
    with expecting("UTF-8 text, packed by gzip where it ends in .gz", path):
        if path.suffix == ".gz":
            blob = gzip.GzipFile(fileobj=io.BytesIO(blob)).read(LARGEST + 1)
        if len(blob) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes once unpacked")
        text = blob.decode("utf-8-sig")
    if name.endswith(".json"):
        rows = parse_json(text, path)
        rows = rows.get("data", rows) if isinstance(rows, dict) else rows  # SQuAD's form, QuAC's
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a JSON array, found {type(rows).__name__}")
    else:
        rows = [parse_json(line, f"{path}, line {i}")
                for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {i}: expected an object, found {type(row).__name__}")
    if not rows:
        raise UserError(f"{path}: the file has no rows; expected at least one")
    return rows

def texts_of(rows: list[dict], path, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named text fields of every row. Lone surrogates, which JSON allows, become U+FFFD."""
    for i, row in enumerate(rows, 1):
        for name in names:
            if not isinstance(row.get(name), str):
                raise UserError(f"{path}, row {i}: expected a text field {name!r}, found "
                                f"{sorted(row)[:8]}")
    return [tuple(clean_text(row[name]) for name in names) for row in rows]

# ---- tasks --------------------------------------------------------------------------------------
class Row(NamedTuple):
    instruction: str
    input: str
    output: str
    label: str = ""  # what a task is partitioned by; "": i.i.d.

PREAMBLE = ("Below is an instruction that describes a task{}. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{}\n\n")
WITH_INPUT = ", paired with an input that provides further context"

def prompt_of(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's template up to where the answer begins."""
    if input:
        return PREAMBLE.format(WITH_INPUT, instruction) + f"### Input:\n{input}\n\n### Response:"
    return PREAMBLE.format("", instruction) + "### Response:"

class Task(NamedTuple):
    module: str  # has read_training, prepare, score, score_predictions, report
    clients: int  # the paper's number of clients
    max_len: int  # tokens of the longest training sequence
    training: str = ""  # the training file's path in a data folder

# PAPER SILENT: the longest sequences. What is longer is cut at its end, in the answer.
TASKS = {"gsm8k": Task("eval", 3, 512, "gsm8k/train.jsonl"),
         "rosetta": Task("tasks.code", 9, 1024, "rosetta/rosetta_alpaca.json"),
         "dolly": Task("tasks.qa", 8, 1024, "dolly/databricks-dolly-15k.jsonl")}

def accuracy(predicted: list, gold: list) -> dict:
    """{"correct", "total", "accuracy"}; a prediction of None is wrong."""
    if not gold:
        raise UserError("expected test examples, found none: nothing to score")
    correct = sum(p is not None and p == g for p, g in zip(predicted, gold, strict=True))
    return {"correct": correct, "total": len(gold), "accuracy": correct / len(gold)}

# ---- examples -----------------------------------------------------------------------------------
class Example(NamedTuple):
    ids: np.ndarray | list  # BOS, prompt, answer, EOS
    answer: int  # ids[answer:] are the targets
    label: str = ""  # the row's

def make_examples(rows: list[Row], tokenizer, max_len: int, what: str) -> list[Example]:
    """Rows as at most max_len token ids. Prompt and answer are tokenised apart, so that the
    boundary is exact. A row whose prompt alone fills max_len has no target: it is dropped,
    with a note."""
    examples = []
    for start in range(0, len(rows), 4096):  # a few at a time: the lists are large
        part = rows[start:start + 4096]
        prompts = tokenizer.encode([prompt_of(row.instruction, row.input) for row in part])
        answers = tokenizer.encode([row.output for row in part])
        for row, prompt, answer in zip(part, prompts, answers):
            if len(prompt) + 1 < max_len:
                ids = [tokenizer.bos, *prompt, *answer, tokenizer.eos][:max_len]
                examples.append(Example(np.array(ids, np.int32), len(prompt) + 1, row.label))
    if not examples:
        raise UserError(f"{what}: no example fits --max-len {max_len}; raise it")
    if dropped := len(rows) - len(examples):
        print(f"note: {what}: {dropped} of {len(rows)} examples dropped, whose prompts fill "
              f"--max-len {max_len}", file=sys.stderr)
    return examples

def digest_of(examples: list[Example]) -> str:
    """A fingerprint of training data, which a resumed run must find again."""
    flat = np.concatenate([np.array([e.answer, *e.ids], np.int32) for e in examples])
    labels = "\0".join(e.label for e in examples)
    return hashlib.sha256(flat.tobytes() + labels.encode()).hexdigest()

def partition(labels: list[str], clients: int, seed: int) -> list[list[int]]:
    """Index lists, one a client; unlabelled rows: i.i.d., sizes at most 1 apart."""
    if not 1 <= clients <= len(labels):
        raise UserError(f"--clients {clients}: choose 1..{len(labels)}, the number of training "
                        f"examples")
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    if len(set(labels)) > 1:  # Rosetta's languages, Dolly's categories
        return room("tasks.partition").by_label(labels, order, clients)
    return [chunk.tolist() for chunk in np.array_split(order, clients)]

# ---- batches ------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """B sequences, right-padded to T. The N rows are positions b T + t that predict a token of
    an answer; rows of weight 0 pad N to a multiple of 128, so that few shapes occur."""
    tokens: Tensor  # (B, T) int64
    rows: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64
    weights: Tensor  # (N,) fp32, their sum is 1

    def to(self, device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self))

def collate(examples: list[Example]) -> Batch:
    width = max(len(e.ids) for e in examples) - 1  # the last token is only a target
    tokens = torch.zeros(len(examples), width, dtype=torch.int64)
    rows, targets = [], []
    for b, e in enumerate(examples):
        ids = torch.as_tensor(e.ids)
        tokens[b, :len(ids) - 1] = ids[:-1]
        rows += range(b * width + e.answer - 1, b * width + len(ids) - 1)
        targets += ids[e.answer:].tolist()
    pad = [0] * (-len(rows) % 128)
    weights = torch.tensor([1 / len(rows)] * len(rows) + [0.0] * len(pad))
    return Batch(tokens, torch.tensor(rows + pad), torch.tensor(targets + pad), weights)

class Shard:
    """One owner's examples: an index list into those that all shards share."""
    def __init__(self, examples: list[Example], indices: list[int] | None = None):
        self.examples = examples
        self.indices = list(range(len(examples))) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, steps: int, batch_size: int, key: tuple[int, ...]):
        """`steps` batches, a function of `key` = (seed, round, client). Within ten batches
        examples are sorted by length, for little padding."""
        # DIFFERS: Algorithm 2, line 4 draws at random. Here, as in the authors' code, in whole
        # passes; a batch in which two of them meet may hold an example twice.
        rng = np.random.default_rng(key)
        size = min(batch_size, len(self))
        passes = max(-(-steps * size // len(self)), 1)  # one also for no steps
        drawn = np.concatenate([rng.permutation(len(self)) for _ in range(passes)])[:steps * size]
        width = size * min(10, len(self) // size)  # at most a pass
        for window in np.split(drawn, range(width, len(drawn), width)):
            examples = [self.examples[self.indices[i]] for i in window]
            examples.sort(key=lambda e: len(e.ids))
            for b in rng.permutation(-(-len(examples) // size)):
                yield collate(examples[b * size:(b + 1) * size])

def training_examples(task: str, data_dir, tokenizer, max_len: int, hold_out: int = 0,
                      strip_annotations: bool = False) -> list[Example]:
    """A task's training file without its last `hold_out` rows. GSM8K's annotations
    `<<48/2=24>>` stay in, as in the authors' code, unless they are stripped."""
    rows = room(TASKS[task].module).read_training(data_dir)
    if hold_out >= len(rows):
        raise UserError(f"--validate {hold_out}: {task} has {len(rows)} training rows, so "
                        f"choose 0..{len(rows) - 1}")
    rows = rows[:len(rows) - hold_out]
    if strip_annotations:
        rows = [row._replace(output=re.sub("<<[^<>]*>>", "", row.output)) for row in rows]
    return make_examples(rows, tokenizer, max_len, f"{task}'s training data")

def make_shards(task: str, data_dir, tokenizer, clients: int, max_len: int, seed: int,
                hold_out: int = 0, strip_annotations: bool = False) -> list[Shard]:
    """A task's training data, one Shard a client."""
    examples = training_examples(task, data_dir, tokenizer, max_len, hold_out, strip_annotations)
    labels = [example.label for example in examples]
    return [Shard(examples, part) for part in partition(labels, clients, seed)]

def make_public(data_dir, tokenizer, max_len: int) -> Shard:
    """Alpaca's rows, for all tasks."""
    path = find_file(data_dir, "alpaca/alpaca_data.json")
    rows = [Row(*t) for t in texts_of(read_rows(path), path, ("instruction", "input", "output"))]
    return Shard(make_examples(rows, tokenizer, max_len, "the public data"))
