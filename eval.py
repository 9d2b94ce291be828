"""Evaluation: GSM8K, HumanEval-X, question answering; a finished run, a checkpoint, or a file of predictions.

In order: the machine (device, dtype, threads); GSM8K (prompts, extraction, numeric comparison);
question answering (HELM's scenarios); the sandbox; HumanEval-X; evaluate (any task); runs (a finished run's models again, or
exported); the command line.

    python eval.py --run runs/gsm8k-fedbiot-b0.2-s2-seed0 --model adapfu
    python eval.py --ckpt tiny/llama --task gsm8k --limit 100
    python eval.py --ckpt llama-2-7b --data-dir data --task dolly --limit 200
    python eval.py --task gsm8k --predictions answers.jsonl
    python eval.py --task rosetta --predictions samples.jsonl --run-code
"""
import argparse
import hashlib
import json
import math
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
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


# ---- sandbox ------------------------------------------------------------------------------------

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
PROCESSES, FILE_MB, OUTPUT_MB = 128, 64, 4      # of any program; time and memory are the caller's to say
# What bwrap does, by hand. $1: the new root, $2: the program's folder, $3: how many folders to show; these; the command.
UNSHARE = """
root=$1 folder=$2 n=$3; shift 3
mount -t tmpfs -o mode=755,size=1m tmpfs "$root"; cd "$root"; mkdir -p proc old dev
show() { if [ -d "$1" ]; then mkdir -p ".$1"; else mkdir -p ".${1%/*}"; : > ".$1"; fi; mount --rbind "$1" ".$1"; }
while [ $n -gt 0 ]; do
    if [ -L "$1" ]; then ln -s "$(readlink "$1")" ".$1"; else show "$1"; mount -o remount,bind,ro ".$1"; fi
    shift; n=$((n - 1))
done
for device in null zero random urandom; do show /dev/$device; done
ln -s /proc/self/fd dev/fd; mount -t proc proc proc; show "$folder"; mount -o remount,bind,ro "$root"
pivot_root . old; cd /; umount -l /old; exec "$@"
"""
# In a chroot a program cannot make a user namespace, in which it would be root and could mount memory without end.
JAIL = 'mount --rbind / /old && exec chroot /old sh -c \'cd "$HOME" && exec "$@"\' sh "$@"'


class Box(NamedTuple):
    """How a program is kept apart, and what it is given."""
    kind: str                   # bwrap, unshare or none
    shown: tuple = ()           # folders that it may read, besides the system's
    env: tuple = ()             # its environment: (name, value) pairs


def make_box(unsafe: bool = False) -> Box:
    """The first isolation that works here; none at all only where the user accepts that."""
    for kind in ("bwrap", "unshare"):
        if shutil.which(kind) and not run_sandboxed(["true"], {}, Box(kind))[0]:
            return Box(kind)
    if not unsafe:
        raise UserError("--run-code: expected bwrap or unshare to keep a model's programs apart, neither works here; "
                        "install bubblewrap, or accept the risk with --unsafe-no-sandbox")
    print("note: no sandbox: the programs can reach your files and the network", file=sys.stderr)
    return Box("none")


def run_sandboxed(command: list, files: dict, box: Box, seconds=10.0, memory_mb=1024, address_mb=12288) -> tuple[str, str]:
    """Runs `command` in a fresh folder with `files`. ("" or a limit or "exit status N", the end of its output).

    It has PID, mount, network and IPC namespaces of its own, reads the toolchain's folders and nothing else, has no
    capability and, under root, a user id of its own. Resident memory is bounded for all its processes together.
    """
    base = Path(tempfile.mkdtemp(prefix="fedbiot-sandbox-")).resolve()
    folder = base / "work"
    # Limits on processes do not bind root. systemd's dynamic users: no account has these.
    uid = 61184 + base.stat().st_ino % 4336 if os.getuid() == 0 and box.kind != "none" else None
    env = {"PATH": SYSTEM_PATH, "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", **dict(box.env)}
    try:
        folder.mkdir(), (base / "root").mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", errors="replace")
        for path in (folder, *folder.iterdir()) if uid else ():
            os.chown(path, uid, uid)
        with tempfile.TemporaryFile() as output:
            argv = isolate(base, box) + restrict(uid, box, seconds, address_mb) + command
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder, env=env,
                                       start_new_session=True)
            try:
                why = watch(process, output, folder, seconds, memory_mb)
            finally:
                stop(process)
            output.seek(max(0, output.seek(0, os.SEEK_END) - 10000))
            text = output.read().decode(errors="replace")
        return why or (f"exit status {process.returncode}" if process.returncode else ""), text
    finally:                                # not shutil.rmtree: it recurses, so a deep tree would stop it
        subprocess.run(["sh", "-c", 'chmod -R u+rwX "$1"; rm -rf "$1"', "sh", base], stderr=subprocess.DEVNULL)


def isolate(base: Path, box: Box) -> list:
    """What stands in front of a program to give it namespaces and a file tree of its own."""
    folder, shown = str(base / "work"), [p for p in SYSTEM if os.path.lexists(p)] + list(box.shown)
    if box.kind == "unshare":
        user = [] if os.getuid() == 0 else ["--map-root-user"]
        return ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", *user,
                "sh", "-ec", UNSHARE, "sh", str(base / "root"), folder, str(len(shown)), *shown, "sh", "-c", JAIL, "sh"]
    if box.kind == "none":
        return []
    argv = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--as-pid-1"]
    for path in [*shown, folder]:           # --dir: the parents that bwrap makes unasked only root may enter
        argv += [word for above in reversed(Path(path).parents[:-1]) for word in ("--dir", str(above))]
        how = "--symlink" if os.path.islink(path) else "--bind" if path == folder else "--ro-bind"
        argv += [how, os.readlink(path) if how == "--symlink" else path, path]
    if os.getuid():                         # JAIL needs rights that only root has here
        known = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
        argv += ["--unshare-user", "--disable-userns"] if "--disable-userns" in known else []
    return argv + ["--proc", "/proc", "--dev", "/dev", "--dir", "/old", "--remount-ro", "/dev", "--remount-ro", "/",
                   "--chdir", folder, "--", *([] if os.getuid() else ["sh", "-c", JAIL, "sh"])]


def restrict(uid: int | None, box: Box, seconds: float, address_mb: int) -> list:
    """What limits a program and takes its rights. `timeout` is the namespace's init: nothing inside can kill it, and
    all that is left when it ends is killed with it, even if we were killed before."""
    argv = ["timeout", "-s", "KILL", str(seconds + 5), "prlimit"]
    for name, value in (("nproc", PROCESSES), ("fsize", FILE_MB << 20), ("as", address_mb << 20), ("nofile", 512), ("core", 0)):
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        argv.append(f"--{name}={value if hard == resource.RLIM_INFINITY else min(value, hard)}")
    user = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"] if uid else []
    if uid or box.kind == "unshare":
        argv += ["setpriv", *user, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    return argv


def watch(process, output, folder: Path, seconds: float, memory_mb: int) -> str:
    """Waits for the program's end ("") or for it to go over a limit (which)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            process.wait(0.05)
            return ""
        except subprocess.TimeoutExpired:
            resident = tree(process.pid)
        if sum(resident.values()) > memory_mb << 20:
            return "memory"
        if len(resident) > PROCESSES + 4:
            return "processes"
        if os.fstat(output.fileno()).st_size > OUTPUT_MB << 20:
            return "output"
        if disk_use(folder) > FILE_MB << 22:
            return "files"
    return "time"


def tree(root: int) -> dict[int, int]:
    """Process id -> resident bytes, of a process and all below it. An orphan falls to its namespace's init, so it stays."""
    above, resident = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text(errors="replace").rsplit(")", 1)[1].split()       # a name may hold anything
        except OSError:                                                             # it ended in between
            continue
        above[int(path.parent.name)] = int(stat[1])
        resident[int(path.parent.name)] = int(stat[21]) * resource.getpagesize()
    found, new = set(), {root}
    while new:
        found |= new
        new = {pid for pid, parent in above.items() if parent in found} - found
    return {pid: resident.get(pid, 0) for pid in found}


def disk_use(folder) -> float:
    """Bytes of all files below; what cannot be looked into counts as too much."""
    total, folders = 0, [folder]
    while folders:
        try:
            for entry in os.scandir(folders.pop()):
                total += 512 * entry.stat(follow_symlinks=False).st_blocks + 512
                folders += [entry.path] if entry.is_dir(follow_symlinks=False) else []
        except FileNotFoundError:           # deleted in between
            continue
        except OSError:
            return math.inf
    return total


def stop(process):
    """Kills what is left: the namespace's init and all else below, then what stood in front."""
    for pid in tree(process.pid).keys() - {process.pid} if process.poll() is None else ():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- HumanEval-X --------------------------------------------------------------------------------

LANGS = {"Python": "python", "CPP": "cpp", "Go": "go", "Java": "java"}      # task_id's word: folder
TOOLS = {"python": ("python3",), "cpp": ("g++",), "go": ("go",), "java": ("javac", "java")}
SOURCES = {"python": "main.py", "cpp": "main.cpp", "go": "main_test.go", "java": "Main.java"}
RUN_SECONDS, COMPILE_SECONDS = 15, 90
JVM = "-Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"
# The source is gone before its program starts, so that this cannot read its tests or their last word.
DRIVER = ("import os; exec(compile([open('main.py').read(), os.remove('main.py')][0], 'main.py', 'exec'), "
          "dict(__name__='__main__'))")
COMPILE = {
    "python": "",
    # Two problems include boost/any.hpp; where it is not installed, C++17's own class stands in.
    "cpp": "set -- -std=c++11; grep -q '<openssl/' main.cpp && set -- -std=c++11 -lcrypto; "
           "if grep -q '<boost/any.hpp>' main.cpp && [ ! -e /usr/include/boost/any.hpp ]; then mkdir boost; set -- -std=c++17 -I.; "
           "echo '#include <any>' > boost/any.hpp; echo 'namespace boost { using namespace std; }' >> boost/any.hpp; fi; "
           'g++ -w -o main main.cpp "$@" && rm main.cpp || exit 99; ',
    "go": "go test -c -vet=off -gcflags=-lang=go1.18 -ldflags=-s -o main main_test.go && rm main_test.go || exit 99; ",
    "java": f"javac -J{JVM.replace(' ', ' -J')} -nowarn -proc:none Main.java && rm Main.java || exit 99; "}
RUN = {"python": f"{shlex.quote(sys.executable)} -I -B -c {shlex.quote(DRIVER)}", "cpp": "./main", "go": "./main",
       "java": f"java {JVM} -cp . Main"}
# In a PID namespace /proc shows its own processes alone: there must be no more after the program than before.
ALONE = "set -- /proc/[0-9]*; n=$#; {}; s=$?; set -- /proc/[0-9]*; [ $s -ne 0 ] || [ $# -le $n ] || exit 98; exit $s"
ENDS = {"exit status 99": "not compiled", "exit status 98": "left a process behind", "exit status 137": "killed or out of time"}
# What CodeGeeX's evaluation imports in front of a program.
PYTHON_HEAD = "".join(f"import {name}\n" for name in "math re sys copy datetime itertools collections heapq statistics "
                      "functools hashlib string".split()) + "from typing import *\nfrom collections import *\n"
CPP_HEADERS = "stdlib.h algorithm math.h stdio.h vector string climits cstring iostream".split()
GO_PACKAGES = "math strings fmt strconv time bytes regexp sort math/rand crypto/md5".split()
# What the tests say last, and before how many of their closing braces.
LAST_WORD = {"python": (0, "\n__import__('os').write(1, b'{}')\n"), "cpp": (1, '\n__builtin_puts("{}");\n'),
             "go": (1, '\nif !t.Failed() {{ println("{}") }}\n'), "java": (2, '\nSystem.out.println("{}");\n')}
STRING = r'"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])*'"
BRACES = re.compile(r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|""".*?"""|`[^`]*`|[{}]|' + STRING, re.S)
MARGIN = re.compile(r'"""(?:\\.|[^\\])*?"""|' r"'''(?:\\.|[^\\])*?'''|#[^\n]*|^(?=[^\s#)\]}])|" + STRING, re.M)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k) (paper, section 5)."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def brace_ends(text: str, depth: int, wanted: int) -> list[int]:
    """Where a brace, not one in a comment or a string, closes down to the wanted depth."""
    ends = []
    for match in BRACES.finditer(text):
        depth += (match[0] == "{") - (match[0] == "}")
        ends += [match.end()] if match[0] == "}" and depth == wanted else []
    return ends


def truncate_completion(text: str, lang: str) -> str:
    """The text up to the function's end (Java: its class's), with Go's helpers right behind it. What does not end is
    returned whole: closing its braces would make another program of it."""
    if lang == "python":                            # a comment or a string at the margin ends nothing
        return text[:next((match.start() for match in MARGIN.finditer(text) if not match[0]), None)]
    ends = brace_ends(text, 2 if lang == "java" else 1, 0)
    if lang == "java" and not ends:                 # whole methods, but the prompt's class is left open
        methods = brace_ends(text, 2, 1)
        return text[:methods[-1]] + "\n}\n" if methods else text
    while lang == "go" and ends:
        helper = re.match(r"(?:\s|//[^\n]*\n)*func (\w+)\(", text[ends[0]:])
        more = brace_ends(text[ends[0]:], 0, 0)
        if not (helper and more and re.search(rf"\b{helper[1]}\(", text[:ends[0]])):
            break
        ends[0] += more[0]
    return text[:ends[0]] + "\n" if ends else text


def program_of(row: dict, lang: str, body: str) -> str:
    """Prompt, completion and tests in one file, as CodeGeeX's evaluation joins them."""
    text = row["prompt"] + body + "\n" + row["test"]
    if lang == "python":
        return PYTHON_HEAD + text
    if lang == "cpp":
        head = "".join(f"#include<{name}>\n" for name in CPP_HEADERS if name not in row["prompt"])
        return f"{head}{row['prompt']}{body}\n#undef NDEBUG\n#include<assert.h>\n{row['test']}"
    if lang == "go":
        # DIFFERS: imports those packages that are used. The official list is the canonical solution's, and since Go
        # refuses an unused import, it fails right programs that need fewer.
        text = text.replace(row["import"], "", 1)
        known = re.findall(r'"([^"\n]+)"', row["test_setup"] + row["import"]) + GO_PACKAGES
        code = re.sub(r"//[^\n]*", "", text)
        used = [p for p in dict.fromkeys(known) if re.search(rf"\b{p.rsplit('/')[-1]}\.", code)]
        return "package main\nimport (\n" + "".join(f'"{p}"\n' for p in used) + ")\n" + text
    return text


def judge(row: dict, lang: str, body: str, box: Box, seconds: float = RUN_SECONDS) -> str:
    """"passed", or why not. Exit status 0 proves nothing, since a program may leave before its tests: the tests' last
    statement must have said a word that did not exist when the program was written.

    Not stopped, here as in the official evaluation: a program that searches its own memory for that word, or returns
    an object that equals everything.
    """
    word, program = secrets.token_hex(16), program_of(row, lang, body)
    braces, statement = LAST_WORD[lang]
    at = len(program)
    for _ in range(braces):
        at = program.rindex("}", 0, at)
    program = program[:at] + statement.format(word) + program[at:]
    run = f"timeout -s KILL {seconds} {RUN[lang]}"
    script = COMPILE[lang] + (run if box.kind == "none" else ALONE.format(run))
    why, output = run_sandboxed(["sh", "-c", script], {SOURCES[lang]: program}, box, seconds + (COMPILE_SECONDS if COMPILE[lang] else 1),
                                address_mb=12288 if lang in ("go", "java") else 2048)
    if not why:
        return "passed" if word in output else "left before the end of its tests"
    return ENDS.get(why, why)


def toolchain(lang: str, rows: list[dict], data_dir, kind: str, scratch: Path) -> Box | str:
    """The box in which a language's programs run, or why they cannot run here."""
    found = [shutil.which(tool) for tool in TOOLS[lang]]
    if None in found:
        return f"no {TOOLS[lang][found.index(None)]} on PATH"
    found = [sys.executable] if lang == "python" else [p if p.startswith("/usr/") else os.path.realpath(p) for p in found]
    shown = {sys.prefix, sys.base_prefix} if lang == "python" else {str(Path(os.path.realpath(p)).parents[1]) for p in found}
    shown = {p for p in shown if not f"{p}/".startswith("/usr/")} | {str(p) for p in Path("/etc").glob("java*") if lang == "java"}
    if any(Path.home().is_relative_to(p) for p in shown):
        return f"{found[0]} cannot be shown to a program without the home folder"
    env = {"PATH": ":".join([*dict.fromkeys(os.path.dirname(p) for p in found), SYSTEM_PATH]), "OPENBLAS_NUM_THREADS": "1"}
    if lang == "go":
        env |= {"GO111MODULE": "off", "GOPATH": str(scratch / "path"), "GOCACHE": str(scratch / "cache"), "GOMAXPROCS": "2",
                "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOMEMLIMIT": "800MiB", "HOME": str(scratch)}
        if why := prepare_go(rows, data_dir, scratch, env):
            return why
        shown |= {env["GOPATH"], env["GOCACHE"]}
        del env["HOME"]
    return Box(kind, tuple(sorted(shown)), tuple(env.items()))


def prepare_go(rows: list[dict], data_dir, scratch: Path, env: dict) -> str:
    """Compiles once what all tests import, to share (then 0.4 s a program, not many); "" or what is missing."""
    packages = sorted({p for row in rows for p in re.findall(r'"([^"\n]+)"', row["test_setup"])} | set(GO_PACKAGES))
    (scratch / "path").mkdir(), (scratch / "cache").mkdir()
    if any("." in p for p in packages):
        try:
            archive = find_file(data_dir, "humaneval_x/go/evaluation/vendor.tar.gz")
        except UserError as error:
            return str(error)
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            (scratch / "vendor").rename(scratch / "path" / "src")       # GOPATH's word for what a module calls vendor
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise UserError(f"{archive}: expected the tests' Go modules as a .tar.gz ({error}); download it again") from None
    (scratch / "main_test.go").write_text("package main\n" + "".join(f'import _ "{p}"\n' for p in packages))
    done = subprocess.run(["go", "test", "-c", "-vet=off", "-o", "none", "main_test.go"], cwd=scratch, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    subprocess.run(["chmod", "-R", "a+rX", scratch], check=True)
    return f"go cannot build the tests' imports: {done.stdout.strip()[-200:]}" if done.returncode else ""


def read_problems(data_dir, lang: str) -> dict[str, dict]:
    path = find_file(data_dir, f"humaneval_x/{lang}/humaneval_{lang}.jsonl.gz")
    rows = read_rows(path)
    fields(rows, path, ("task_id", "prompt", "canonical_solution", "test") + ("import", "test_setup") * (lang == "go"))
    return {row["task_id"]: row for row in rows}


def read_verdicts(path: Path) -> dict[str, str]:
    """What an earlier scoring, perhaps killed in mid-line, has found."""
    verdicts = {}
    for line in path.read_text(errors="replace").split("\n") if path.exists() else ():
        try:
            row = json.loads(line)
            verdicts[row["key"]] = row["verdict"]
        except (ValueError, KeyError, TypeError):
            pass
    return verdicts


class Sample(NamedTuple):
    key: str                    # of the program: equal samples are run once
    lang: str
    row: dict                   # the problem
    body: str                   # the completion, cleaned up


def read_samples(path, data_dir) -> list[Sample]:
    """A file of {"task_id": "Python/0", "generation": the text after the prompt}; a problem's rows are its samples."""
    pairs, problems, samples = fields(read_rows(Path(path)), path, ("task_id", "generation")), {}, []
    for i, (task_id, generation) in enumerate(pairs, 1):
        lang = LANGS.get(task_id.split("/")[0])
        if not lang:
            raise UserError(f"{path}, row {i}: expected a task_id of {', '.join(LANGS)}, as Python/0, found {task_id!r}")
        problems[lang] = problems.get(lang) or read_problems(data_dir, lang)
        if task_id not in problems[lang]:
            raise UserError(f"{path}, row {i}: no problem {task_id!r} in humaneval_x/{lang} of {data_dir}; see --data-dir")
        row, body = problems[lang][task_id], truncate_completion(generation, lang)
        text = f"{task_id}\n{program_of(row, lang, body)}"
        samples.append(Sample(hashlib.sha256(text.encode(errors="replace")).hexdigest(), lang, row, body))
    return samples


def score_code(predictions, data_dir, k: int = 0, workers: int = 0, unsafe: bool = False) -> dict:
    """Runs every sample: {language: {"problems", "passed" (by any sample), "samples", "pass@1", …} or {"not run": why}}.

    Verdicts go to PREDICTIONS.results.jsonl as they come, and a stopped scoring goes on from there.
    """
    samples, results = read_samples(predictions, data_dir), Path(f"{predictions}.results.jsonl")
    counts = Counter(sample.row["task_id"] for sample in samples)
    for task_id, n in counts.items():
        if n < k:
            raise UserError(f"--k {k}: expected that many samples of each problem, {task_id} has {n}; choose 1..{n}")
    verdicts = read_verdicts(results)
    todo, missing = {s.key: s for s in samples if s.key not in verdicts}, {}
    kind = make_box(unsafe).kind if todo else ""
    with tempfile.TemporaryDirectory(prefix="fedbiot-tools-") as scratch:
        boxes = {}
        for lang in dict.fromkeys(s.lang for s in todo.values()):
            rows = list({s.row["task_id"]: s.row for s in samples if s.lang == lang}.values())
            box = working_box(lang, rows, data_dir, kind, Path(scratch))
            (boxes if isinstance(box, Box) else missing)[lang] = box
        todo = [s for s in todo.values() if s.lang in boxes]
        for sample, verdict in run_samples(todo, boxes, workers):
            verdicts[sample.key] = verdict
            append(results, {"task_id": sample.row["task_id"], "verdict": verdict, "key": sample.key})
    return {lang: {"not run": missing[lang]} if lang in missing else
            summarize([s for s in samples if s.lang == lang], verdicts, k)
            for lang in dict.fromkeys(s.lang for s in samples)}


def working_box(lang: str, rows: list[dict], data_dir, kind: str, scratch: Path) -> Box | str:
    """The toolchain's box, seen to work: a machine without it, or without libcrypto, must not score 0."""
    box = toolchain(lang, rows, data_dir, kind, scratch)
    for row in rows[:1] + [row for row in rows[1:] if "<openssl/" in row["prompt"]]:
        verdict = judge(row, lang, row["canonical_solution"], box) if isinstance(box, Box) else "passed"
        if verdict != "passed":
            return f"{row['task_id']}'s own solution does not pass here ({verdict}); is the toolchain complete?"
    return box


def run_samples(samples: list[Sample], boxes: dict, workers: int):
    """(sample, verdict) of each as it ends, `workers` (0: one a core) at a time."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            jobs = {pool.submit(judge, s.row, s.lang, s.body, boxes[s.lang]): s for s in samples}
            for job in tqdm(as_completed(jobs), "run programs", len(jobs), disable=None, leave=False):
                yield jobs[job], job.result()
        finally:                                    # Ctrl-C: do not start the rest
            pool.shutdown(wait=False, cancel_futures=True)


def append(path: Path, row: dict):
    """One line more; a line that a killed scoring left unfinished is closed first."""
    whole = not path.exists() or not path.stat().st_size or path.read_bytes()[-1:] == b"\n"
    with open(path, "a") as file:
        file.write("\n" * (not whole) + json.dumps(row) + "\n")


def summarize(samples: list[Sample], verdicts: dict, k: int) -> dict:
    """One language. k: those of 1 and 10 that the samples allow, or 1 and the one asked for."""
    right, counts = Counter(), Counter(s.row["task_id"] for s in samples)
    for s in samples:
        right[s.row["task_id"]] += verdicts[s.key] == "passed"
    n = min(counts.values())
    return {"problems": len(counts), "passed": sum(c > 0 for c in right.values()), "samples": n} | {
        f"pass@{k}": sum(pass_at_k(counts[t], right[t], k) for t in counts) / len(counts)
        for k in sorted({1, k} if k else {k for k in (1, 10) if k <= n})}


def sample_code(lm: LM, tokenizer, opts, progress: str) -> list[dict]:
    """Rows of predictions: `samples` continuations of each problem's prompt, the first `limit` problems of a language."""
    problems = [row for lang in LANGS.values() for row in list(read_problems(opts.data_dir, lang).values())[:opts.limit or None]]
    ids = [[tokenizer.bos] + tokenizer.encode(row["prompt"]) for row in problems for _ in range(opts.samples)]
    heat = (0.0 if opts.samples == 1 else 0.1) if opts.temperature is None else opts.temperature
    rng = torch.Generator(lm.tok_embeddings.weight.device).manual_seed(opts.seed)
    texts = generate(lm, ids, opts.max_new_tokens or 512, tokenizer.eos, opts.batch_size, heat, opts.top_k, opts.top_p, rng,
                     progress=progress)
    # Decoded behind its prompt, a text keeps the spaces that it begins with.
    return [{"task_id": problems[i // opts.samples]["task_id"],
             "generation": tokenizer.decode(prompt + text)[len(tokenizer.decode(prompt)):]}
            for i, (prompt, text) in enumerate(zip(ids, texts, strict=True))]


def score_rosetta(lm: LM, tokenizer, opts, progress: str) -> dict:
    """pass@1 over the problems that could be run. Without --run-code nothing is run: a sample is right only if it is
    the canonical solution, white space apart, which is less than what pass@1 would say."""
    rows = sample_code(lm, tokenizer, opts, progress)
    with tempfile.TemporaryDirectory(prefix="fedbiot-samples-") as scratch:
        path = Path(opts.save_predictions or Path(scratch) / "samples.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if opts.run_code:
            langs = score_code(path, opts.data_dir, opts.k, unsafe=opts.unsafe_no_sandbox)
            ran = [r for r in langs.values() if "not run" not in r]
            total, right = sum(r["problems"] for r in ran), sum(r["pass@1"] * r["problems"] for r in ran)
            return {"correct": round(right, 4), "total": total, "accuracy": right / max(total, 1), "metric": "pass@1",
                    "languages": langs}
        samples = read_samples(path, opts.data_dir)
    same = [s.body.split() == truncate_completion(s.row["canonical_solution"], s.lang).split() for s in samples]
    return accuracy(same, [True] * len(same)) | {"metric": "canonical solution (programs not run: --run-code)"}


def print_languages(result: dict):
    for lang, r in result.items():
        print(f"{lang:8} not run: {r['not run']}" if "not run" in r else f"{lang:8} {r['passed']:4} of {r['problems']} problems "
              f"passed   " + "   ".join(f"{name} {value:.2%}" for name, value in r.items() if name.startswith("pass@")))


# ---- any task -----------------------------------------------------------------------------------

def evaluate(lm: LM, tokenizer, task: str, opts, progress: str = "evaluate") -> dict:
    """{"correct", "total", "accuracy", …} of a model on a task's test set. `opts` holds data_dir, limit,
    shots, batch_size, max_new_tokens (0 = the task's), validate (score that many held-out training rows instead);
    for code samples, temperature, top_k, top_p, seed, run_code, unsafe_no_sandbox, k, save_predictions."""
    if task == "gsm8k":
        return score_gsm8k(lm, tokenizer, opts, progress)
    if task == "dolly":
        return score_dolly(lm, tokenizer, opts, progress)
    if task == "rosetta":
        return score_rosetta(lm, tokenizer, opts, progress)
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
        help="first N test examples, of each programming language; of each question-answering scenario N, spread over it "
        "(0: all)")
    add("--shots", type=int, help="worked examples in the prompt, for question answering 5 at most "
        "(default: 0 for the bundled model, else 8)")
    add("--prompt", help="print the greedy completion of this text, and nothing else")
    add("--max-new-tokens", type=int, default=0, help="0: the task's (GSM8K 256)")
    add("--predictions", help="score this JSONL file instead of a model")
    add("--samples", type=int, help="programs a problem (default: the paper's 20, for the bundled model 1)")
    add("--temperature", type=float, help="of the samples (default: the paper's 0.1; greedy where there is one sample)")
    add("--top-k", type=int, default=40, help="sample among so many pieces (default the paper's 40; 0: all)")
    add("--top-p", type=float, default=0.75, help="and among those that hold this probability (default the paper's 0.75)")
    add("--k", type=int, default=0, help="of pass@k (default: 1, and 10 where there are 10 samples)")
    add("--run-code", action="store_true", help="run the samples' programs, each in a sandbox, to score them")
    add("--unsafe-no-sandbox", action="store_true", help="with --run-code: where no sandbox works, run them without one")
    add("--save-predictions", help="keep the samples in this file, as --predictions reads it")
    add("--export", help="write the model (of --run, or --ckpt) to this new folder, for other tools")
    add("--format", choices=("hf", "meta", "peft"), default="hf", help="merged weights, or LoRA alone (default hf)")
    add("--batch-size", type=int, default=64, help="sequences generated at a time")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--device", default="auto")
    add("--threads", type=int, default=0, help="CPU threads (0: all cores)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(validate=0, seed=0)
    args = parser.parse_args(argv)
    for name in ("limit", "max_new_tokens", "threads", "k", "top_k"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more")
    args.samples = (20 if args.ckpt else 1) if args.samples is None else args.samples
    for name in ("batch_size", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more")
    if (args.temperature or 0) < 0 or not 0 < args.top_p <= 1:
        parser.error(f"--temperature {args.temperature} --top-p {args.top_p}: expected 0 or more, and above 0 up to 1")
    if args.k > args.samples and not args.predictions:
        parser.error(f"--k {args.k}: pass@k needs k samples of each problem; --samples is {args.samples}")
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
        if task == "rosetta" and not args.run_code:
            raise UserError("--predictions of rosetta: scoring runs a model's programs; add --run-code if that is wanted")
        data_dir = args.data_dir or BUNDLED_DATA
        report(score_code(args.predictions, data_dir, args.k, unsafe=args.unsafe_no_sandbox) if task == "rosetta"
               else score(args.predictions, data_dir), task, args)
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
    elif task == "rosetta" and "metric" not in result:
        print_languages(result)
    else:
        print(f"{task}: {result['correct']} of {result['total']} correct, accuracy {result['accuracy']:.2%}"
              + (f" ({result['metric']})" if "metric" in result else ""))
        print_languages(result.get("languages", {}))


if __name__ == "__main__":
    main_guard(main)
