"""Small versions of the eight question-answering scenarios, in the official file formats.

`files(seed)` gives {path below data/helm_qa: bytes}. The texts come from gen_qa's fixed world. What
a closed-book question asks was in pre-training; passages (split "test") were in no training.
"""
import csv
import gzip
import io
import json
import random
import zipfile

import gen_qa

ROWS = 40


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def unique(make, n, key=json.dumps) -> list:
    """n rows that differ in key(row)."""
    rows = {}
    while len(rows) < n:
        row = make()
        rows.setdefault(key(row), row)
    return list(rows.values())


def lower(ask: str) -> str:
    """The question as typed into a search engine: no capital at its start, no question mark.

    Names keep their capitals, because the model has only seen them written so.
    """
    return ask[0].lower() + ask[1:].rstrip("?")


def mmlu_row(rng, subject: str) -> list:
    if subject == "elementary_mathematics":
        m, n = rng.randint(11, 99), rng.randint(11, 99)
        options = rng.sample([m + n + d for d in (-10, -2, 1, 10, 20)], 3) + [m + n]
        rng.shuffle(options)
        return [f"What is {m}+{n}?", *options, "ABCD"[options.index(m + n)]]
    while True:
        ask, options, k = gen_qa.choices(rng, "test")
        if (subject == "high_school_geography") == ask.startswith(("The capital", "People")):
            return [ask, *options, "ABCD"[k]]


def mmlu(rng) -> dict:
    """CSV without a header: question, four options, the letter of the right one."""
    out = {}
    for subject in ("elementary_mathematics", "high_school_geography", "miscellaneous"):
        rows = unique(lambda: mmlu_row(rng, subject), 5 + ROWS)
        for split, part in (("dev", rows[:5]), ("test", rows[5:])):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(part)
            out[f"mmlu/{split}/{subject}_{split}.csv"] = text.getvalue().encode()
    return out


def boolq(rng) -> dict:
    """Yes or no, about a passage whose first sentence says it."""
    def row():
        _, ask, _, long, short = gen_qa.question(rng, "test", "general_qa")
        passage = gen_qa.question(rng, "test", "closed_qa")[2]
        return {"question": lower(ask), "passage": f"{long.split('. ')[1]} {passage}",
                "label": "true" if short == "Yes" else "false"}

    rows = unique(row, ROWS, lambda r: r["question"])
    return {"boolq/val.jsonl": jsonl({**r, "idx": i} for i, r in enumerate(rows))}


def nq_open(rng) -> dict:
    """Closed book: question and answers. Open book: the same questions with the gold passage."""
    rows = unique(lambda: gen_qa.question(rng, "test", "open_qa"), ROWS)
    closed = [{"question": lower(ask), "answer": [short]} for _, ask, _, _, short in rows]
    opened = []
    for _, ask, _, long, short in rows:
        title = long.split(" is ")[0].split(" eat ")[0]
        passage = {"title": title, "text": long, "hasanswer": True, "isgold": True}
        gold = {"title": title, "long_answer": long, "short_answers": [short]}
        opened.append({"question": lower(ask), "answers": [short], "ctxs": [passage],
                       "nq_annotated_gold": gold})
    return {"nq_open/NQ-open.dev.jsonl": jsonl(closed),
            "nq_open/nq-open-oracle.jsonl.gz": gzip.compress(jsonl(opened), mtime=0)}


def narrativeqa(rng) -> dict:
    """One JSON list in a zip archive; texts are tokenised: spaces stand around punctuation."""
    def apart(text):
        return text.replace(".", " .").replace("?", " ?")

    def row():
        _, ask, text, long, short = gen_qa.question(rng, "test", "closed_qa")
        words = apart(text).split()
        at = words.index(short)
        return {"context.tokens": apart(text), "question.tokens": apart(ask),
                "answers": [short, [[at, at + 1]]], "ground_truths": [short, apart(f"{short}.")]}

    rows = [{**r, "_id": f"{i:040x}"} for i, r in enumerate(unique(row, ROWS))]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo("test.json", (2000, 1, 1, 0, 0, 0))     # the same bytes every day
        archive.writestr(entry, json.dumps(rows))
    return {"narrativeqa/test.json.zip": packed.getvalue()}


def quac_dialogue(rng, number: int) -> dict:
    while True:
        text, asked, (title, _), _ = gen_qa.portrait(rng)
        if gen_qa.split_of(text) == "test":
            break
    name, turns = f"C_{number:032x}_0", []
    for i, (ask, _, short) in enumerate(asked):
        answer = {"text": short, "answer_start": text.index(short)}
        turns.append({"id": f"{name}_q#{i}", "question": ask, "orig_answer": answer,
                      "answers": [answer], "yesno": "x",
                      "followup": "y" if i + 1 < len(asked) else "n"})
    paragraph = {"id": name, "context": f"{text} CANNOTANSWER", "qas": turns}
    return {"title": title, "section_title": "Life", "background": "", "paragraphs": [paragraph]}


def quac(rng) -> dict:
    """Dialogues about one passage; contexts end in CANNOTANSWER as the official ones do."""
    data = [quac_dialogue(rng, n) for n in range(12)]
    return {"quac/quac_sample.json": json.dumps({"data": data}, indent=1).encode()}


def hellaswag(rng) -> dict:
    """A context and four endings, of which one is true in the fixed world."""
    rows, asked = [], unique(lambda: gen_qa.choices(rng, "test"), ROWS)
    for i, (ask, options, k) in enumerate(asked):
        first = f"{rng.choice(gen_qa.PEOPLE)} asks a question."
        rows.append({
            "ind": i,
            "activity_label": "Answering",
            "ctx_a": first,
            "ctx_b": ask,
            "ctx": f"{first} {ask}",
            "split": "val",
            "split_type": "indomain",
            "label": k,
            "endings": [f"{o}." for o in options],
            "source_id": f"tiny~{i}",
        })
    return {"hellaswag/hellaswag_val.jsonl": jsonl(rows)}


def openbookqa(rng) -> dict:
    """Tab-separated lines under a header; "Complete Question" has the options behind the stem."""
    out, rows = {}, unique(lambda: gen_qa.choices(rng, "test"), 2 * ROWS)
    for split, part in (("dev", rows[:ROWS]), ("test", rows[ROWS:])):
        lines = ["ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key"]
        for i, (ask, options, k) in enumerate(part):
            listed = " ".join(f"({letter}) {o}" for letter, o in zip("ABCD", options))
            lines.append(f"{split}-{i}\t{ask}\t{listed}\t{ask} {listed}\t{'ABCD'[k]}")
        out[f"openbookqa/{split}.tsv"] = ("\n".join(lines) + "\n").encode()
    return out


def files(seed: int) -> dict[str, bytes]:
    """{path below data/helm_qa: the file's bytes}. Each scenario has its own random stream."""
    found = {}
    for scenario in (mmlu, boolq, narrativeqa, nq_open, quac, hellaswag, openbookqa):
        found |= scenario(random.Random(f"{seed} {scenario.__name__}"))
    return found
