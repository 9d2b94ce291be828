"""Question answering: HELM's files, metrics and prompts, and answers scored by them."""
import contextlib
import gzip
import io
import json
import math
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

import data
import model
from tasks import qa
from tests.common import (BUNDLED_TOKENIZER, HERE, folder, off, random_tokens, refused,
                          slow_forward, tiny_lm)

ABSTAIN = ["CANNOTANSWER", "Not enough information", "Cannot answer", "Do not know"]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zipped(content, name="test.json") -> bytes:
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._test.json", b"\x00\x05\x16\x07")       # what a Mac adds
        archive.writestr(name, json.dumps(content))
    return blob.getvalue()


def turn(i: int, text: str, *others: str) -> dict:
    return {"question": f"Q{i}?", "orig_answer": {"text": text},
            "answers": [{"text": answer} for answer in (text, *others)]}


STORY = {"context.tokens": "Ann did n't go ( yet ) .", "question.tokens": "Who did n't go ?",
         "ground_truths": ["Ann .", "ann 's"]}
TURNS = [turn(0, "one", "x"), turn(1, "CANNOTANSWER", "x"), turn(2, "three", "x"),
         turn(3, "CANNOTANSWER", "CANNOTANSWER")]
QUAC = {"title": "T", "section_title": "S", "background": "",
        "paragraphs": [{"context": "It is so. CANNOTANSWER", "qas": TURNS}]}
OPEN = {"question": "who IS it", "answers": ["Ann"], "ctxs": [{"title": "t", "text": "Ann did."}]}
GOLF = {"activity_label": "Golf", "ctx_a": "He swings.", "ctx_b": "then he", "label": 2,
        "endings": ["runs.", "eats it all.", "sits", "stands up"]}
TABLE = "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n" + "".join(
    f'1-{i}\t"Cows" eat what\t(A) grass (B) red meat (C) tin (D) air\t-\t{letter}\n'
    for i, letter in enumerate("AB"))
MMLU = b'1+1?,1,2,3,4,B\n"Which, of these?","a, b",c,d,e,A\n2+2?,1,2,3,4,D\n'
BOOLQ = [{"question": f"is IT {i}", "passage": f"P{i}", "label": label}
         for i, label in enumerate([True, "false", "true", False] * 3)]
FILES = {"mmlu/test/hard_logic_test.csv": MMLU,
         "mmlu/test/zoo_test.csv": b"\xef\xbb\xbf3+3?,6,7,8,9,A\n",         # with a BOM
         "mmlu/dev/hard_logic_dev.csv": b"".join(b"%d?,1,2,3,4,C\n" % i for i in range(7)),
         "boolq/val.jsonl": lines(BOOLQ), "mmlu/test/._zoo_test.csv": b"\x00\x05\x16\x07",
         "narrativeqa/test.json.zip": zipped([STORY] * 3),
         "nq_open/NQ-open.dev.jsonl": lines([{"question": "who", "answer": ["Ann", "Bob"]}] * 2),
         "nq_open/nq-open-oracle.jsonl.gz": gzip.compress(lines([OPEN] * 2)),
         "quac/quac_sample.json": json.dumps({"data": [QUAC]}).encode(),
         "quac/train_v0.2.json": b"not read",
         "hellaswag/hellaswag_val.jsonl": lines(GOLF | {"label": n} for n in (2, 0, "1")),
         "openbookqa/test.tsv": TABLE.encode()}


def helm_folder(path: Path, only="") -> Path:
    """All eight scenarios in their official formats, a few rows each, written out by hand."""
    for name, content in FILES.items():
        if name.startswith(only):
            (path / "helm_qa" / name).parent.mkdir(parents=True, exist_ok=True)
            (path / "helm_qa" / name).write_bytes(content)
    return path


def qa_cfg(path, **changes):
    return SimpleNamespace(**{"data_dir": path, "eval_limit": 0, "shots": 0, "eval_batch": 0,
                              "max_new_tokens": 2, "validate": 0, "predictions": None} | changes)


def tokenizer():
    return model.Tokenizer(BUNDLED_TOKENIZER)


def test_answers_are_normalised_as_helm_does():
    # kills: articles removed before punctuation; articles inside words; spaces double; case kept
    for text, expected in (("  The  Cat's,\tA\nhat! ", "cats hat"), ("the-end", "theend"),
                           ("A.", ""), ("Theatre an", "theatre"), ("$5.00", "500"),
                           ("naïve", "naïve")):
        assert qa.normalised(text) == expected, (text, qa.normalised(text))


def test_metrics_equal_arithmetic_by_hand():
    # kills: exact match that normalises; F1 over multisets, or recall alone; the first reference
    # instead of the best
    for metric, gold, text, expected in (
            ("exact match", " B", "B ", 1), ("exact match", "B", "b", 0),
            ("exact match", "B", "B.", 0), ("quasi-exact match", "Yes", " yes.", 1),
            ("quasi-exact match", "Yes", "yes it is", 0),
            # {red fish}, {red bird sings}: P 1/3, R 1/2
            ("F1", "red red fish", "the red bird sings", Fraction(2, 5)),
            ("F1", "a b c d", "b", Fraction(1, 2)),                 # {b c d}, {b}: P 1, R 1/3
            ("F1", "x", "y", 0), ("F1", "the", "", 0)):
        assert math.isclose(qa.agreement(metric, gold, text), expected), (metric, gold, text)
    question = qa.Question("?", "", ["no", "a dog", "big dog"])
    found = qa.scored("quac", [question] * 3, ["\n Dog\nbecause", "", "a big, big fish"])
    assert found == {"metric": "F1", "score": (1 + 0 + 0.5) / 3, "total": 3}, found


def test_official_files_become_helms_questions():
    # kills: labels swapped; the header scored; the training file read; an answer in its own
    # passage; a Mac's companion files read; a BOM in the first question; questions not capitalised
    with folder() as path:
        found = qa.read_scenarios(helm_folder(path))
    assert {name: len(q) for name, q in found.items()} == {
        "mmlu": 4, "boolq": 12, "narrativeqa": 3, "naturalquestions_closed": 2,
        "naturalquestions_open": 2, "quac": 4, "hellaswag": 3, "openbookqa": 2}
    Q = qa.Question
    assert found["mmlu"][1] == Q("Which, of these?\nA. a, b\nB. c\nC. d\nD. e", "", ["A"], (),
                                 "hard logic")
    assert found["mmlu"][3].ask.startswith("3+3?\nA. 6"), found["mmlu"][3]
    assert [q.answers for q in found["boolq"][:4]] == [["Yes"], ["No"], ["Yes"], ["No"]]
    assert found["boolq"][1][:2] == ("Is it 1?", "P1")
    assert found["narrativeqa"][0] == Q("Who didn't go?", "Ann didn't go (yet).",
                                        ["Ann.", "ann's"])
    assert found["naturalquestions_closed"][0] == Q("Who?", "", ["Ann", "Bob"])
    assert found["naturalquestions_open"][0] == Q("Who is it?", "Ann did.", ["Ann"])
    assert found["hellaswag"][2][:3] == ("Golf: He swings. Then he", "", ["eats it all.", "B"])
    assert found["openbookqa"][1] == Q('"Cows" eat what', "", ["red meat", "B"],
                                       ("grass", "red meat", "tin", "air"))


def test_an_abstention_is_right_in_any_of_helms_forms():
    # kills: CANNOTANSWER replaced in answers or in the dialogue; one form alone; the other forms
    # where some answer does not abstain (HELM takes them only where all do)
    with folder() as path:
        found = qa.read_scenarios(helm_folder(path))["quac"]
    start = "Title: T\nSection: S\nIt is so.\nQuestion: Q0?\nAnswer: one"
    assert found[1] == qa.Question("Q1?", start, ["CANNOTANSWER", "x"])
    assert found[2].passage == start + "\nQuestion: Q1?\nAnswer: CANNOTANSWER"
    assert found[3].answers == ABSTAIN
    for text, mixed, all_abstain in ((ABSTAIN[0], 1, 1), ("cannot answer.", 0, 1), ("x", 1, 0),
                                     ("Do not know", 0, 1), ("not enough information", 0, 1)):
        scores = [qa.scored("quac", [q], [text])["score"] for q in (found[1], found[3])]
        assert scores == [mixed, all_abstain], (text, scores)


def test_an_option_that_stands_twice_is_right_by_either_letter():
    # kills: the key's letter alone; spaces around an option making two of one
    assert qa.mmlu(["q", "1", "2", "2 ", "3", "C"])[0].answers == ["B", "C"]
    assert qa.openbookqa(["", "q", "(A) a (B) b (C) a (D) c", "", "A"])[0].answers == [
        "a", "A", "C"]
    found = qa.hellaswag(GOLF | {"endings": ["a", "b", "b", "b"]})[0]
    assert found.answers == ["b", "B", "C", "D"]
    assert qa.scored("mmlu", qa.mmlu(["q", "1", "2", "2", "3", "C"]), ["B"])["score"] == 1


def test_every_value_of_a_row_is_checked():
    # kills: any check of `value`, `texts`, or of a label; a text taken letter by letter
    def quac_with(**changes):
        return {**QUAC, "paragraphs": [{"context": "c", "qas": [turn(0, "one") | changes]}]}
    wrong = [
        (qa.natural_closed, {"question": "who", "answer": bad})
        for bad in ("Ann", None, [], [None], [3], {"a": 1}, 4, True, [["Ann"]], ["Ann", None])]
    wrong += [(qa.natural_open, OPEN | change) for change in (
        {"answers": "Ann"}, {"ctxs": "Ann did."}, {"ctxs": []}, {"ctxs": [None]}, {"ctxs": {}},
        {"ctxs": [{"text": None}]}, {"question": None}, {"question": 3})]
    wrong += [(qa.boolq, BOOLQ[0] | change) for change in (
        {"label": 1}, {"label": None}, {"label": "yes"}, {"passage": None}, {"question": ["q"]})]
    wrong += [(qa.narrativeqa, STORY | change) for change in (
        {"ground_truths": "Ann"}, {"ground_truths": None}, {"context.tokens": ["Ann"]},
        {"ground_truths": []}, {"question.tokens": 0})]
    wrong += [(qa.hellaswag, GOLF | change) for change in (
        {"endings": "abcd"}, {"endings": [1, 2, 3, 4]}, {"endings": ["a", "b", "c"]},
        {"endings": ["a", "b", "c", ""]}, {"endings": ["a", " ", "c", "d"]}, {"label": True},
        {"label": 2.0}, {"label": ""}, {"label": -1}, {"label": 4}, {"label": None},
        {"activity_label": None}, {"ctx_b": None})]
    wrong += [(qa.quac, bad) for bad in (
        {**QUAC, "paragraphs": {}}, {**QUAC, "paragraphs": ["text"]}, {**QUAC, "title": None},
        {**QUAC, "background": 5}, quac_with(answers="one"), quac_with(answers=["one"]),
        quac_with(answers=[]), quac_with(answers=[{"text": None}]), quac_with(orig_answer="one"),
        quac_with(orig_answer={}), quac_with(question=None))]
    wrong += [(read, bad) for bad in (None, 3, "row", [], True) for read in (
        qa.boolq, qa.narrativeqa, qa.natural_closed, qa.natural_open, qa.quac, qa.hellaswag)]
    wrong += [(qa.mmlu, ["q", "1", "2", "3", "B"]), (qa.mmlu, ["q", "1", "2", "3", "4", "b"]),
              (qa.openbookqa, ["1", "q", "(A) a (B) b", "-", "A"])]
    for read, row in wrong:
        try:
            found = read(row)
        except ValueError as error:
            assert str(error).startswith("expected"), (read.__name__, error)
        else:
            raise AssertionError(f"{read.__name__} took {row!r:.100} as {found!r:.100}")
    lone = qa.natural_closed({"question": "who \ud83d", "answer": ["\ud83d", "a"]})[0]
    assert lone == qa.Question("Who \ufffd?", "", ["\ufffd", "a"])


def test_damaged_scenario_files_are_refused_by_name():
    # kills: an unreadable archive as a traceback; one unpacked without bound; a row of another
    # format scored; a file without rows; the first row of a table without header left out
    row = {"question": "who", "answer": "Ann"}
    with folder() as path:
        root = helm_folder(path) / "helm_qa"
        with patch.object(qa, "LARGEST", 999):
            (root / "narrativeqa/test.json.zip").write_bytes(zipped(["x" * 9999], "t.json"))
            refused(lambda: qa.read_text(root / "narrativeqa/test.json.zip"), "once unpacked")
        helm_folder(path)
        for name, content, *words in (
                ("narrativeqa/test.json.zip", b"PK\x03\x04 junk"),
                ("narrativeqa/test.json.zip", zipped([], "t.txt")),
                ("narrativeqa/test.json.zip", zipped([], "t.json"), "at least one"),
                ("nq_open/nq-open-oracle.jsonl.gz", b"\x1f\x8b\x08junk"),
                ("nq_open/NQ-open.dev.jsonl", lines([OPEN | {"answer": ["a"]}, row]), "row 2"),
                ("mmlu/test/zoo_test.csv", b"1?,1,2,3,4,A\n2?,1,2,3,4,E\n", "row 2"),
                ("mmlu/test/zoo_test.csv", b"1?,1,2,A\n", "row 1"),
                ("mmlu/test/zoo_test.csv", b'"1?,1,2,3,4,A\n', "table"),
                ("mmlu/test/zoo_test.csv", b"\xff\xfe1", "UTF-8"),
                ("mmlu/test/zoo_test.csv", b"", "at least one"),
                ("boolq/val.jsonl", b'{"question": "q"}', "row 1"),
                ("boolq/val.jsonl", b"\n", "at least one"),
                ("openbookqa/test.tsv", TABLE.partition("\n")[2].encode(), "row 1", "header"),
                ("openbookqa/test.tsv", b"ID\n1\tq\t(A) a (B) b\t-\tA\n", "row 2"),
                ("openbookqa/test.tsv", b"ID\n", "at least one"),
                ("quac/quac_sample.json", b'{"data": 3}', "array"),
                ("quac/quac_sample.json", b'{"data": [null]}', "row 1"),
                ("quac/quac_sample.json", b"{"), ("quac/quac_sample.json", 99999 * b"[")):
            good = (root / name).read_bytes()
            (root / name).write_bytes(content)
            refused(lambda: qa.read_scenarios(path), root / name, *words)
            (root / name).write_bytes(good)
        (root / "quac/val_v0.2.json").write_bytes(FILES["quac/quac_sample.json"])
        refused(lambda: qa.read_scenarios(path), "one file", "val_v0.2.json")


def test_every_file_is_read_before_it_is_needed():
    # kills: prepare that finds files without reading them; MMLU's worked examples forgotten
    with folder() as path, folder() as none:
        root = helm_folder(path) / "helm_qa"
        read = {str(p.relative_to(root)) for p in qa.prepare(qa_cfg(path, shots=8))}
        assert read == FILES.keys() - {"quac/train_v0.2.json", "mmlu/test/._zoo_test.csv"}
        assert len(qa.prepare(qa_cfg(path))) == len(read) - 1, "no shots: no dev files"
        (root / "mmlu/dev/hard_logic_dev.csv").write_bytes(b"1?,1,2,A\n")
        qa.prepare(qa_cfg(path))
        refused(lambda: qa.prepare(qa_cfg(path, shots=5)), "hard_logic_dev.csv", "row 1")
        refused(lambda: qa.prepare(qa_cfg(none)), none / "helm_qa", "boolq/val.jsonl")
        with contextlib.redirect_stderr(io.StringIO()) as said:
            qa.prepare(qa_cfg(helm_folder(none, "boolq")))
        assert said.getvalue().count("is not run") == 7


def test_log_likelihoods_match_one_sequence_at_a_time():
    # kills: padding counted; rows off by one; results left in order of length; half of the sum
    lm, g = tiny_lm(), torch.Generator().manual_seed(1)
    examples = [data.Example(torch.randint(3, 97, (a + b,), generator=g).tolist(), a)
                for a, b in ((5, 3), (1, 9), (12, 1), (7, 7), (2, 2), (30, 4), (4, 1))]
    expected = []
    for ids, start, _ in examples:
        logp = slow_forward(lm, ids[:-1])[0].log_softmax(-1)
        expected.append(sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids))))
    for batch_size in (1, 3, 64):
        found = qa.log_likelihoods(lm, examples, batch_size, "x")
        assert off(found, torch.tensor(expected)) < 1e-4


def test_options_are_chosen_per_token_or_calibrated():
    # kills: no division by the length; no calibration; one scenario's way used for the other; the
    # least likely chosen
    lm, t = tiny_lm(vocab_size=1024), tokenizer()
    words = "red blue cold winter morning seven dogs run over the small green hill again".split()
    options = [tuple(" ".join(words[i:i + n]) for n in (1, 2, 5, 3)) for i in range(9)]
    questions = [qa.Question(f"What is {a} {b}?", "", ["x"], o)
                 for a, b, o in zip(words, words[5:], options)]

    def logp(prompt, option):
        ids = [t.bos] + t.encode(prompt)
        answer = t.encode(option)
        rows = lm(torch.tensor([ids + answer]))[0].log_softmax(-1)[len(ids) - 1:-1]
        return rows.gather(1, torch.tensor(answer)[:, None]).sum().item(), len(answer)
    ways = {"hellaswag": lambda q, o: logp(q, o)[0] / logp(q, o)[1],
            "neither": lambda q, o: logp(q, o)[0],
            "openbookqa": lambda q, o: logp(q, o)[0] - logp("Answer:", o)[0]}
    best = {way: [max(q.options, key=lambda o: score(q.ask, o)) for q in questions]
            for way, score in ways.items()}
    assert best["hellaswag"] != best["neither"] != best["openbookqa"] != best["hellaswag"]
    for name in ("hellaswag", "openbookqa"):
        for batch_size in (7, 0):
            cfg = qa_cfg("", shots=5, eval_batch=batch_size)
            assert qa.choose_options(lm, t, name, questions, cfg, "x") == best[name], name


def test_likelihoods_that_are_not_finite_choose_no_option():
    # kills: argmax over NaN, which is the first NaN; one that is infinite
    lm, questions = tiny_lm(vocab_size=1024), [qa.Question("?", "", ["x"], ("a", "b", "c", "d"))]
    for odd in (math.nan, math.inf):
        lm.norm.weight[0] = odd
        for name in ("hellaswag", "openbookqa"):
            refused(lambda: qa.choose_options(lm, tokenizer(), name, questions, qa_cfg(""), "x"),
                    name, "bf16")


def test_prompts_are_the_template_or_helms():
    # kills: a sixth example; the test file's rows as MMLU's examples; examples beyond the window,
    # or none within it
    t = tokenizer()
    with folder() as path:
        found = qa.read_scenarios(helm_folder(path))

        def prompt(name, i, shots, room=10):
            cfg = qa_cfg(path, shots=shots)
            q, shown = found[name][i], qa.worked_examples(name, found[name], cfg)
            ids = qa.question_ids(q, shown[q.subject], cfg, room, t)
            assert ids[0] == t.bos and t.bos not in ids[1:]
            return t.decode(ids[1:])
        assert prompt("boolq", 1, 0) == data.prompt_of("Is it 1?", "P1")
        assert prompt("openbookqa", 1, 0) == data.prompt_of('"Cows" eat what')
        assert prompt("openbookqa", 1, 8) == '"Cows" eat what'
        block = "Question: {}?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        head = "The following are multiple choice questions (with answers) about hard logic.\n\n"
        two = "".join(block.format(i) + " C\n\n" for i in range(2))
        assert prompt("mmlu", 2, 2) == head + two + block.format("2+2")
        assert prompt("mmlu", 2, 8).count("Answer: C\n") == 5
        assert prompt("mmlu", 3, 8).count("Question") == 1, "no dev file for zoo"
        full = prompt("boolq", 1, 8)
        start = "Passage: P0\nQuestion: Is it 0?\nAnswer: Yes\n\nPassage: P2\n"
        assert full.startswith(start) and full.count("Passage") == 6
        assert full.endswith("\n\nPassage: P1\nQuestion: Is it 1?\nAnswer:")
        with patch.object(qa, "WINDOW", len(t.encode(full))):           # without BOS: one too few
            assert prompt("boolq", 1, 8, 0).count("Passage") == 5
        with patch.object(qa, "WINDOW", 3):
            assert prompt("boolq", 1, 8).count("Passage") == 1, "the question itself is never cut"


def test_generation_ends_behind_a_stop_piece():
    # kills: stop ignored
    lm, prompts = tiny_lm(), [random_tokens(n, seed=n).tolist() for n in (3, 9, 5, 7, 2)]
    free = model.generate(lm, prompts, 12, 1)
    stop = Counter(sum(free, [])).most_common(1)[0][0]
    cut = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert model.generate(lm, prompts, 12, 1, 3, stop=stop) == cut != free


def test_scenarios_are_scored_and_averaged():
    # kills: questions pooled, not scenarios averaged; a missing scenario as 0; examples scored;
    # the first rows as --eval-limit
    lm, t = tiny_lm(vocab_size=1024), tokenizer()
    with folder() as path, folder() as part, folder() as none:
        helm_folder(path)
        for shots, limit, totals in ((0, 0, [4, 12, 3, 2, 2, 4, 3, 2]),
                                     (8, 0, [4, 7, 2, 1, 1, 2, 3, 2]), (0, 2, [2] * 8)):
            found = qa.score(lm, t, qa_cfg(path, shots=shots, eval_limit=limit), "evaluate")
            scores = [s["score"] for s in found["scenarios"].values()]
            assert [s["total"] for s in found["scenarios"].values()] == totals
            assert found["total"] == sum(totals)
            assert math.isclose(found["accuracy"], sum(scores) / 8)
            correct = sum(n * s for n, s in zip(totals, scores))
            assert math.isclose(found["correct"], correct, abs_tol=1e-3)
        assert qa.evenly(list(range(10)), 3) == [0, 3, 6]
        found = qa.score(lm, t, qa_cfg(helm_folder(part, "boolq"), eval_limit=3), "evaluate")
        absent = {"metric": "exact match", "score": None, "total": 0}
        assert found["scenarios"]["mmlu"] == absent and found["total"] == 3
        assert found["accuracy"] == found["scenarios"]["boolq"]["score"]
        refused(lambda: qa.score(lm, t, qa_cfg(none), "x"), none / "helm_qa", "boolq/val.jsonl")


def test_a_models_answer_ends_with_any_end_token_it_declares():
    # kills: tokenizer.eos in the place of tokenizer.ends
    lm, t = tiny_lm(vocab_size=1024), tokenizer()
    with folder() as path:
        cfg = qa_cfg(helm_folder(path), max_new_tokens=6)
        questions = qa.read_scenarios(path)["boolq"][:2]
        free = [qa.answers_to(lm, t, "boolq", questions, {"": []}, cfg, "x")]
        ids = [qa.question_ids(q, [], cfg, 6, t) for q in questions]
        t.ends = (t.eos, *(text[1] for text in model.generate(lm, ids, 6, t.eos)))
        cut = qa.answers_to(lm, t, "boolq", questions, {"": []}, cfg, "x")
    assert [len(a) < len(b) for a, b in zip(cut, free[0])] == [True, True], (cut, free)


def test_predictions_of_all_scenarios_are_scored_by_their_indices():
    # kills: the row's number used as index; an index beyond the file; one given twice; an option's
    # letter refused; a file without rows as 0 %; a scenario without files as "index of 0 questions"
    with folder() as path, folder() as part:
        helm_folder(path), helm_folder(part, "boolq")

        def score(*rows, at=path):
            objects = [dict(zip(("scenario", "index", "text"), row)) for row in rows]
            (path / "p.jsonl").write_bytes(lines(objects))
            return qa.score_predictions(qa_cfg(at, predictions=path / "p.jsonl"))
        found = score(("mmlu", 2, "D"), ("mmlu", 1, "B"), ("hellaswag", 2, "B"),
                      ("quac", 0, "one two three"), ("openbookqa", 1, "red meat"))
        assert {n: s["score"] for n, s in found["scenarios"].items() if s["total"]} == {
            "mmlu": 0.5, "hellaswag": 1.0, "quac": 0.5, "openbookqa": 1.0}      # quac: P 1/3, R 1
        assert (found["accuracy"], found["correct"], found["total"]) == (0.75, 3.5, 5)
        for row in (("mmlu", 4, "A"), ("mmlu", -1, "A"), ("mmlu", True, "A"), ("mmlu", "0", "A"),
                    ("trivia", 0, "A"), ("mmlu", 0, 7), ("mmlu", 0), ("mmlu", 0, None)):
            refused(lambda: score(("boolq", 0, "Yes"), row), path / "p.jsonl", "row 2")
        refused(lambda: score(("boolq", 0, "Yes"), ("boolq", 0, "No")), "row 2", "once")
        refused(lambda: score(), path / "p.jsonl", "no rows")
        refused(lambda: score(("mmlu", 0, "A"), at=part), "row 1", "mmlu/test", "none")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            qa.report(score(("boolq", 0, "Yes")))
        shown = " ".join(said.getvalue().split())
        assert shown.count("not run") == 7 and "boolq quasi-exact match 100.00% 1 " in shown


def test_bundled_questions_are_read():
    # kills: a check that refuses the bundled files
    found = qa.read_scenarios(HERE / "tiny" / "data")
    assert len(found) == 8 and all(found.values())
