"""Prompts, masks, partitions, batches, and the files that rows come from."""
import contextlib
import hashlib
import io
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

import data
import eval as evaluation
from extras import download
from tests.common import folder, gsm8k_folder, refused, tokenizer, toy_examples

ROWS = [data.Row("Add 1 and 2.", "", "1+2=3\nThe answer is 3"),
        data.Row("Translate.", "un deux", "one two"), data.Row("Say nothing.", "", ""),
        data.Row("Odd: é ﷺ \t𝔘", "", "  ünï\n\n "), data.Row("</s> <s>", "", "</s>x<s>")]


# ---- examples -----------------------------------------------------------------------------------

def test_prompts_are_alpacas():
    # kills: one more space
    assert data.prompt_of("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it.\n\n### Response:")
    assert data.prompt_of("Do it.", "With this.") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo it.\n\n### Input:\nWith this.\n\n### Response:")


def test_examples_are_bos_prompt_answer_eos():
    # kills: BOS twice; no EOS; answer off by one
    t = tokenizer()
    rows = [ROWS[0]._replace(label="maths"), *ROWS[1:]]
    for row, (ids, answer, label) in zip(rows, data.make_examples(rows, t, 999, "rows")):
        ids = ids.tolist()
        assert label == row.label
        prompt = t.encode(data.prompt_of(row.instruction, row.input))
        assert ids[:answer] == [t.bos] + prompt, "what evaluation will feed the model"
        assert (ids.count(t.bos), ids.count(t.eos), ids[-1]) == (1, 1, t.eos)
        assert t.decode(ids[answer:-1]) == row.output
        assert t.decode(prompt) == data.prompt_of(row.instruction, row.input)


def test_masks_are_right_at_the_token_level():
    # kills: rows one late; N not padded; padding rows weighted
    examples = data.make_examples(ROWS, tokenizer(), 999, "rows")
    batch = data.collate(examples)
    width, real = batch.tokens.shape[1], batch.weights > 0
    wanted = [(b, t) for b, e in enumerate(examples) for t in range(e.answer, len(e.ids))]
    found = [(r // width, r % width + 1) for r in batch.rows[real].tolist()]
    assert found == wanted, "each token of the answer, EOS too, is predicted from the one before it"
    assert batch.targets[real].tolist() == [examples[b].ids[t] for b, t in wanted]
    for row, e in zip(batch.tokens, examples):
        assert row[:len(e.ids) - 1].tolist() == e.ids[:-1].tolist()
    assert width == max(len(e.ids) for e in examples) - 1
    n = len(batch.rows)
    assert n % 128 == 0 and n == len(batch.targets) == len(batch.weights)
    assert torch.allclose(batch.weights[real], torch.tensor(1 / len(wanted)))
    assert batch.weights.dtype == torch.float32 and (batch.weights[~real] == 0).all()
    assert batch.rows.max() < batch.tokens.numel()


def test_truncation_keeps_a_target_and_drops_with_a_count_what_would_have_none():
    # kills: fits with <=; count not printed; the row after a dropped one left out
    t = tokenizer()
    row = data.Row("Add 1 and 2, é.", "", "The answer is 3, and then a little more of it")
    start = data.make_examples([row], t, 999, "x")[0].answer
    for extra in (1, 2, 5):
        cut = data.make_examples([row], t, start + extra, "x")[0]
        assert (len(cut.ids), cut.answer) == (start + extra, start)
        assert len(data.collate([cut]).weights) == 128
    short = data.Row("A", "", "b")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        kept, = data.make_examples([row, short, row], t, start, "the set")
    assert t.decode(kept.ids[kept.answer:-1].tolist()) == "b"
    assert "the set: 2 of 3" in err.getvalue()
    for rows in ([row], []):
        refused(lambda: data.make_examples(rows, t, start, "the set"), "the set",
                f"--max-len {start}")


def test_a_row_fits_where_its_prompt_is_shorter_than_max_len():
    # kills: fits with <=, or with the answer's length
    t = tokenizer()
    for text, more in (("é" * 300, ""), ("ﷺ" * 9, "é" * 90), ("abc " * 9, "\u0301x"), ("", "")):
        n, row = len(t.encode(data.prompt_of(text, more))) + 1, data.Row(text, more, "x" * 9)
        for max_len in (10, n - 1, n):
            refused(lambda: data.make_examples([row], t, max_len, "x"), f"--max-len {max_len}")
        for max_len in (n + 1, n + 2, 2 * n):
            assert len(data.make_examples([row], t, max_len, "x")) == 1, (text, n)


# ---- partitions and batches ---------------------------------------------------------------------

def test_partition_is_iid_without_labels():
    # kills: array_split of unshuffled rows
    parts = data.partition([""] * 7473, 3, 0)
    assert [len(p) for p in parts] == [2491] * 3 and sorted(sum(parts, [])) == list(range(7473))
    assert abs(np.mean(parts[0]) - 3736) < 200, "i.i.d., not consecutive"
    assert [len(p) for p in data.partition([""] * 11, 4, 0)] == [3, 3, 3, 2]
    assert parts == data.partition([""] * 7473, 3, 0) != data.partition([""] * 7473, 3, 1)


def test_partition_is_by_label_where_there_are_labels():
    # kills: smallest label lost; largest not split
    labels = "a" * 10 + "b" * 7 + "cc" + "d"
    for clients, expected in ((4, ["a" * 10, "b" * 7, "cc", "d"]), (3, ["a" * 10, "b" * 7, "ccd"]),
                              (5, ["aaaaa", "aaaaa", "b" * 7, "cc", "d"]), (1, [labels])):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            parts = data.partition(list(labels), clients, 0)
        assert sorted("".join(sorted(labels[i] for i in p)) for p in parts) == expected, clients
        assert sorted(sum(parts, [])) == list(range(20))
        assert ("4 labels" in err.getvalue()) == (clients < 4)
    for clients in (0, 21):
        refused(lambda: data.partition(list(labels), clients, 0), f"--clients {clients}", "1..20")


def drawn(shard, *args):
    """Which examples each batch holds, by the token that tells them apart."""
    return [tuple(row[1].item() - 3 for row in b.tokens) for b in shard.batches(*args)]


def test_batches_depend_only_on_their_key():
    # kills: global generator; key without the round; key without the client
    examples = toy_examples()
    shard, twin = (data.Shard(examples, list(range(5, 25))) for _ in range(2))
    before = drawn(shard, 7, 4, (0, 3, 1))
    torch.manual_seed(5), np.random.seed(5), drawn(shard, 3, 4, (0, 3, 2))
    assert before == drawn(shard, 7, 4, (0, 3, 1)) == drawn(twin, 7, 4, (0, 3, 1))
    others = [drawn(shard, 7, 4, key) for key in ((0, 3, 2), (0, 4, 1), (1, 3, 1), (3, 0, 1))]
    assert all(other != before for other in others)


def test_batches_pass_over_all_examples_in_windows_of_like_length():
    # kills: drawn with replacement; not sorted; batches in order of length; a window of several
    # passes; steps 0 an error
    examples = toy_examples(90, longest=120)
    shard = data.Shard(examples, list(range(10, 90)))
    batches = drawn(shard, 40, 4, (0, 0, 0))
    assert [len(b) for b in batches] == [4] * 40
    assert Counter(sum(batches, ())) == dict.fromkeys(range(10, 90), 2)
    assert Counter(sum(batches[:20], ())) == dict.fromkeys(range(10, 90), 1)

    def padding(batches):
        lengths = [[len(examples[i].ids) for i in b] for b in batches]
        return sum(max(n) * len(n) - sum(n) for n in lengths)
    plain = np.random.default_rng(0).permutation(range(10, 90)).reshape(20, 4).tolist()
    assert padding(batches[:20]) < 0.4 * padding(plain)
    widths = [max(len(examples[i].ids) for i in b) for b in batches[:10]]
    up = sorted(widths)
    assert widths not in (up, up[::-1]), "short ones first would be a curriculum"
    small = data.Shard(examples, [3, 4, 5])
    assert [sorted(b) for b in drawn(small, 4, 10, (0, 0, 0))] == [[3, 4, 5]] * 4
    assert drawn(small, 0, 10, (0, 0, 0)) == []


# ---- files --------------------------------------------------------------------------------------

def test_official_files_become_rows():
    # kills: #### kept
    with folder() as path:
        gsm8k_folder(path)
        train, test = evaluation.read_training(path), evaluation.read_pairs(path, "test")
        assert train[3] == ("What is 3 and 3?", "", "3+3=<<3+3=6>>6\nThe answer is 6", "")
        assert (len(train), len(test)) == (30, 4)
        shards = data.make_shards("gsm8k", path, tokenizer(), 3, 512, 0)
        assert [len(s) for s in shards] == [10] * 3
        t, public = tokenizer(), data.make_public(path, tokenizer(), 512)
        ids = public.examples[1].ids[1:-1].tolist()
        assert len(public) == 25
        assert t.decode(ids).split() == (data.prompt_of("Repeat 1.", "twice") + " 1 1").split()


def test_malformed_data_names_the_file_and_the_line():
    # kills: blank lines not counted; fields unchecked; a byte order mark taken for an error
    good = b'{"question": "q", "answer": "#### 1"}\n'
    with folder() as path:
        gsm8k_folder(path)
        for text, *words in ((good + b'\n{"question": \n' + good, "train.jsonl, line 3"),
                             (good + b"3\n", "train.jsonl, row 2", "int"),
                             (good * 4 + b'{"question": "q"}', "train.jsonl", "row 5", "'answer'"),
                             (good + b'{"question": "q", "answer": 1}', "train.jsonl", "row 2"),
                             (b"", "no rows"), (b"\n\n", "no rows"),
                             (b"[" * 10**6, "train.jsonl", "line 1"),
                             (b"\xff\xfe{", "train.jsonl", "UTF-8")):
            (path / "gsm8k" / "train.jsonl").write_bytes(text)
            refused(lambda: data.make_shards("gsm8k", path, tokenizer(), 1, 512, 0), *words)
        for text, *words in (("{}", "array"), ("[1]", "row 1"), ("[", "expected JSON"),
                             ("[{}]", "'instruction'"), ("[]", "no rows")):
            (path / "alpaca" / "alpaca_data.json").write_text(text)
            refused(lambda: data.make_public(path, tokenizer(), 512), *words)
        (path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + good)     # the mark of Windows' editors
        assert data.read_rows(path / "x.jsonl") == [{"question": "q", "answer": "#### 1"}]
        (path / "x.jsonl.gz").write_bytes(b"\x1f\x8b\x08junk")
        refused(lambda: data.read_rows(path / "x.jsonl.gz"), "x.jsonl.gz")


def test_missing_files_are_fetched_once_checked_and_renamed():
    # kills: checksum not compared; rows not counted; written in place; the user's own file
    # replaced; a download that ended early
    name, content = "gsm8k/train.jsonl", b'{"question": "q", "answer": "#### 1"}\n'
    sha = hashlib.sha256(content).hexdigest()

    def offered(url, check):
        return patch.dict(download.SOURCES, {name: (url, check)})
    with folder() as path, contextlib.redirect_stderr(io.StringIO()):
        (path / "origin").write_bytes(content)
        url = (path / "origin").as_uri()
        for check in (sha, 1, None):
            with offered(url, check), folder() as target:
                assert data.find_file(target, name).read_bytes() == content
                assert [p.name for p in (target / "gsm8k").iterdir()] == ["train.jsonl"]
        for check, word in (("0" * 64, "sha256"), (7, "rows: 7")):
            with offered(url, check), folder() as target:
                refused(lambda: data.find_file(target, name), word, url)
                assert list((target / "gsm8k").iterdir()) == []
                (target / name).write_text("mine")          # what the user placed is used as it is
                assert data.find_file(target, name).read_text() == "mine"
        for check in (1, None):                             # rows that can be read, and not all
            parts = iter((content, b""))
            answer = contextlib.nullcontext(SimpleNamespace(
                headers={"Content-Length": len(content) + 1}, read=lambda n: next(parts)))
            with offered(url, check), folder() as target, patch.object(
                    download.urllib.request, "urlopen", lambda *a, **k: answer):
                refused(lambda: data.find_file(target, name), "38 of 39 bytes", url)
                assert list((target / "gsm8k").iterdir()) == []
        dead = "http://127.0.0.1:9/train.jsonl"             # the discard port: refused at once
        with offered(dead, sha), folder() as target:
            refused(lambda: data.find_file(target, name), dead, target / name)
        refused(lambda: data.find_file(path, "helm_qa/none.jsonl"), path / "helm_qa/none.jsonl")


def test_a_digest_knows_tokens_masks_and_labels():
    # kills: labels left out: other categories are another partition
    one = data.Example([1, 2, 3], 2, "a")
    others = [one._replace(ids=[1, 2, 4]), one._replace(answer=1), one._replace(label="b")]
    assert len({data.digest_of([example, one]) for example in [one, *others]}) == 4
