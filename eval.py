"""Evaluation of a finished run, a checkpoint, or a file of predictions.

In order: the machine (device, dtype); GSM8K (prompts, extraction, numeric comparison); evaluate
(any task; HumanEval-X and its sandbox, and question answering, stand in tasks/); runs (a finished
run's models again, or exported); the command line.

    python eval.py --run runs/gsm8k-fedbiot-b0.2-s2-seed0 --model adapfu
    python eval.py --ckpt tiny/llama --task gsm8k --limit 100
    python eval.py --ckpt llama-2-7b --data-dir data --task dolly --limit 200
    python eval.py --task gsm8k --predictions answers.jsonl
    python eval.py --task rosetta --predictions samples.jsonl --run-code
"""
import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch

import baselines
from data import fields, prompt_of, read_gsm8k, read_rows
from extras.huggingface import export
from model import LM, UserError, generate, load, read_saved
from tasks import accuracy
from tasks.code import print_languages, score_code, score_rosetta
from tasks.qa import print_scenarios, score_dolly, score_dolly_predictions

HERE = Path(__file__).resolve().parent
BUNDLED_CKPT, BUNDLED_SMALL = HERE / "tiny" / "llama", HERE / "tiny" / "small"
BUNDLED_DATA = HERE / "tiny" / "data"
TASKS = ("gsm8k", "rosetta", "dolly")


# ---- the machine --------------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0][:80]}); "
                        f"try auto or cpu") from None
    return device


def pick_dtype(name: str, device) -> torch.dtype:
    name = ("bf16" if torch.device(device).type == "cuda" else "fp32") if name == "auto" else name
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


# ---- GSM8K --------------------------------------------------------------------------------------

WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(rf"(?:(?<![\w)])-)?\$?(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)")


def extract_number(text: str) -> Decimal | None:
    """The number after the first `The answer is` or `####`, exactly; without a marker the text's
    last; None where there is none. `18.0` is `18`; commas, `$`, `%`, a final dot do not matter."""
    marker = re.search(r"[Tt]he answer is|####", text)
    found = NUMBER.findall(text[marker.end():] if marker else text)
    return Decimal(re.sub(r"[,$]", "", found[0 if marker else -1])) if found else None


def gsm8k_shots(shots: int) -> str:
    """Worked examples in front of the question: `Q: …  A: …`, written for this project."""
    path = HERE / "tiny" / "gsm8k_shots.jsonl"
    pairs = fields(read_rows(path), path, ("question", "answer"))
    if not 0 <= shots <= len(pairs):
        raise UserError(f"--shots {shots}: {len(pairs)} worked examples are at hand, so choose "
                        f"0..{len(pairs)}")
    told = [(q, a.replace("####", "The answer is")) for q, a in pairs[:shots]]
    return "".join(f"Q: {q}\nA: {a}.\n\n" for q, a in told)


def score_gsm8k(lm: LM, tokenizer, opts, progress: str) -> dict:
    """Greedy chain of thought. Without shots the prompt is the training template's."""
    rows = read_gsm8k(opts.data_dir, "train" if opts.validate else "test")
    rows = rows[-opts.validate:][:opts.limit or None]
    head = gsm8k_shots(opts.shots)
    prompts = [f"{head}Q: {row.instruction}\nA:" if opts.shots else prompt_of(row.instruction)
               for row in rows]
    ids = [[tokenizer.bos] + tokenizer.encode(prompt) for prompt in prompts]
    texts = generate(lm, ids, opts.max_new_tokens or 256, tokenizer.eos, opts.batch_size,
                     progress=progress)
    found = [extract_number(tokenizer.decode(text)) for text in texts]
    return accuracy(found, [extract_number(row.output) for row in rows])


def score_gsm8k_predictions(path, data_dir) -> dict:
    """A file of {"index": row of test.jsonl, "text": …} -> accuracy over the file's rows."""
    rows, gold = read_rows(Path(path)), read_gsm8k(data_dir, "test")
    texts, indices = fields(rows, path, ("text",)), [row.get("index") for row in rows]
    for i, index in enumerate(indices, 1):
        if type(index) is not int or not 0 <= index < len(gold) or index in indices[:i - 1]:
            raise UserError(f"{path}, row {i}: expected an index in 0..{len(gold) - 1}, each once, "
                            f"found {index!r}")
    found = [extract_number(text) for text, in texts]
    return accuracy(found, [extract_number(gold[i].output) for i in indices])


# ---- any task -----------------------------------------------------------------------------------

def evaluate(lm: LM, tokenizer, task: str, opts, progress: str = "evaluate") -> dict:
    """{"correct", "total", "accuracy", …} of a model on a task's test set. `opts` holds data_dir,
    limit, shots, batch_size, max_new_tokens (0 = the task's), validate (score so many held-out
    training rows instead); for code samples, temperature, top_k, top_p, seed, run_code,
    unsafe_no_sandbox, k, save_predictions."""
    score = {"gsm8k": score_gsm8k, "dolly": score_dolly, "rosetta": score_rosetta}[task]
    return score(lm, tokenizer, opts, progress)


# ---- runs ---------------------------------------------------------------------------------------

def read_run(folder) -> SimpleNamespace:
    """The configuration of a run folder, as the run had it."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        return SimpleNamespace(**config | {"dropout": Fraction(config["dropout"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--run {folder}: expected a run folder with config.json "
                        f"({error})") from None


def models_of_run(folder, device, dtype) -> tuple[dict, object, SimpleNamespace]:
    """(models by name, tokenizer, configuration) of a finished run: its checkpoint and lora.pt."""
    cfg, path = read_run(folder), Path(folder) / "lora.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such file; the run is not finished: go on with train.py "
                        f"--resume --out {folder}")
    full, tokenizer = load(cfg.ckpt, dtype=dtype, device=device)
    server = baselines.module_of(cfg.method).Server(full, None, cfg)
    try:
        server.load_state_dict({"learnt": read_saved(path)})
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: not what this run learnt ({str(error)[:120]})") from None
    return server.models(), tokenizer, cfg


# ---- command line -------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def main_guard(main):
    """Runs `main`; a user's mistake ends in one line and status 2, Ctrl-C likewise and 130."""
    try:
        sys.exit(main())
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what was saved stays", file=sys.stderr)
        sys.exit(130)


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    add = parser.add_argument
    add("--run", help="run folder of train.py")
    add("--model", default="adapfu", help="which of the run's models (default adapfu)")
    add("--ckpt", help="checkpoint folder (default: the bundled one)")
    add("--task", choices=TASKS, help="default: the run's")
    add("--data-dir", help="data folder (default: the run's, or the bundled one)")
    add("--limit", type=int, default=0,
        help="first N test examples, of each programming language; N of each question-answering "
        "scenario, spread over it (0: all)")
    add("--shots", type=int, help="worked examples in the prompt, for question answering 5 at most "
        "(default: 0 for the bundled model, else 8)")
    add("--prompt", help="print the greedy completion of this text, and nothing else")
    add("--max-new-tokens", type=int, default=0, help="0: the task's (GSM8K 256)")
    add("--predictions", help="score this JSONL file instead of a model")
    add("--samples", type=int, help="programs a problem (default the paper's 20; bundled model: 1)")
    add("--temperature", type=float, help="of the samples (default the paper's 0.1; one: greedy)")
    add("--top-k", type=int, default=40, help="sample among so many pieces (default 40; 0: all)")
    add("--top-p", type=float, default=0.75,
        help="and among those that hold this probability (default 0.75; both are the paper's)")
    add("--k", type=int, default=0, help="of pass@k (default 1, and 10 where there are 10 samples)")
    add("--run-code", action="store_true", help="run the samples, each in a sandbox, to score them")
    add("--unsafe-no-sandbox", action="store_true",
        help="with --run-code: where no sandbox works, run them without one")
    add("--save-predictions", help="keep the samples in this file, as --predictions reads it")
    add("--export", help="write the model (--run's or --ckpt's) to this new folder for other tools")
    add("--format", choices=("hf", "meta", "peft"), default="hf",
        help="merged weights, or LoRA alone (default hf)")
    add("--batch-size", type=int, default=64, help="sequences generated at a time")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--device", default="auto")
    add("--threads", type=int, default=0, help="CPU threads (0: all cores)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(validate=0, seed=0)
    args = parser.parse_args(argv)
    args.samples = (20 if args.ckpt else 1) if args.samples is None else args.samples
    check(args, parser.error)
    return args


def check(args, refuse):
    for name, least in (("limit", 0), ("max_new_tokens", 0), ("threads", 0), ("k", 0), ("top_k", 0),
                        ("batch_size", 1), ("samples", 1)):
        if getattr(args, name) < least:
            refuse(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    if (args.temperature or 0) < 0 or not 0 < args.top_p <= 1:
        refuse(f"--temperature {args.temperature} --top-p {args.top_p}: expected 0 or more, and "
               f"above 0 up to 1")
    if args.k > args.samples and not args.predictions:
        refuse(f"--k {args.k}: pass@k needs k samples of each problem; --samples is {args.samples}")
    there = args.export and Path(args.export)
    if there and there.exists() and not (there.is_dir() and not any(there.iterdir())):
        refuse(f"--export {there}: exists already and is not empty; choose another name")
    if args.run and args.ckpt:
        refuse("--run and --ckpt: a run knows its checkpoint; give one of the two")


def complete(lm: LM, tokenizer, args) -> str:
    """Greedy completion of raw text after BOS, no template."""
    prompt = [tokenizer.bos] + tokenizer.encode(args.prompt)
    ids = generate(lm, [prompt], args.max_new_tokens or 64, tokenizer.eos)[0]
    text, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    return whole[len(text):]                # decoded together: the first piece keeps its space


def score_predictions(task: str, data_dir, args) -> dict:
    if task == "gsm8k":
        return score_gsm8k_predictions(args.predictions, data_dir)
    if task == "dolly":
        return score_dolly_predictions(args.predictions, data_dir)
    if not args.run_code:
        raise UserError("--predictions of rosetta: scoring runs a model's programs; add --run-code "
                        "if that is wanted")
    return score_code(args.predictions, data_dir, args.k, unsafe=args.unsafe_no_sandbox)


def main(argv=None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    if args.predictions:
        task = args.task or "gsm8k"
        report(score_predictions(task, args.data_dir or BUNDLED_DATA, args), task, args)
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
        source = cfg.ckpt if args.run else str(args.ckpt or BUNDLED_CKPT)
        export(lm, Path(args.export).resolve(), args.format, source)
        return 0
    if args.prompt is not None:
        print(complete(lm, tokenizer, args))
        return 0
    if not args.task:
        raise UserError(f"--task: expected one of {', '.join(TASKS)} (or --prompt, --run, "
                        f"--predictions)")
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
        metric = f" ({result['metric']})" if "metric" in result else ""
        print(f"{task}: {result['correct']} of {result['total']} correct, accuracy "
              f"{result['accuracy']:.2%}{metric}")
        print_languages(result.get("languages", {}))


if __name__ == "__main__":
    main_guard(main)
