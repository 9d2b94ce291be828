"""Question answering, --task dolly: eight of HELM's scenarios, with its metrics and prompts.

In order: questions (a function a scenario: what HELM asks about a row of the official file); files;
metrics; prompts and answers; the scorer's four functions. HELM: Liang et al. 2022, arXiv
2211.09110; paper, Appendix A.

Multiple choice: MMLU jointly (the options stand in the prompt, the model writes a letter);
HellaSwag and OpenbookQA separately, by each option's log-likelihood after the question: for
HellaSwag a token of it, for OpenbookQA less what the option has after a bare `Answer:`. So HELM has
it: an ending continues a text, long ones must not lose for their length, nor frequent words win by
themselves.
"""
import csv
import io
import re
import string
import sys
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import LARGEST, TASKS, Example, Row, collate, find_file, prompt_of, read_rows, texts_of
from model import LM, UserError, clean_text, generate, parse_json, read_bytes

WINDOW = 4096           # LLaMA 2's: worked examples that do not fit are left out, as in HELM
LETTERS = list("ABCD")


# ---- questions ----------------------------------------------------------------------------------

def read_training(data_dir) -> list[Row]:
    """Dolly's rows; the label is the category."""
    path = find_file(data_dir, TASKS["dolly"].training)
    names = ("instruction", "context", "response", "category")
    return [Row(*t) for t in texts_of(read_rows(path), path, names)]


class Question(NamedTuple):
    ask: str
    passage: str
    answers: list[str]              # each of them is right
    options: tuple[str, ...] = ()   # what separate scoring chooses from
    subject: str = ""               # MMLU's


def value(row, name: str, kind: type = str):
    """row[name], which must be there and of its kind: a text (cleaned), a list or an object."""
    found = row.get(name) if isinstance(row, dict) else row
    if not isinstance(row, dict) or not isinstance(found, kind):
        words = {str: "a text", list: "a list", dict: "an object"}
        raise ValueError(f"expected {name!r} as {words[kind]}, found {found!r:.60}")
    return clean_text(found) if kind is str else found


def texts(row, name: str) -> list[str]:
    """row[name], a list of at least one text."""
    found = value(row, name, list)
    if not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"expected {name!r} as a list of texts, found {found!r:.60}")
    return [clean_text(text) for text in found]


def letters_of(options: list[str], right: int) -> list[str]:
    """The right option's letter, and that of any other with the same text, as in HELM."""
    return [letter for letter, option in zip(LETTERS, options, strict=True)
            if option.strip() == options[right].strip()]


def choice(ask: str, options: list[str], right: int) -> list[Question]:
    """A question for separate scoring. A prediction may be the right option or its letter."""
    if len(options) != 4 or not all(map(str.strip, options)):
        raise ValueError(f"expected four options, found {options!r:.60}")
    return [Question(ask, "", [options[right], *letters_of(options, right)], tuple(options))]


def mmlu(row: list[str]) -> list[Question]:
    if len(row) != 6 or row[5] not in LETTERS:
        raise ValueError(f"expected a question, four options and a letter, found {row!r:.60}")
    ask, *options, letter = row
    listed = [f"{x}. {option}" for x, option in zip(LETTERS, options, strict=True)]
    right = letters_of(options, LETTERS.index(letter))
    return [Question("\n".join([ask, *listed]), "", right)]


def asked(query: str) -> str:
    """A search engine's query as a question. HELM: `Who is ann`, all else in lower case."""
    return query.strip().removesuffix("?").capitalize() + "?"


def boolq(row) -> list[Question]:
    label = row.get("label") if isinstance(row, dict) else row
    answer = {"true": "Yes", "false": "No"}.get(str(label).lower())     # JSON's true, or a text
    if not answer:
        raise ValueError(f"expected 'label' as true or false, found {label!r:.60}")
    return [Question(asked(value(row, "question")), value(row, "passage"), [answer])]


@lru_cache(maxsize=512)                                         # thirty questions share a story
def untokenised(text: str) -> str:
    """`They did n't , Ann 's` -> `They didn't, Ann's`: no model writes the former."""
    return re.sub(r" (n't|'(?:s|m|d|re|ve|ll)\b|[.,;:!?)])", r"\1", text).replace("( ", "(")


def narrativeqa(row) -> list[Question]:
    ask = untokenised(value(row, "question.tokens")).strip().removesuffix("?") + "?"
    answers = [untokenised(text) for text in texts(row, "ground_truths")]
    return [Question(ask, untokenised(value(row, "context.tokens")), answers)]


def natural_closed(row) -> list[Question]:
    return [Question(asked(value(row, "question")), "", texts(row, "answer"))]


def natural_open(row) -> list[Question]:
    passages = value(row, "ctxs", list)
    passage = value(passages[0] if passages else None, "text")
    return [Question(asked(value(row, "question")), passage, texts(row, "answers"))]


def quac(row) -> list[Question]:
    """Every turn, with the true turns before it. DIFFERS: HELM scores one turn, drawn at random,
    and sets Title, Background and turns apart by empty lines."""
    dialogues, heads = value(row, "paragraphs", list), [("Title", value(row, "title"))]
    heads += [(name, value(row, key)) for name, key in (
        ("Background", "background"), ("Section", "section_title")) if key in row]
    head = "".join(f"{name}: {text}\n" for name, text in heads if text)
    return [question for dialogue in dialogues for question in turns(dialogue, head)]


def turns(dialogue, text: str):
    """The questions of one dialogue. Where all answers abstain HELM accepts four forms of that,
    else CANNOTANSWER as it stands."""
    text += value(dialogue, "context").removesuffix(" CANNOTANSWER")
    for turn in value(dialogue, "qas", list):
        ask, answers = value(turn, "question"), value(turn, "answers", list)
        answers = list(dict.fromkeys(value(answer, "text") for answer in answers))
        if not answers:
            raise ValueError("expected 'answers' as a list of at least one answer, found []")
        if answers == ["CANNOTANSWER"]:
            answers += ["Not enough information", "Cannot answer", "Do not know"]
        yield Question(ask, text, answers)
        said = value(value(turn, "orig_answer", dict), "text")
        text += f"\nQuestion: {ask}\nAnswer: {said}"


def hellaswag(row) -> list[Question]:
    label, then = row.get("label") if isinstance(row, dict) else row, value(row, "ctx_b")
    if str(label) not in ("0", "1", "2", "3"):                         # a number, or a text
        raise ValueError(f"expected 'label' as 0..3, found {label!r:.60}")
    ask = (f"{value(row, 'activity_label')}: {value(row, 'ctx_a')} "
           f"{then[:1].upper()}{then[1:]}").strip()
    return choice(ask, texts(row, "endings"), int(label))


def openbookqa(row: list[str]) -> list[Question]:
    if len(row) != 5 or row[4] not in LETTERS:
        raise ValueError(f"expected five columns, the last a letter, found {row!r:.60}")
    options = re.split(r"\s*\([A-D]\)\s*", row[2])[1:]
    return choice(row[1], options, LETTERS.index(row[4]))


# ---- files --------------------------------------------------------------------------------------

class Scenario(NamedTuple):
    files: str                      # in helm_qa/
    metric: str
    new_tokens: int                 # HELM's bound on an answer; 0: separate scoring
    read: object                    # a row of the official file -> list[Question]


SCENARIOS = {
    "mmlu": Scenario("mmlu/test/*_test.csv", "exact match", 5, mmlu),
    "boolq": Scenario("boolq/val.jsonl", "quasi-exact match", 5, boolq),
    "narrativeqa": Scenario("narrativeqa/test.json.zip", "F1", 100, narrativeqa),
    "naturalquestions_closed": Scenario("nq_open/NQ-open.dev.jsonl", "F1", 300, natural_closed),
    "naturalquestions_open": Scenario("nq_open/nq-open-oracle.jsonl.gz", "F1", 300, natural_open),
    "quac": Scenario("quac/[vq]*.json", "F1", 100, quac),       # val_v0.2.json, or quac_sample.json
    "hellaswag": Scenario("hellaswag/hellaswag_val.jsonl", "exact match", 0, hellaswag),
    "openbookqa": Scenario("openbookqa/test.tsv", "exact match", 0, openbookqa)}
DEV = "mmlu/dev/*_dev.csv"                                      # MMLU's worked examples


def files_of(data_dir, pattern: str) -> list[Path]:
    """The files of a scenario, sorted; not what a Mac adds to them (`._val.jsonl`)."""
    root = Path(data_dir) / "helm_qa"
    paths = sorted(path for path in root.glob(pattern) if not path.name.startswith("."))
    if len(paths) > 1 and not pattern.startswith("mmlu"):
        raise UserError(f"{paths[0]}, {paths[1]}: expected one file of a scenario, found "
                        f"{len(paths)}; keep one")
    return paths


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark; of a .zip its first .json file, unpacked."""
    blob = read_bytes(path, LARGEST)
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(io.BytesIO(blob)) as archive:
                json_names = re.compile(r"(.*/)?[^./][^/]*\.json")
                names = [name for name in archive.namelist() if json_names.fullmatch(name)]
                if not names:
                    raise LookupError("no .json file in it")
                with archive.open(names[0]) as file:
                    blob = file.read(LARGEST + 1)
        if len(blob) > LARGEST:
            raise UserError(f"{path}: expected {LARGEST:,} bytes at most once unpacked, found more")
        return blob.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, zipfile.BadZipFile, LookupError,
            NotImplementedError, RuntimeError) as error:        # the last: an encrypted archive
        raise UserError(f"{path}: cannot be read as {'packed ' * (path.suffix == '.zip')}UTF-8 "
                        f"text: {error}") from None


def read_official(path: Path) -> list:
    """The rows of a .csv or .tsv, lists of texts; else objects, if of an array in `data` (QuAC)."""
    if path.suffix in (".csv", ".tsv"):
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        try:
            table = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, **form)
            return [row for row in table if row]
        except csv.Error as error:
            raise UserError(f"{path}: not a table in {path.suffix[1:]} format: {error}") from None
    if path.suffix not in (".json", ".zip"):
        return read_rows(path)
    rows = parse_json(read_text(path), path)
    rows = rows.get("data") if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON array, found {type(rows).__name__}")
    return rows


def read_questions(name: str, paths: list[Path]) -> list[Question]:
    found, header = [], name == "openbookqa"
    for path in paths:
        subject = path.stem.rsplit("_", 1)[0].replace("_", " ") if name == "mmlu" else ""
        questions, rows = [], read_official(path)
        if header and rows and rows[0][0] != "ID":
            raise UserError(f"{path}, row 1: expected the official header, ID, Question Stem, …, "
                            f"found {rows[0]!r:.60}")
        for i, row in enumerate(rows[header:], 1 + header):
            try:
                questions += SCENARIOS[name].read(row)
            except ValueError as error:
                raise UserError(f"{path}, row {i}: expected a row of {name}'s official file; "
                                f"{error}") from None
        if not questions:
            raise UserError(f"{path}: expected at least one question of {name}, found none")
        found += [q._replace(subject=subject) for q in questions]
    return found


def read_scenarios(data_dir) -> dict[str, list[Question]]:
    """Every scenario's questions in their files' order; none where the files are not there."""
    found = {name: read_questions(name, files_of(data_dir, scenario.files))
             for name, scenario in SCENARIOS.items()}
    if not any(found.values()):
        root = Path(data_dir) / "helm_qa"
        raise UserError(f"{root}: expected files of HELM's scenarios, such as "
                        f"{root}/boolq/val.jsonl; found none")
    return found


# ---- metrics ------------------------------------------------------------------------------------

def normalised(text: str) -> str:
    """HELM's: lower case, then no punctuation, no articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def agreement(metric: str, gold: str, text: str) -> float:
    """One of HELM's metrics between a reference and an answer. F1 is over the *sets* of words."""
    if metric == "exact match":
        return float(gold.strip() == text.strip())
    gold, text = normalised(gold), normalised(text)
    if metric == "quasi-exact match":
        return float(gold == text)
    gold, text = set(gold.split()), set(text.split())
    return 2 * len(gold & text) / max(len(gold) + len(text), 1)


def scored(name: str, questions: list[Question], answers: list[str]) -> dict:
    """The mean over the questions of the best agreement with an answer, by a text's first line."""
    metric, lines = SCENARIOS[name].metric, [text.strip().partition("\n")[0] for text in answers]
    best = [max(agreement(metric, gold, line) for gold in q.answers)
            for q, line in zip(questions, lines, strict=True)]
    return {"metric": metric, "score": sum(best) / len(best) if best else None, "total": len(best)}


def averaged(scenarios: dict) -> dict:
    """`accuracy`: the average of the scenarios that ran (Figure 2's); `correct`: the sum of all
    questions' scores."""
    ran = [s for s in scenarios.values() if s["total"]]
    return {"correct": round(sum(s["score"] * s["total"] for s in ran), 4),
            "total": sum(s["total"] for s in ran),
            "accuracy": sum(s["score"] for s in ran) / len(ran), "scenarios": scenarios}


# ---- prompts and answers ------------------------------------------------------------------------

# --shots 0: the template that Dolly was trained with. Else HELM's prompts, with at most HELM's 5
# worked examples: MMLU's from its dev files; separate scoring has none. DIFFERS: for the others
# HELM draws them from training files, which helm_qa/ has not; rows spread over the scored file
# serve, and are not scored.

def evenly(rows: list, n: int) -> list:
    """n rows evenly over a file, which may be sorted by subject or by story."""
    return [rows[i * len(rows) // n] for i in range(n)]


def worked_examples(name: str, questions: list[Question], cfg) -> dict[str, list[Question]]:
    """By subject, as many as there are, but never most of the file that is scored."""
    subjects = {q.subject for q in questions}
    shots = min(cfg.shots, 5) if SCENARIOS[name].new_tokens else 0
    if name == "mmlu" and shots:
        dev = read_questions(name, files_of(cfg.data_dir, DEV))
        return {s: [d for d in dev if d.subject == s][:shots] for s in subjects}
    return dict.fromkeys(subjects, evenly(questions, min(shots, len(questions) // 2)))


def question_ids(q: Question, shown: list[Question], cfg, new_tokens: int, tokenizer) -> list[int]:
    """BOS and the prompt: the training template; with shots HELM's, or the bare question."""
    def block(q):
        return (f"Passage: {q.passage}\n" if q.passage else "") + f"Question: {q.ask}\nAnswer:"
    if q.options or not cfg.shots:
        text = q.ask if cfg.shots else prompt_of(q.ask, q.passage)
        return [tokenizer.bos] + tokenizer.encode(text)
    head = "The following are multiple choice questions (with answers) about {}.\n\n"
    head = head.format(q.subject) if q.subject else ""
    while True:
        blocks = [f"{block(example)} {example.answers[0]}\n\n" for example in shown]
        ids = [tokenizer.bos] + tokenizer.encode(head + "".join(blocks) + block(q))
        if len(ids) + new_tokens <= WINDOW or not shown:
            return ids
        shown = shown[:-1]


@torch.inference_mode()
def log_likelihoods(lm: LM, examples: list[Example], batch_size: int, progress: str):
    """log p(answer | prompt) of each example, fp32. The head sees what predicts an answer only."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    out = torch.empty(len(examples))
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=None, leave=False):
        chosen = order[start:start + batch_size]
        batch = collate([examples[i] for i in chosen]).to(lm.tok_embeddings.weight.device)
        logits = lm.output(lm.hidden(batch.tokens).flatten(0, 1)[batch.rows]).float()      # (N, V)
        losses = F.cross_entropy(logits, batch.targets, reduction="none") * (batch.weights > 0)
        sequence = batch.rows // batch.tokens.shape[1]                                      # (N,)
        out[chosen] = -losses.new_zeros(len(chosen)).index_add(0, sequence, losses).cpu()
    return out


def choose_options(lm: LM, tokenizer, name: str, questions, cfg, progress: str) -> list[str]:
    """HELM's separate method. The four options of a question follow each other."""
    options = [tokenizer.encode(option) for q in questions for option in q.options]

    def likelihoods(questions):
        prompts = [ids for q in questions for ids in 4 * [question_ids(q, [], cfg, 0, tokenizer)]]
        pairs = [Example(prompt + option, len(prompt))
                 for prompt, option in zip(prompts, options, strict=True)]
        return log_likelihoods(lm, pairs, cfg.eval_batch or 64, progress)
    scores = likelihoods(questions)
    if name == "hellaswag":
        scores = scores / torch.tensor([len(option) for option in options])
    else:
        scores = scores - likelihoods([q._replace(ask="Answer:") for q in questions])
    if not scores.isfinite().all():                 # argmax would take such an option for the best
        raise UserError(f"{name}: the model's numbers are not finite; if --dtype is fp16, they "
                        f"became too large for it: try bf16 or fp32")
    return [q.options[best] for q, best in zip(questions, scores.view(-1, 4).argmax(1).tolist())]


def answers_to(lm: LM, tokenizer, name: str, questions, shown: dict, cfg, progress: str) -> list:
    """The model's answers. In HELM's prompts a line break ends one, as in HELM."""
    if not SCENARIOS[name].new_tokens:
        return choose_options(lm, tokenizer, name, questions, cfg, progress)
    new_tokens = cfg.max_new_tokens or SCENARIOS[name].new_tokens
    ids = [question_ids(q, shown[q.subject], cfg, new_tokens, tokenizer) for q in questions]
    found = generate(lm, ids, new_tokens, tokenizer.ends, cfg.eval_batch,
                     stop=tokenizer.encode("\n")[-1] if cfg.shots else None, progress=progress)
    return [tokenizer.decode(text) for text in found]


# ---- the scorer ---------------------------------------------------------------------------------

def prepare(cfg) -> list[Path]:
    """Reads every file that scoring will need, so that nothing fails after the training."""
    found = read_scenarios(cfg.data_dir)
    for name, questions in found.items():
        worked_examples(name, questions, cfg)
        if not questions:
            print(f"note: {name} is not run: nothing at helm_qa/{SCENARIOS[name].files} of "
                  f"{cfg.data_dir}", file=sys.stderr)
    patterns = [scenario.files for scenario in SCENARIOS.values()] + [DEV] * bool(cfg.shots)
    return [path for pattern in patterns for path in files_of(cfg.data_dir, pattern)]


def score(lm: LM, tokenizer, cfg, progress: str) -> dict:
    """The eight scenarios; --limit questions of each, spread over its files."""
    results = {}
    for name, questions in read_scenarios(cfg.data_dir).items():
        shown = worked_examples(name, questions, cfg)
        held_out = {id(example) for examples in shown.values() for example in examples}
        left = [q for q in questions if id(q) not in held_out]
        left = evenly(left, min(cfg.eval_limit or len(left), len(left)))
        title = f"{progress} {name}"
        answers = answers_to(lm, tokenizer, name, left, shown, cfg, title) if left else []
        results[name] = scored(name, left, answers)
    return averaged(results)


def score_predictions(cfg) -> dict:
    """A file of {"scenario", "index": the question's place in its files, "text"}; what is not in it
    is not run."""
    path, pairs = Path(cfg.predictions), {name: {} for name in SCENARIOS}
    rows, questions = read_rows(path), read_scenarios(cfg.data_dir)
    named = texts_of(rows, path, ("scenario", "text"))
    for i, (row, (name, text)) in enumerate(zip(rows, named, strict=True), 1):
        if name not in SCENARIOS:
            raise UserError(f"{path}, row {i}: expected a scenario of {', '.join(SCENARIOS)}, "
                            f"found {name!r:.60}")
        index, n = row.get("index"), len(questions[name])
        if not n:
            raise UserError(f"{path}, row {i}: expected {name}'s questions at "
                            f"helm_qa/{SCENARIOS[name].files} of {cfg.data_dir}; found none")
        if type(index) is not int or not 0 <= index < n or index in pairs[name]:
            raise UserError(f"{path}, row {i}: expected an index of {name}'s {n} questions, each "
                            f"once, found {index!r:.60}")
        pairs[name][index] = text
    return averaged({name: scored(name, [questions[name][i] for i in found], list(found.values()))
                     for name, found in pairs.items()})


def report(result: dict):
    print(f"{'scenario':24} {'metric':18} {'score':>7} {'questions':>10}")
    for name, s in result["scenarios"].items():
        score = f"{s['score']:7.2%} {s['total']:10}" if s["total"] else "not run"
        print(f"{name:24} {s['metric']:18} {score}")
    print(f"{'average':43} {result['accuracy']:7.2%} {result['total']:10}")
