"""GSM8K's answers, predictions and prompts; completing a prompt on the command line."""
import json
import re
import subprocess
import sys
from decimal import Decimal
from unittest.mock import patch

import data
import eval as evaluation
import model
from model import UserError
from tasks import gsm8k
from tests.common import (
    HERE, cli, folder, gsm8k_folder, meta_folder, no_longer_than, one_line, refused, tiny_lm,
    tokenizer,
)

# a text, and the number that it answers
ANSWERS = [
    ("The answer is 18", "18"), ("So 3 and 4. The answer is 18. Then 5", "18"), ("#### 18.0", "18"),
    ("#### 7\nThe answer is 8", "7"), ("The answer is 8 #### 7", "8"), ("####18", "18"),
    ("The answer is unclear", None), ("5 apples. The answer is", None), ("3 and then 4", "4"),
    ("no number", None), ("", None), ("The answer is $1,234.50.", "1234.5"),
    ("The answer is 1,234,567", "1234567"), ("it is 42%", "42"), ("The answer is -5", "-5"),
    ("The answer is -$5", "-5"), ("The answer is $-5", "-5"), ("660-36=624", "624"), ("5-3", "3"),
    ("The answer is: \n 7 km", "7"), ("The answer is 1, 2", "1"), ("The answer is 0.10", "0.1"),
    ("The answer is .5", "0.5"), ("The answer is -.5", "-0.5"), ("x2 costs 3.", "3"),
    ("#### 12345678901234567890.10", "12345678901234567890.1"),
]

# how models end: the text stops where a next question begins, then marker or last number
NEXT = "\n\nQ: Tom has 5.\nA: He has 6. The answer is 6."
ENDINGS = [
    ("The answer is 8." + NEXT, "8"), ("So it is 8." + NEXT, "8"), ("So it is eight" + NEXT, None),
    ("The answer is unclear." + NEXT, None), ("The answer is" + NEXT, None), (NEXT, None),
    ("It is 8.\nQuestion: 9 and 9?", "8"), ("It is 8.\n\n### Instruction:\nAdd 9", "8"),
    ("It is 8. \n \n  Q: 9?", "8"), ("It is 8 (Q: 9?)", "9"), ("FAQ: 9", "9"), ("Q: 3?", "3"),
    ("The answer is 8.\nThe answer is 9.", "8"), ("#### 8\n#### 9", "8"),
    ("THE ANSWER IS 7", "7"), ("the Answer is: **7**", "7"), ("The answer is \\boxed{7}", "7"),
    ("The answer is \u22127", "-7"), ("9 \u2212 7", "7"), ("9\u22127", "7"), ("(-7)", "-7"),
    ("The answer is \u2212$7", "-7"), ("x-7", "7"), ("7 - 3", "3"), ("The answer is 3-4 km", "3"),
    ("#### 31,80,000", "3180000"), ("#### 1\u00a0234\u00a0567.5", "1234567.5"),
    ("#### 1\u2009234", "1234"), ("#### 1\u202f234", "1234"), ("#### 1 234", "1"),
    ("#### 1,23", "1"), ("#### 1234,567", "1234"), ("#### 12,345,6789", "12345"),
    ("#### $1,234", "1234"), ("#### 42%.", "42"), ("#### 7.", "7"), ("#### 7.00", "7"),
    ("#### 007", "7"), ("#### 5 + 3 = 8", "5"), ("#### 5/2", "5"), ("####\n\n 7", "7"),
    ("The answer is 10:30", "10"), ("The answer isn't 7", "7"), ("the answer was 7 of 9", "9"),
    ("### 7 and 9", "9"), ("The answer is \u0667", None), ("#### \u00bd", None),
    ("2\u00b2 is 4", "4"), ("4 is 2\u00b2", "2"),
]


def test_answers_are_extracted_by_the_papers_rules():
    # kills: last number after a marker; marker without a number falls back; commas split; every
    # hyphen a sign; groups without a bound, tried from each of their numbers
    for text, number in ANSWERS:
        found = evaluation.extract_number(text)
        assert found == (number and Decimal(number)), (text, found)
    with no_longer_than(10):                                # where the square of it is a minute
        assert evaluation.extract_number("12," * 40_000) == 12


def test_a_models_ending_counts_up_to_its_next_question_whatever_stands_there():
    # kills: no cut; a cut at `Q:` within a line; a marker looked for behind the cut; the last
    # marker; case of the marker; U+2212; groups of two digits, or parted by thin spaces; digits of
    # other scripts
    for text, number in ENDINGS:
        found = evaluation.extract_number(text)
        assert found == (number and Decimal(number)), (text, found)


def test_gold_is_what_stands_behind_the_last_marker_of_the_file():
    # kills: gold by the predictions' rules; the first marker; an answer without one as its last
    # number; gold of a question that is not scored unchecked
    def gold(*answers, **changes):
        rows = [json.dumps({"question": "q", "answer": answer}) for answer in answers]
        (path / "gsm8k" / "test.jsonl").write_text("\n".join(rows))
        return evaluation.read_gold(evaluation.EvalConfig(data_dir=str(path), **changes))[1]
    with folder() as path:
        gsm8k_folder(path)
        for answer, number in (("The answer is 3.\n#### 4", 4), ("#### 3\n#### 1,000", 1000),
                               ("5\nQ: 6\n#### -7", -7), ("#### \u22127.50", Decimal("-7.5"))):
            assert gold(answer) == [number], answer
        for bad in ("The answer is 3", "4", "", "#### ", "3 ####", "#### 3 ####"):
            refused(lambda: gold("#### 1", bad), "test.jsonl, row 2", "####")
            refused(lambda: evaluation.prepare(evaluation.EvalConfig(
                data_dir=str(path), shots=0, eval_limit=1)), "row 2")


def test_numbers_are_compared_as_numbers_and_a_missing_one_is_wrong():
    # kills: string comparison; None == None counts
    predicted, gold = [Decimal("18.0"), None, None, Decimal(3)], [Decimal(18), Decimal(1), None, 4]
    assert evaluation.accuracy(predicted, gold) == {"correct": 1, "total": 4, "accuracy": 0.25}


def test_a_file_of_predictions_is_scored_by_its_indices():
    # kills: indices ignored; duplicates let through
    with folder() as path:
        gsm8k_folder(path)
        file = path / "p.jsonl"

        def score(*rows):
            file.write_text("\n".join(json.dumps(r) for r in rows))
            argv = ("--task", "gsm8k", "--predictions", file, "--data-dir", path, "--json")
            status, out, err = cli(*argv, main=evaluation.main)
            if status:
                raise UserError(one_line((status, out, err)))
            return json.loads(out)
        found = score({"index": 3, "text": "The answer is 6.0"}, {"index": 1, "text": "it is 3"},
                      {"index": 2, "text": "4"})
        assert found == {"correct": 2, "total": 3, "accuracy": 2 / 3}
        good = {"index": 0, "text": "0"}
        for bad in ({"index": 4, "text": ""}, {"index": -1, "text": ""}, {"text": "1"},
                    {"index": True, "text": "1"}):
            refused(lambda: score(good, bad), "row 2", "0..3")
        refused(lambda: score(good, good), "row 2", "once")
        refused(lambda: score({"index": 0}), "'text'")


def test_worked_examples_are_eight_and_end_as_the_extraction_wants():
    # kills: #### left in
    for shots in (0, 1, 8):
        text = gsm8k.worked_examples(shots)
        ends = re.findall(r"The answer is \d+\.\n\n", text)
        assert text.count("Q: ") == text.count("\nA: ") == len(ends) == shots
        assert "####" not in text
    refused(lambda: gsm8k.worked_examples(9), "--shots 9", "0..8")


def test_scoring_a_model_prompts_like_training_and_counts_by_hand():
    # kills: prompt without BOS
    t, lm, seen = tokenizer(), tiny_lm(vocab_size=1024), []

    def fake(lm, ids, new, eos, size, **_):
        seen.extend(ids)
        assert (new, eos, size) == (7, t.ends, 2)
        return [t.encode(f"The answer is {2 * i if i != 3 else 5}") for i in range(len(ids))]
    with folder() as path:
        gsm8k_folder(path, test_rows=6)
        cfg = evaluation.EvalConfig(data_dir=str(path), eval_limit=5, eval_batch=2, shots=0,
                                    max_new_tokens=7)
        with patch.object(evaluation, "generate", fake):
            found = evaluation.score(lm, t, cfg, "x")
        assert found == {"correct": 4, "total": 5, "accuracy": 0.8}
        prompts = [data.prompt_of(f"What is {i} and {i}?") for i in range(5)]
        assert seen == [[t.bos] + t.encode(prompt) for prompt in prompts]
        assert evaluation.score(lm, t, cfg, "x")["total"] == 5


def test_prompts_are_completed_on_stdout_and_nothing_else():
    # kills: the prompt printed too; a template around it; --json without JSON
    t, lm = tokenizer(), tiny_lm(vocab_size=1024)
    with folder() as path:
        meta_folder(path / "c", lm, tokenizer=True)
        argv = ("--ckpt", path / "c", "--max-new-tokens", 9, "--threads", 1, "--dtype", "fp32")
        status, out, err = cli("--prompt", "Once upon", *argv, main=evaluation.main)
        prompt = [t.bos] + t.encode("Once upon")
        ids = model.generate(lm, [prompt], 9, t.eos)[0]
        assert (status, err) == (0, "")
        assert out == t.decode(prompt + ids)[len("Once upon"):] + "\n"
        asked = "--prompt", "Once upon", "--json", *argv
        assert json.loads(cli(*asked, main=evaluation.main)[1]) == {"text": out[:-1]}


def test_an_output_that_takes_nothing_is_one_line():
    # kills: a traceback for a closed or a full stdout, at once or while the process ends
    command = [sys.executable, HERE / "train.py", "--plan"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert done.stderr.startswith("error: the output cannot be written"), done
    with patch.object(sys, "stdout", None):                 # `>&-` in a shell
        try:
            evaluation.main_guard(lambda: 7)
        except SystemExit as end:
            assert end.code == 7


def test_a_checkpoint_is_scored_on_the_command_line():
    # kills: notes among the JSON on stdout; status 0 or two lines for a user's mistake; one of two
    # things that were asked for done, the other not; --model without a run passed over
    with folder() as path:
        meta_folder(path / "c", tiny_lm(vocab_size=1024), tokenizer=True)
        argv = ("--task", "gsm8k", "--ckpt", path / "c", "--json")
        status, out, err = cli(*argv, "--limit", 1, "--max-new-tokens", 2, "--shots", 1,
                               main=evaluation.main)
        assert status == 0 and json.loads(out)["total"] == 1, err
        for bad in (("--prompt", "x", "--ckpt", path / "none"), ("--limit", "-1"), (),
                    ("--prompt", "x", "--export", path / "new"),
                    ("--prompt", "x", "--predictions", path / "no"),
                    ("--task", "gsm8k", "--model", "adapemu", "--limit", 1),
                    ("--task", "gsm8k", "--format", "meta", "--limit", 1),
                    ("--prompt", "x", "--max-new-tokens", 10**9),
                    ("--task", "gsm8k", "--predictions", path / "no")):
            answer = cli(*bad, main=evaluation.main)
            one_line(answer)
            assert answer[1] == "", bad
