"""Evaluation of runs, checkpoints and predictions: FedBiOT section 4.1, Appendix A.

    python eval.py --run runs/gsm8k-fedbiot-b0.2-s2-seed0 --model adapfu
    python eval.py --ckpt llama-2-7b --data-dir data --task dolly --limit 200
    python eval.py --task gsm8k --predictions answers.jsonl
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C is one line also while the rest is imported
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"stopped by Ctrl-C\n"), os._exit(130)))

import argparse
import json
import re
import sys
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path

import torch

from data import TASKS, Row, accuracy, find_file, prompt_of, read_rows, texts_of
from fedbiot import option
from model import LM, UserError, clean_text, expecting, generate, load, read_saved, room

HERE = Path(__file__).resolve().parent
BUNDLED_CKPT, BUNDLED_DATA = HERE / "tiny" / "llama", HERE / "tiny" / "data"
# The bundled model's settings; its rates were found on held-out rows (benchmarks/RESULTS.md).
BUNDLED = {"rounds": 5, "lr": 3e-3, "server_lr": 2e-3, "align_init_on": "weights", "shots": 0,
           "samples": 1, "max_len": 256}

# ---- flags --------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """A flag a field; one that was not given is absent from the result."""
    def __init__(self, description: str, *configs: type, **extra):
        super().__init__(description=description, allow_abbrev=False, usage="%(prog)s [flags]",
                         argument_default=argparse.SUPPRESS, **extra,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        for f in (f for config in configs for f in fields(config)):
            choices = f.metadata.get("choices")
            how = {"type": kind_of(f), "choices": choices, "metavar": "X"}
            if kind_of(f) is bool:
                how = {"action": argparse.BooleanOptionalAction}
            text = f.metadata["help"] + (f"; one of {', '.join(choices)}" if choices else "")
            text += "" if f.default in (None, False) else f" (default {f.default})"
            flags = f.metadata.get("flags", [flag(f.name)])
            self.add_argument(*flags, dest=f.name, help=text.replace("%", "%%"), **how)

    def error(self, message):
        raise UserError(f"{message}; see --help")

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

def kind_of(f) -> type:
    """A field's type, where `int | None` is int."""
    return next(k for k in (bool, int, float, str) if k.__name__ in str(f.type))

def checked(config: type, values: dict):
    """A configuration of valid types, choices and ranges; else UserError."""
    known = {f.name: f for f in fields(config)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{flag(str(name)[:80])}: no such setting")
        f, kind, expected = known[name], kind_of(known[name]), ""
        choices = f.metadata.get("choices", (value,))
        least, most = f.metadata.get("least", 0), f.metadata.get("most", 10**9)
        if value is None and "None" in str(f.type):
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            expected = kind.__name__
        elif value not in choices:
            expected = f"one of {', '.join(choices)}"
        elif value == "":
            expected = "a text, which is empty here (an unset shell variable?)"
        elif kind in (int, float) and not least <= value <= most:
            expected = f"a number from {least} to {most:,}"
        if expected:
            raise UserError(f"{flag(name)} {value!r:.80}: expected {expected}")
    return config(**values)

@dataclass(frozen=True)
class EvalConfig:
    """What a model and its evaluation depend on. None: see the help."""
    task: str | None = option(None, "which task; default that of --run", choices=tuple(TASKS))
    ckpt: str | None = option(None, "folder of the model, Meta's or Hugging Face's")
    data_dir: str | None = option(None, "folder of the data files; default the bundled")
    eval_limit: int = option(0, "test examples to score, a language or scenario (0: all)")
    eval_batch: int = option(0, "sequences at a time (0: what 4 GB of cache hold)")
    # PAPER SILENT: shots, samples, temperature, top-k and top-p are those of the authors' code.
    shots: int = option(8, "worked examples in a prompt; bundled model 0")
    max_new_tokens: int = option(0, "of an answer (0: the task's own, GSM8K 256)", most=2**16)
    samples: int = option(20, "programs a problem; bundled model 1", least=1)
    temperature: float | None = option(None, "0.1, for one sample 0")
    top_k: int = option(40, "sample among so many pieces (0: all)")
    top_p: float = option(0.75, "among those of this probability", least=1e-9, most=1)
    k: int = option(0, "k of pass@k; 0: 1, and 10 where there are 10 samples")
    run_code: bool = option(False, "run a model's programs, each in a sandbox")
    unsafe_no_sandbox: bool = option(False, "run them without one where none works")
    save_predictions: str | None = option(None, "file for the last model's programs")
    validate: int = option(0, "GSM8K: keep back and score the last N training rows")
    seed: int = option(0, "seed of everything")
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto: a GPU where there is one")
    dtype: str = option("auto", "of frozen weights", choices=("auto", "fp32", "bf16", "fp16"))
    threads: int = option(0, "CPU threads of every process (0: cores / processes)", most=4096)

def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with expecting("a device that PyTorch can use here, or auto", f"--device {name}"):
        torch.zeros(1, device=name).tolist()  # on "meta" there is nothing to read
        return torch.device(name)

def pick_dtype(name: str, device) -> torch.dtype:
    if name == "auto":
        name = "bf16" if torch.device(device).type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]

# ---- GSM8K --------------------------------------------------------------------------------------
# An answer is read as the paper's evaluation reads it (Appendix A, the authors' code): the first
# number behind the first `The answer is`, or behind OpenAI's own `####`; without a marker the last
# number of the text. A text ends where the model begins a next question of its own.

NEXT_QUESTION = re.compile(r"\n[^\S\n]*(?:Q:|Question:|### Instruction:)")
MARKER = re.compile(r"the answer is|####", re.IGNORECASE)
GROUPED = "[0-9]{1,3}(?:[,\u00a0\u2009\u202f][0-9]{2,3}){0,9}[,\u00a0\u2009\u202f][0-9]{3}(?![0-9])"
NUMBER = re.compile(rf"(?:(?<![\w)])-)?\$?(?:(?:{GROUPED}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")

def numbers(text: str) -> list[Decimal]:
    """A text's numbers, exactly; group separators, `$`, `%`, a final dot do not matter."""
    found = NUMBER.findall(text.replace("\u2212", "-"))  # the minus sign
    return [Decimal(re.sub("[,$\u00a0\u2009\u202f]", "", n)) for n in found]

def extract_number(text: str) -> Decimal | None:
    """A model's answer; None where there is none, or no number behind a marker."""
    text = NEXT_QUESTION.split(text, maxsplit=1)[0]
    marker = MARKER.search(text)
    found = numbers(text[marker.end():] if marker else text)
    return found[0 if marker else -1] if found else None

def read_pairs(data_dir, split: str) -> list[tuple[str, str]]:
    """Questions and worked answers, as they are in {split}.jsonl."""
    path = find_file(data_dir, f"gsm8k/{split}.jsonl")
    return texts_of(read_rows(path), path, ("question", "answer"))

def read_training(data_dir) -> list[Row]:
    return [Row(question, "", answer.replace("####", "The answer is"))
            for question, answer in read_pairs(data_dir, "train")]

def read_gold(cfg: EvalConfig) -> tuple[list[str], list[Decimal]]:
    """Questions, and the numbers behind the last `####` of their answers."""
    split = "train" if cfg.validate else "test"
    pairs, gold = read_pairs(cfg.data_dir, split), []
    for i, (_, answer) in enumerate(pairs, 1):
        found = numbers(answer.rpartition("####")[2])
        if "####" not in answer or not found:
            raise UserError(f"{cfg.data_dir}/gsm8k/{split}.jsonl, row {i}: expected an answer "
                            f"that ends in #### and a number, found {answer[-40:]!r}")
        gold.append(found[0])
    return [question for question, _ in pairs], gold

def prepare(cfg: EvalConfig) -> list[Path]:
    """Reads what `score` will need, so that a mistake shows before training; its files."""
    read_gold(cfg)
    if cfg.shots:
        room("tasks.gsm8k").worked_examples(cfg.shots)
    return [Path(cfg.data_dir) / f"gsm8k/{'train' if cfg.validate else 'test'}.jsonl"]

def score(lm: LM, tokenizer, cfg: EvalConfig, progress: str) -> dict:
    """Greedy chain of thought. Without shots, in the training template."""
    questions, gold = (part[-cfg.validate:][:cfg.eval_limit or None] for part in read_gold(cfg))
    prompts = [prompt_of(question) for question in questions]
    if cfg.shots:
        head = room("tasks.gsm8k").worked_examples(cfg.shots)
        prompts = [f"{head}Q: {question}\nA:" for question in questions]
    ids = [[tokenizer.bos] + tokenizer.encode(prompt) for prompt in prompts]
    texts = generate(lm, ids, cfg.max_new_tokens or 256, tokenizer.ends, cfg.eval_batch,
                     progress=progress)
    return accuracy([extract_number(tokenizer.decode(text)) for text in texts], gold)

def score_predictions(cfg: EvalConfig) -> dict:
    return room("tasks.gsm8k").score_predictions(cfg)

def report(result: dict):
    print("gsm8k: {correct} of {total} correct, accuracy {accuracy:.2%}".format(**result))

# ---- runs ---------------------------------------------------------------------------------------
def restore(server, state: dict, folder: Path):
    """Puts what a run's `folder` holds into its server."""
    if server.emulator:
        state = state | {"emulator": read_saved(folder / "emulator.pt")}
    with expecting("what a run of this configuration and this code learnt", folder):
        server.load_state_dict(state)

def models_of_run(folder: Path, device, dtype, ckpt=None) -> tuple[dict, object, object]:
    """(models, tokenizer, configuration) of a run; `ckpt`: where its checkpoint is now."""
    from train import method_of, read_run  # here: train.py imports this module
    cfg = read_run(folder, ckpt)
    full, tokenizer = load(cfg.ckpt, dtype=dtype, device=device)
    server = method_of(cfg.method).Server(full, None, cfg)
    restore(server, {"learnt": read_saved(folder / "lora.pt")}, folder)
    return server.models(), tokenizer, cfg

# ---- command line -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Command(EvalConfig):
    """Every flag of eval.py."""
    eval_limit: int = option(0, "test examples to score", flags=["--limit", "--eval-limit"])
    eval_batch: int = option(0, "sequences at a time", flags=["--batch-size", "--eval-batch"])
    run: str | None = option(None, "run folder of train.py")
    model: str | None = option(None, "which of the run's models; default the last: adapfu")
    prompt: str | None = option(None, "print the greedy completion of this raw text")
    predictions: str | None = option(None, "score this JSONL file instead of a model")
    export: str | None = option(None, "write the model to this new folder")
    format: str = option("hf", "merged weights, or LoRA alone", choices=("hf", "meta", "peft"))
    json: bool = option(False, "print one JSON object")

def main_guard(main):
    """Runs `main`: a user's mistake is one line and status 2, Ctrl-C one and 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed: 2>&-
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # a terminal may know ASCII alone
    try:
        status = main()
        print(end="", flush=True)
        sys.exit(status)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of stdout: every file's is a UserError by now
        if not isinstance(error, BrokenPipeError):  # `| head`
            os.write(2, f"error: the output cannot be written: {error.strerror}\n".encode())
        os._exit(2)  # without a second attempt to write it
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; a run goes on with --resume", file=sys.stderr)
        sys.exit(130)

def complete(lm: LM, tokenizer, args: Command) -> str:
    """Greedy completion of raw text after BOS; no template."""
    prompt = [tokenizer.bos] + tokenizer.encode(clean_text(args.prompt))
    ids = generate(lm, [prompt], args.max_new_tokens or 64, tokenizer.ends)[0]
    text, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    return whole[len(text):]  # decoded together: the first piece keeps its space

def main(argv=None) -> int:
    given, cfg = vars(Parser(__doc__, Command).parse_args(argv)), None
    args = checked(Command, given)
    for name, other in (("model", "run"), ("format", "export")):
        if name in given and other not in given:
            raise UserError(f"{flag(name)} {given[name]}: expected {flag(other)} too")
    asked = sorted(given.keys() & {"prompt", "export", "predictions"})
    if asked[1:]:
        raise UserError(f"{' and '.join(map(flag, asked))}: expected one at a time")
    if not asked and not args.task and not args.run:
        raise UserError(f"--task: expected one of {', '.join(TASKS)} (or --prompt, --run, …)")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    device = pick_device(args.device)
    dtype = None if args.export and args.dtype == "auto" else pick_dtype(args.dtype, device)
    suggested = {"task": "gsm8k", "ckpt": str(BUNDLED_CKPT), "data_dir": str(BUNDLED_DATA)}
    if not args.ckpt:
        suggested |= {name: BUNDLED[name] for name in ("shots", "samples")}
    if args.run:
        models, tokenizer, cfg = models_of_run(Path(args.run), device, dtype, args.ckpt)
        name = args.model or [*models][-1]
        if name not in models:
            raise UserError(f"--model {name}: a {cfg.method} run has {', '.join(models)}")
        lm = models[name]
        suggested = {f.name: getattr(cfg, f.name) for f in fields(EvalConfig)
                     if f.name not in ("eval_limit", "validate", "save_predictions")}
    args = Command(**suggested | given)
    if not args.run and not args.predictions:
        lm, tokenizer = load(args.ckpt, dtype=dtype, device=device)
    if args.export:
        room("extras.huggingface").export(lm, Path(args.export), args.format, args.ckpt)
    elif args.prompt is not None:
        text = complete(lm, tokenizer, args)
        print(json.dumps({"text": text}) if args.json else text)
    else:
        scorer = room(TASKS[args.task].module)
        if args.predictions:
            result = scorer.score_predictions(args)
        else:
            scorer.prepare(args)
            result = scorer.score(lm, tokenizer, args, args.task)
        print(json.dumps(result)) if args.json else scorer.report(result)
    return 0

if __name__ == "__main__":
    main_guard(main)
