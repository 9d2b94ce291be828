"""Question answering, --task dolly: eight of HELM's scenarios, with its metrics and prompts."""
import re
import string
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Example, collate, fields, prompt_of, read_rows
from model import LM, UserError, generate

# HELM (Liang et al. 2022, arXiv 2211.09110): its scenarios, metrics, prompts and ways to choose.
#
# Multiple choice: MMLU jointly (the options stand in the prompt, the model writes a letter);
# HellaSwag and OpenbookQA separately, by each option's log-likelihood after the question: for
# HellaSwag a token of it, for OpenbookQA less what the option has after a bare `Answer:`. So HELM
# has it: an ending continues a text, long ones must not lose for their length, nor frequent words
# win by themselves.
#
# --shots 0: the template that Dolly was trained with. Else HELM's prompts, with at most HELM's 5
# worked examples: MMLU's from its dev files; separate scoring has none. DIFFERS: for the others
# HELM draws them from training files, which helm_qa/ has not; rows spread over the scored file
# serve, and are not scored.

WINDOW = 4096           # LLaMA 2's: worked examples that do not fit are left out, as in HELM
LETTERS = list("ABCD")
SCENARIOS = {           # files in helm_qa/, metric, HELM's bound on an answer's tokens; 0: separate
    "mmlu": ("mmlu/test/*_test.csv", "exact match", 5),
    "boolq": ("boolq/val.jsonl", "quasi-exact match", 5),
    "narrativeqa": ("narrativeqa/test.json.zip", "F1", 100),
    "naturalquestions_closed": ("nq_open/NQ-open.dev.jsonl", "F1", 300),
    "naturalquestions_open": ("nq_open/nq-open-oracle.jsonl.gz", "F1", 300),
    "quac": ("quac/[vq]*.json", "F1", 100),             # val_v0.2.json, or quac_sample.json
    "hellaswag": ("hellaswag/hellaswag_val.jsonl", "exact match", 0),
    "openbookqa": ("openbookqa/test.tsv", "exact match", 0)}


class Question(NamedTuple):
    ask: str
    passage: str
    answers: list[str]              # each of them is right
    options: tuple[str, ...] = ()   # what separate scoring chooses from
    subject: str = ""               # MMLU's


def questions_of(name: str, row) -> list[Question]:
    """What HELM asks about a row of a scenario's official file; KeyError, … where it is none."""
    if name == "mmlu":
        ask, *options, letter = row
        listed = [f"{x}. {option}" for x, option in zip(LETTERS, options, strict=True)]
        return [Question("\n".join([ask, *listed]), "", [LETTERS[LETTERS.index(letter)]])]
    if name == "quac":
        return quac_turns(row)
    if name == "narrativeqa":
        return [Question(untokenised(row["question.tokens"]), untokenised(row["context.tokens"]),
                         [untokenised(text) for text in row["ground_truths"]])]
    if name == "openbookqa":
        return [choice(row[1], re.split(r"\s*\([A-D]\)\s*", row[2])[1:], LETTERS.index(row[4]))]
    if name == "hellaswag":
        then = row["ctx_b"][:1].upper() + row["ctx_b"][1:]
        begun = f"{row['activity_label']}: {row['ctx_a']} {then}".strip()
        return [choice(begun, row["endings"], int(row["label"]))]
    ask = row["question"].removesuffix("?") + "?"           # a search engine's query as a question
    if name == "boolq":
        answer = {"true": "Yes", "false": "No"}[str(row["label"]).lower()]  # JSON's true, or text
        return [Question(ask, row["passage"], [answer])]
    if name == "naturalquestions_open":
        return [Question(ask, row["ctxs"][0]["text"], row["answers"])]
    return [Question(ask, "", row["answer"])]


def choice(ask: str, options: list[str], right: int) -> Question:
    if len(options) != 4 or not all(options) or not 0 <= right < 4:
        raise ValueError("expected four options, and which is right")
    answers = [options[right], LETTERS[right]]              # a prediction may be the letter
    return Question(ask, "", answers, tuple(options))


def quac_turns(row: dict) -> list[Question]:
    """Every turn, with the true turns before it. DIFFERS: HELM scores one turn, drawn at random."""
    heads = (("Title", row["title"]), ("Background", row.get("background")),
             ("Section", row.get("section_title")))
    unknown, questions = {"CANNOTANSWER": "Not enough information"}, []
    for dialogue in row["paragraphs"]:
        text = "".join(f"{name}: {value}\n" for name, value in heads if value)
        text += dialogue["context"].removesuffix(" CANNOTANSWER")
        for turn in dialogue["qas"]:
            answers = [unknown.get(a["text"], a["text"]) for a in turn["answers"]]
            questions.append(Question(turn["question"], text, answers))
            said = turn["orig_answer"]["text"]
            text += f"\nQuestion: {turn['question']}\nAnswer: {unknown.get(said, said)}"
    return questions


@lru_cache(maxsize=512)                                         # thirty questions share a story
def untokenised(text: str) -> str:
    """`They did n't , Ann 's` -> `They didn't, Ann's`: no model writes the former."""
    return re.sub(r" (n't|'(?:s|m|d|re|ve|ll)\b|[.,;:!?)])", r"\1", text).replace("( ", "(")


def read_questions(name: str, paths) -> list[Question]:
    questions = []
    for path in sorted(paths):
        subject = path.stem.rsplit("_", 1)[0].replace("_", " ") if name == "mmlu" else ""
        header = name == "openbookqa"
        for i, row in enumerate(read_rows(path)[header:], 1 + header):
            try:
                questions += [q._replace(subject=subject) for q in questions_of(name, row)]
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{path}, row {i}: expected a row of {name}'s official file "
                                f"({error!r})") from None
    return questions


def read_scenarios(data_dir) -> dict[str, list[Question]]:
    """Every scenario's questions in their files' order; none where the files are not there."""
    root = Path(data_dir) / "helm_qa"
    found = {name: read_questions(name, root.glob(SCENARIOS[name][0])) for name in SCENARIOS}
    if not any(found.values()):
        raise UserError(f"{root}: expected files of HELM's scenarios, such as "
                        f"{root}/boolq/val.jsonl; found none")
    for name in [name for name, questions in found.items() if not questions]:
        print(f"note: {name} is not run: nothing at {root / SCENARIOS[name][0]}", file=sys.stderr)
    return found


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


def scored(name: str, questions: list[Question], texts: list[str]) -> dict:
    """The mean over the questions of the best agreement with an answer, by a text's first line."""
    metric, lines = SCENARIOS[name][1], [text.strip().partition("\n")[0] for text in texts]
    best = [max((agreement(metric, gold, line) for gold in q.answers), default=0.0)
            for q, line in zip(questions, lines, strict=True)]
    return {"metric": metric, "score": sum(best) / len(best) if best else None, "total": len(best)}


def averaged(scenarios: dict) -> dict:
    """`accuracy`: the average of the scenarios that ran (Figure 2's); `correct`: the sum of all
    questions' scores."""
    ran = [s for s in scenarios.values() if s["total"]]
    return {"correct": round(sum(s["score"] * s["total"] for s in ran), 4),
            "total": sum(s["total"] for s in ran),
            "accuracy": sum(s["score"] for s in ran) / max(len(ran), 1), "scenarios": scenarios}


def spread(rows: list, n: int) -> list:
    """n rows evenly over a file, which may be sorted by subject or by story."""
    return [rows[i * len(rows) // n] for i in range(n)]


def worked_examples(name: str, questions: list[Question], opts) -> dict[str, list[Question]]:
    """By subject, as many as there are, but never most of the file that is scored."""
    subjects = {q.subject for q in questions}
    shots = min(opts.shots, 5) if SCENARIOS[name][2] else 0
    if name == "mmlu" and shots:
        dev = read_questions(name, (Path(opts.data_dir) / "helm_qa").glob("mmlu/dev/*_dev.csv"))
        return {s: [d for d in dev if d.subject == s][:shots] for s in subjects}
    return dict.fromkeys(subjects, spread(questions, min(shots, len(questions) // 2)))


def question_ids(q: Question, shown: list[Question], opts, new_tokens: int, tokenizer) -> list[int]:
    """BOS and the prompt: the training template; with shots HELM's, or the bare question."""
    def block(q):
        return (f"Passage: {q.passage}\n" if q.passage else "") + f"Question: {q.ask}\nAnswer:"
    if q.options or not opts.shots:
        text = q.ask if opts.shots else prompt_of(q.ask, q.passage)
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


def choose_options(lm: LM, tokenizer, name: str, questions, opts, progress: str) -> list[str]:
    """HELM's separate method. The four options of a question follow each other."""
    options = [tokenizer.encode(option) for q in questions for option in q.options]

    def likelihoods(asked):
        prompts = [ids for q in asked for ids in 4 * [question_ids(q, [], opts, 0, tokenizer)]]
        pairs = [Example(prompt + option, len(prompt))
                 for prompt, option in zip(prompts, options, strict=True)]
        return log_likelihoods(lm, pairs, opts.batch_size, progress)
    scores = likelihoods(questions)
    if name == "hellaswag":
        scores = scores / torch.tensor([len(option) for option in options])
    else:
        scores = scores - likelihoods([q._replace(ask="Answer:") for q in questions])
    return [q.options[best] for q, best in zip(questions, scores.view(-1, 4).argmax(1).tolist())]


def answers_to(lm: LM, tokenizer, name: str, questions, shown: dict, opts, progress: str) -> list:
    """The model's answers. In HELM's prompts a line break ends one, as in HELM."""
    if not SCENARIOS[name][2]:
        return choose_options(lm, tokenizer, name, questions, opts, progress)
    new_tokens = opts.max_new_tokens or SCENARIOS[name][2]
    ids = [question_ids(q, shown[q.subject], opts, new_tokens, tokenizer) for q in questions]
    room = opts.batch_size * 1024 // (max(map(len, ids)) + new_tokens)  # fewer long prompts
    texts = generate(lm, ids, new_tokens, tokenizer.eos, min(opts.batch_size, max(room, 1)),
                     stop=tokenizer.encode("\n")[-1] if opts.shots else None, progress=progress)
    return [tokenizer.decode(text) for text in texts]


def score_dolly(lm: LM, tokenizer, opts, progress: str) -> dict:
    """The eight scenarios; --limit questions of each, spread over its files."""
    results = {}
    for name, questions in read_scenarios(opts.data_dir).items():
        shown = worked_examples(name, questions, opts)
        held_out = {id(example) for examples in shown.values() for example in examples}
        asked = [q for q in questions if id(q) not in held_out]
        asked = spread(asked, min(opts.limit or len(asked), len(asked)))
        title = f"{progress} {name}"
        texts = answers_to(lm, tokenizer, name, asked, shown, opts, title) if asked else []
        results[name] = scored(name, asked, texts)
    return averaged(results)


def score_dolly_predictions(path, data_dir) -> dict:
    """A file of {"scenario", "index": the question's place in its files, "text"}; what is not in it
    is not run."""
    rows, questions = read_rows(Path(path)), read_scenarios(data_dir)
    pairs = {name: {} for name in SCENARIOS}
    for i, (row, (name, text)) in enumerate(zip(rows, fields(rows, path, ("scenario", "text"))), 1):
        if name not in SCENARIOS:
            raise UserError(f"{path}, row {i}: expected a scenario of {', '.join(SCENARIOS)}, "
                            f"found {name!r}")
        index, n = row.get("index"), len(questions[name])
        if type(index) is not int or not 0 <= index < n or index in pairs[name]:
            raise UserError(f"{path}, row {i}: expected an index of {name}'s {n} questions, each "
                            f"once, found {index!r}")
        pairs[name][index] = text
    return averaged({name: scored(name, [questions[name][i] for i in texts], list(texts.values()))
                     for name, texts in pairs.items()})


def print_scenarios(result: dict):
    print(f"{'scenario':24} {'metric':18} {'score':>7} {'questions':>10}")
    for name, s in result["scenarios"].items():
        score = f"{s['score']:7.2%} {s['total']:10}" if s["total"] else "not run"
        print(f"{name:24} {s['metric']:18} {score}")
    print(f"{'average':43} {result['accuracy']:7.2%} {result['total']:10}")
