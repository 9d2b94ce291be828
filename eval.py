"""Evaluation: GSM8K, HumanEval-X, question answering; a finished run, a checkpoint, or a file of predictions.

In order: the machine (device, dtype, threads); GSM8K (prompts, extraction, numeric comparison);
question answering (HELM's scenarios); evaluate (any task); runs (a finished run's models again, or
exported); the command line.

    python eval.py --run runs/gsm8k-fedbiot-b0.2-s2-seed0 --model adapfu
    python eval.py --ckpt tiny/llama --task gsm8k --limit 100
    python eval.py --ckpt llama-2-7b --data-dir data --task dolly --limit 200
    python eval.py --task gsm8k --predictions answers.jsonl
"""
import argparse
import json
import os
import re
import shutil
import string
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import baselines
from data import Example, collate, fields, find_file, prompt_of, read_gsm8k, read_rows
from lora import lora_tensors, merged, write_peft
from model import LM, UserError, generate, load, read_saved, write_checkpoint

HERE = Path(__file__).resolve().parent
BUNDLED_CKPT, BUNDLED_DATA = HERE / "tiny" / "llama", HERE / "tiny" / "data"
TASKS = ("gsm8k", "rosetta", "dolly")


# ---- the machine --------------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0][:80]}); try auto or cpu") from None
    return device


def pick_dtype(name: str, device) -> torch.dtype:
    name = ("bf16" if torch.device(device).type == "cuda" else "fp32") if name == "auto" else name
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


# ---- GSM8K --------------------------------------------------------------------------------------

NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def extract_number(text: str) -> Decimal | None:
    """The number after the first `The answer is` or `####`, exactly; without a marker the last number of
    the text; None where there is none. `18.0` is `18`; commas, `$`, `%` and a final dot do not matter."""
    marker = re.search(r"[Tt]he answer is|####", text)
    found = NUMBER.findall(text[marker.end():] if marker else text)
    return Decimal(re.sub(r"[,$]", "", found[0 if marker else -1])) if found else None


def gsm8k_shots(shots: int) -> str:
    """Worked examples in front of the question: `Q: …  A: …`, written for this project."""
    path = HERE / "tiny" / "gsm8k_shots.jsonl"
    pairs = fields(read_rows(path), path, ("question", "answer"))
    if not 0 <= shots <= len(pairs):
        raise UserError(f"--shots {shots}: {len(pairs)} worked examples are at hand, so choose 0..{len(pairs)}")
    return "".join(f"Q: {q}\nA: {a.replace('####', 'The answer is')}.\n\n" for q, a in pairs[:shots])


def score_gsm8k(lm: LM, tokenizer, opts, progress: str) -> dict:
    """Greedy chain of thought. Without shots the prompt is the training template's."""
    rows = read_gsm8k(opts.data_dir, "train")[-opts.validate:] if opts.validate else read_gsm8k(opts.data_dir, "test")
    rows = rows[:opts.limit or None]
    head = gsm8k_shots(opts.shots)
    prompts = [f"{head}Q: {row.instruction}\nA:" if opts.shots else prompt_of(row.instruction) for row in rows]
    ids = [[tokenizer.bos] + tokenizer.encode(prompt) for prompt in prompts]
    texts = generate(lm, ids, opts.max_new_tokens or 256, tokenizer.eos, opts.batch_size, progress=progress)
    return accuracy([extract_number(tokenizer.decode(t)) for t in texts], [extract_number(r.output) for r in rows])


def score_gsm8k_predictions(path, data_dir) -> dict:
    """A file of {"index": row of test.jsonl, "text": …} -> accuracy over the file's rows."""
    rows, gold = read_rows(Path(path)), read_gsm8k(data_dir, "test")
    texts, indices = fields(rows, path, ("text",)), [row.get("index") for row in rows]
    for i, index in enumerate(indices, 1):
        if type(index) is not int or not 0 <= index < len(gold) or index in indices[:i - 1]:
            raise UserError(f"{path}, row {i}: expected an index in 0..{len(gold) - 1}, each once, found {index!r}")
    return accuracy([extract_number(text) for text, in texts], [extract_number(gold[i].output) for i in indices])


def accuracy(predicted: list, gold: list) -> dict:
    correct = sum(p is not None and p == g for p, g in zip(predicted, gold, strict=True))
    return {"correct": correct, "total": len(gold), "accuracy": correct / len(gold) if gold else 0.0}


# ---- question answering -------------------------------------------------------------------------
# HELM (Liang et al. 2022, arXiv 2211.09110): its scenarios, metrics, prompts and ways to choose.
#
# Multiple choice: MMLU jointly (the options stand in the prompt, the model writes a letter); HellaSwag and
# OpenbookQA separately, by each option's log-likelihood after the question: for HellaSwag a token of it,
# for OpenbookQA less what the option has after a bare `Answer:`. So HELM has it: an ending continues a
# text, long ones must not lose for their length, nor frequent words win by themselves.
#
# --shots 0: the template that Dolly was trained with. Else HELM's prompts, with at most HELM's 5 worked
# examples: MMLU's from its dev files; separate scoring has none. DIFFERS: for the others HELM draws them
# from training files, which helm_qa/ has not; rows spread over the scored file serve, and are not scored.

WINDOW = 4096                   # LLaMA 2's: worked examples that do not fit are left out, as in HELM
LETTERS = list("ABCD")
SCENARIOS = {                   # files below helm_qa/, metric, HELM's bound on an answer's tokens (0: separate)
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
    """What HELM asks about a row of a scenario's official file; KeyError, ValueError, … where it is none."""
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
        return [choice(f"{row['activity_label']}: {row['ctx_a']} {then}".strip(), row["endings"], int(row["label"]))]
    ask = row["question"].removesuffix("?") + "?"               # a search engine's query as a question
    if name == "boolq":                                         # the label as JSON's true or as text
        return [Question(ask, row["passage"], [{"true": "Yes", "false": "No"}[str(row["label"]).lower()]])]
    opened = name == "naturalquestions_open"
    return [Question(ask, row["ctxs"][0]["text"] if opened else "", row["answers" if opened else "answer"])]


def choice(ask: str, options: list[str], right: int) -> Question:
    if len(options) != 4 or not all(options) or not 0 <= right < 4:
        raise ValueError("expected four options, and which is right")
    return Question(ask, "", [options[right], LETTERS[right]], tuple(options))      # a prediction may be the letter


def quac_turns(row: dict) -> list[Question]:
    """Every turn, with the true turns before it. DIFFERS: HELM scores one random turn of a dialogue."""
    heads = (("Title", row["title"]), ("Background", row.get("background")), ("Section", row.get("section_title")))
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
                raise UserError(f"{path}, row {i}: expected a row of {name}'s official file ({error!r})") from None
    return questions


def read_scenarios(data_dir) -> dict[str, list[Question]]:
    """Every scenario's questions in their files' order; none where the files are not there."""
    root = Path(data_dir) / "helm_qa"
    found = {name: read_questions(name, root.glob(files)) for name, (files, *_) in SCENARIOS.items()}
    if not any(found.values()):
        raise UserError(f"{root}: expected files of HELM's scenarios, such as {root}/boolq/val.jsonl; found none")
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
    """The mean over the questions of the best agreement with an answer. Of a text the first line counts."""
    metric, lines = SCENARIOS[name][1], [text.strip().partition("\n")[0] for text in texts]
    best = [max((agreement(metric, gold, line) for gold in q.answers), default=0.0)
            for q, line in zip(questions, lines, strict=True)]
    return {"metric": metric, "score": sum(best) / len(best) if best else None, "total": len(best)}


def averaged(scenarios: dict) -> dict:
    """`accuracy`: the average of the scenarios that ran (Figure 2's); `correct`: the sum of all questions' scores."""
    ran = [s for s in scenarios.values() if s["total"]]
    return {"correct": round(sum(s["score"] * s["total"] for s in ran), 4), "total": sum(s["total"] for s in ran),
            "accuracy": sum(s["score"] for s in ran) / max(len(ran), 1), "scenarios": scenarios}


def spread(rows: list, n: int) -> list:
    """n rows evenly over a file, which may be sorted by subject or by story."""
    return [rows[i * len(rows) // n] for i in range(n)]


def worked_examples(name: str, questions: list[Question], opts) -> dict[str, list[Question]]:
    """By subject, as many as there are, but never most of the file that is scored."""
    subjects, shots = {q.subject for q in questions}, min(opts.shots, 5) if SCENARIOS[name][2] else 0
    if name == "mmlu" and shots:
        dev = read_questions(name, (Path(opts.data_dir) / "helm_qa").glob("mmlu/dev/*_dev.csv"))
        return {s: [d for d in dev if d.subject == s][:shots] for s in subjects}
    return dict.fromkeys(subjects, spread(questions, min(shots, len(questions) // 2)))


def question_ids(q: Question, shown: list[Question], opts, new_tokens: int, tokenizer) -> list[int]:
    """BOS and the prompt: the training template; with shots HELM's, or for separate scoring the bare question."""
    def block(q):
        return (f"Passage: {q.passage}\n" if q.passage else "") + f"Question: {q.ask}\nAnswer:"
    if q.options or not opts.shots:
        return [tokenizer.bos] + tokenizer.encode(q.ask if opts.shots else prompt_of(q.ask, q.passage))
    head = f"The following are multiple choice questions (with answers) about {q.subject}.\n\n" if q.subject else ""
    while True:
        blocks = [f"{block(example)} {example.answers[0]}\n\n" for example in shown]
        ids = [tokenizer.bos] + tokenizer.encode(head + "".join(blocks) + block(q))
        if len(ids) + new_tokens <= WINDOW or not shown:
            return ids
        shown = shown[:-1]


@torch.inference_mode()
def log_likelihoods(lm: LM, examples: list[Example], batch_size: int, progress: str) -> torch.Tensor:
    """log p(answer | prompt) of each example, fp32. The head sees the positions that predict an answer only."""
    out, order = torch.empty(len(examples)), sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=None, leave=False):
        chosen = order[start:start + batch_size]
        batch = collate([examples[i] for i in chosen]).to(lm.tok_embeddings.weight.device)
        logits = lm.output(lm.hidden(batch.tokens).flatten(0, 1)[batch.rows]).float()               # (N, V)
        losses = F.cross_entropy(logits, batch.targets, reduction="none") * (batch.weights > 0)     # (N,), less padding
        out[chosen] = -losses.new_zeros(len(chosen)).index_add(0, batch.rows // batch.tokens.shape[1], losses).cpu()
    return out


def choose_options(lm: LM, tokenizer, name: str, questions: list[Question], opts, progress: str) -> list[str]:
    """HELM's separate method. The four options of a question follow each other."""
    options = [tokenizer.encode(option) for q in questions for option in q.options]

    def likelihoods(asked):
        prompts = [ids for q in asked for ids in 4 * [question_ids(q, [], opts, 0, tokenizer)]]
        pairs = [Example(prompt + option, len(prompt)) for prompt, option in zip(prompts, options, strict=True)]
        return log_likelihoods(lm, pairs, opts.batch_size, progress)
    scores = likelihoods(questions)
    if name == "hellaswag":
        scores = scores / torch.tensor([len(option) for option in options])
    else:
        scores = scores - likelihoods([q._replace(ask="Answer:") for q in questions])
    return [q.options[best] for q, best in zip(questions, scores.view(-1, 4).argmax(1).tolist())]


def answers_to(lm: LM, tokenizer, name: str, questions: list[Question], shown: dict, opts, progress: str) -> list:
    """The model's answers. In HELM's prompts a line break ends one, as in HELM."""
    if not SCENARIOS[name][2]:
        return choose_options(lm, tokenizer, name, questions, opts, progress)
    new_tokens = opts.max_new_tokens or SCENARIOS[name][2]
    ids = [question_ids(q, shown[q.subject], opts, new_tokens, tokenizer) for q in questions]
    room = opts.batch_size * 1024 // (max(map(len, ids)) + new_tokens)      # fewer long prompts at a time
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
        texts = answers_to(lm, tokenizer, name, asked, shown, opts, f"{progress} {name}") if asked else []
        results[name] = scored(name, asked, texts)
    return averaged(results)


def score_dolly_predictions(path, data_dir) -> dict:
    """A file of {"scenario", "index": the question's place in its files, "text"}; what is not in it is not run."""
    rows, questions, pairs = read_rows(Path(path)), read_scenarios(data_dir), {name: {} for name in SCENARIOS}
    for i, (row, (name, text)) in enumerate(zip(rows, fields(rows, path, ("scenario", "text"))), 1):
        if name not in SCENARIOS:
            raise UserError(f"{path}, row {i}: expected a scenario of {', '.join(SCENARIOS)}, found {name!r}")
        index, n = row.get("index"), len(questions[name])
        if type(index) is not int or not 0 <= index < n or index in pairs[name]:
            raise UserError(f"{path}, row {i}: expected an index of {name}'s {n} questions, each once, found {index!r}")
        pairs[name][index] = text
    return averaged({name: scored(name, [questions[name][i] for i in texts], list(texts.values()))
                     for name, texts in pairs.items()})


def print_scenarios(result: dict):
    print(f"{'scenario':24} {'metric':18} {'score':>7} {'questions':>10}")
    for name, s in result["scenarios"].items():
        print(f"{name:24} {s['metric']:18} " + (f"{s['score']:7.2%} {s['total']:10}" if s["total"] else "not run"))
    print(f"{'average':43} {result['accuracy']:7.2%} {result['total']:10}")


# ---- any task -----------------------------------------------------------------------------------

def evaluate(lm: LM, tokenizer, task: str, opts, progress: str = "evaluate") -> dict:
    """{"correct", "total", "accuracy", …} of a model on a task's test set. `opts` holds data_dir, limit,
    shots, batch_size, max_new_tokens (0 = the task's), validate (score that many held-out training rows instead)."""
    if task == "gsm8k":
        return score_gsm8k(lm, tokenizer, opts, progress)
    if task == "dolly":
        return score_dolly(lm, tokenizer, opts, progress)
    raise UserError(f"--task {task}: no evaluation yet")


# ---- runs ---------------------------------------------------------------------------------------

def read_run(folder) -> SimpleNamespace:
    """The configuration of a run folder, as the run had it."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        return SimpleNamespace(**config | {"dropout": Fraction(config["dropout"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--run {folder}: expected a run folder with config.json ({error})") from None


def models_of_run(folder, device, dtype) -> tuple[dict, object, SimpleNamespace]:
    """(models by name, tokenizer, configuration) of a finished run: the checkpoint and its lora.pt."""
    cfg, path = read_run(folder), Path(folder) / "lora.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such file; the run is not finished: go on with train.py --resume --out {folder}")
    full, tokenizer = load(cfg.ckpt, dtype=dtype, device=device)
    server = baselines.module_of(cfg.method).Server(full, None, cfg)
    try:
        server.load_state_dict({"learnt": read_saved(path)})
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: not what this run learnt ({str(error)[:120]})") from None
    return server.models(), tokenizer, cfg


def export(lm, folder: Path, form: str, source: str):
    """A model as files for other tools. The folder appears once all of it is written."""
    is_lm = isinstance(lm, LM)                                          # FedPT's proxy is two
    state, config = (merged(lm), replace(lm.config, n_layers=len(lm.layers))) if is_lm else ({}, None)
    with torch.device("meta"):
        if not is_lm or state.keys() != LM.empty(config).state_dict().keys():
            raise UserError("--export: this method's result is not a LLaMA's weights, so no other tool could load it")
    if form == "peft" and (not lora_tensors(lm) or config != lm.config):
        raise UserError("--format peft: needs LoRA on the whole model, such as adapfu's; take hf or meta")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)                             # of an export that was killed
    try:
        part.mkdir(parents=True)
        write_peft(part, lm, source) if form == "peft" else write_checkpoint(part, state, config, Path(source), form)
        part.rename(folder)
    except OSError as error:
        raise UserError(f"--export {folder}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{folder}: written as {form}", file=sys.stderr)


# ---- command line -------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def main_guard(main):
    """Runs `main`; a user's mistake ends in one line and status 2, Ctrl-C in one line and status 130."""
    try:
        sys.exit(main())
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what was saved stays", file=sys.stderr)
        sys.exit(130)


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--run", help="run folder of train.py")
    add("--model", default="adapfu", help="which of the run's models (default adapfu)")
    add("--ckpt", help="checkpoint folder (default: the bundled one)")
    add("--task", choices=TASKS, help="default: the run's")
    add("--data-dir", help="data folder (default: the run's, or the bundled one)")
    add("--limit", type=int, default=0,
        help="first N test examples; of each question-answering scenario N, spread over it (0: all)")
    add("--shots", type=int, help="worked examples in the prompt, for question answering 5 at most "
        "(default: 0 for the bundled model, else 8)")
    add("--prompt", help="print the greedy completion of this text, and nothing else")
    add("--max-new-tokens", type=int, default=0, help="0: the task's (GSM8K 256)")
    add("--predictions", help="score this JSONL file instead of a model")
    add("--export", help="write the model (of --run, or --ckpt) to this new folder, for other tools")
    add("--format", choices=("hf", "meta", "peft"), default="hf", help="merged weights, or LoRA alone (default hf)")
    add("--batch-size", type=int, default=64, help="sequences generated at a time")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--device", default="auto")
    add("--threads", type=int, default=0, help="CPU threads (0: all cores)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(validate=0)
    args = parser.parse_args(argv)
    for name in ("limit", "max_new_tokens", "threads"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected 1 or more")
    if args.export and (there := Path(args.export)).exists() and not (there.is_dir() and not any(there.iterdir())):
        parser.error(f"--export {there}: exists already and is not empty; choose another name")
    if args.run and args.ckpt:
        parser.error("--run and --ckpt: a run knows its checkpoint; give one of the two")
    return args


def complete(lm: LM, tokenizer, args) -> str:
    """Greedy completion of raw text after BOS, no template."""
    prompt = [tokenizer.bos] + tokenizer.encode(args.prompt)
    ids = generate(lm, [prompt], args.max_new_tokens or 64, tokenizer.eos)[0]
    text, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    return whole[len(text):]                        # decoded together: the first piece keeps its space


def main(argv=None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    if args.predictions:
        task = args.task or "gsm8k"
        score = score_dolly_predictions if task == "dolly" else score_gsm8k_predictions
        report(score(args.predictions, args.data_dir or BUNDLED_DATA), task, args)
        return 0
    device = pick_device(args.device)
    dtype = None if args.export and args.dtype == "auto" else pick_dtype(args.dtype, device)
    if args.run:
        models, tokenizer, cfg = models_of_run(args.run, device, dtype)
        if args.model not in models:
            raise UserError(f"--model {args.model}: a {cfg.method} run has {', '.join(models)}")
        lm, args.task = models[args.model], args.task or cfg.task
        args.data_dir = args.data_dir or cfg.data_dir
        args.shots = cfg.shots if args.shots is None else args.shots
    else:
        lm, tokenizer = load(args.ckpt or BUNDLED_CKPT, dtype=dtype, device=device)
        args.data_dir = args.data_dir or BUNDLED_DATA
        args.shots = (8 if args.ckpt else 0) if args.shots is None else args.shots
    if args.export:
        export(lm, Path(args.export).resolve(), args.format, cfg.ckpt if args.run else str(args.ckpt or BUNDLED_CKPT))
        return 0
    if args.prompt is not None:
        print(complete(lm, tokenizer, args))
        return 0
    if not args.task:
        raise UserError(f"--task: expected one of {', '.join(TASKS)} (or --prompt, --run, --predictions)")
    report(evaluate(lm, tokenizer, args.task, args, args.task), args.task, args)
    return 0


def report(result: dict, task: str, args):
    if args.json:
        print(json.dumps(result))
    elif task == "dolly":
        print_scenarios(result)
    else:
        print(f"{task}: {result['correct']} of {result['total']} correct, accuracy {result['accuracy']:.2%}")


if __name__ == "__main__":
    main_guard(main)
