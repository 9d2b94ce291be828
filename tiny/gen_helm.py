"""Small versions of the eight question-answering scenarios, in the file formats of the official ones.

`files(seed)` gives {path below data/helm_qa: bytes}. The texts come from gen_qa's fixed world: what is
asked closed-book was in pre-training, what stands in a passage was in none (split "test").
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


def unique(make, n, key=lambda row: json.dumps(row)) -> list:
    rows = {}
    while len(rows) < n:
        row = make()
        rows.setdefault(key(row), row)
    return list(rows.values())


def lower(ask: str) -> str:
    """As a search engine's user types, but names keep their capitals: the model knows them so."""
    return ask[0].lower() + ask[1:].rstrip("?")


def mmlu(rng) -> dict:
    """No header; question, four options, the letter."""
    def row(subject):
        if subject == "elementary_mathematics":
            m, n = rng.randint(11, 99), rng.randint(11, 99)
            options = rng.sample([m + n + d for d in (-10, -2, 1, 10, 20)], 3) + [m + n]
            rng.shuffle(options)
            return [f"What is {m}+{n}?", *options, "ABCD"[options.index(m + n)]]
        while True:
            ask, options, k = gen_qa.choices(rng, "test")
            if (subject == "high_school_geography") == ask.startswith(("The capital", "People")):
                return [ask, *options, "ABCD"[k]]

    out = {}
    for subject in ("elementary_mathematics", "high_school_geography", "miscellaneous"):
        rows = unique(lambda: row(subject), 5 + ROWS)
        for split, part in (("dev", rows[:5]), ("test", rows[5:])):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(part)
            out[f"mmlu/{split}/{subject}_{split}.csv"] = text.getvalue().encode()
    return out


def boolq(rng) -> dict:
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
        ctx = {"title": long.split(" is ")[0].split(" eat ")[0], "text": long, "hasanswer": True, "isgold": True}
        opened.append({"question": lower(ask), "answers": [short], "ctxs": [ctx],
                       "nq_annotated_gold": {"title": ctx["title"], "long_answer": long, "short_answers": [short]}})
    return {"nq_open/NQ-open.dev.jsonl": jsonl(closed),
            "nq_open/nq-open-oracle.jsonl.gz": gzip.compress(jsonl(opened), mtime=0)}


def narrativeqa(rng) -> dict:
    """One JSON list in a zip; texts are tokenised, so punctuation stands apart."""
    def apart(text):
        return text.replace(".", " .").replace("?", " ?")

    def row():
        _, ask, text, long, short = gen_qa.question(rng, "test", "closed_qa")
        words = apart(text).split()
        at = words.index(short)
        return {"context.tokens": apart(text), "question.tokens": apart(ask), "answers": [short, [[at, at + 1]]],
                "ground_truths": [short, apart(f"{short}.")]}
    rows = [{**r, "_id": f"{i:040x}"} for i, r in enumerate(unique(row, ROWS))]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("test.json", (2000, 1, 1, 0, 0, 0)), json.dumps(rows))
    return {"narrativeqa/test.json.zip": packed.getvalue()}


def quac(rng) -> dict:
    """Dialogues about one passage; contexts end in CANNOTANSWER as the official ones do."""
    data = []
    for n in range(12):
        while True:
            text, asked, (p, _), _ = gen_qa.portrait(rng)
            if gen_qa.split_of(text) == "test":
                break
        qas = []
        for i, (ask, _, short) in enumerate(asked):
            answer = {"text": short, "answer_start": text.index(short)}
            qas.append({"id": f"C_{n:032x}_0_q#{i}", "question": ask, "orig_answer": answer, "answers": [answer],
                        "yesno": "x", "followup": "y" if i + 1 < len(asked) else "n"})
        data.append({"title": p, "section_title": "Life", "background": "",
                     "paragraphs": [{"id": f"C_{n:032x}_0", "context": f"{text} CANNOTANSWER", "qas": qas}]})
    return {"quac/quac_sample.json": json.dumps({"data": data}, indent=1).encode()}


def hellaswag(rng) -> dict:
    """A context and four endings, of which one is true in the fixed world."""
    rows = []
    for i, (ask, options, k) in enumerate(unique(lambda: gen_qa.choices(rng, "test"), ROWS)):
        first = f"{rng.choice(gen_qa.PEOPLE)} asks a question."
        rows.append({"ind": i, "activity_label": "Answering", "ctx_a": first, "ctx_b": ask, "ctx": f"{first} {ask}",
                     "split": "val", "split_type": "indomain", "label": k, "endings": [f"{o}." for o in options],
                     "source_id": f"tiny~{i}"})
    return {"hellaswag/hellaswag_val.jsonl": jsonl(rows)}


def openbookqa(rng) -> dict:
    out, rows = {}, unique(lambda: gen_qa.choices(rng, "test"), 2 * ROWS)
    for split, part in (("dev", rows[:ROWS]), ("test", rows[ROWS:])):
        lines = ["ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key"]
        for i, (ask, options, k) in enumerate(part):
            listed = " ".join(f"({letter}) {o}" for letter, o in zip("ABCD", options))
            lines.append(f"{split}-{i}\t{ask}\t{listed}\t{ask} {listed}\t{'ABCD'[k]}")
        out[f"openbookqa/{split}.tsv"] = ("\n".join(lines) + "\n").encode()
    return out


def files(seed: int) -> dict[str, bytes]:
    return {path: data for scenario in (mmlu, boolq, narrativeqa, nq_open, quac, hellaswag, openbookqa)
            for path, data in scenario(random.Random(f"{seed} {scenario.__name__}")).items()}
