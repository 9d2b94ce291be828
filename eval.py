"""Evaluation of a finished run, a checkpoint, or a file of predictions.

In order: flags (a dataclass's fields are a command line's flags, checked in one place, for train.py
too); the machine; GSM8K; evaluate (any task: HumanEval-X and question answering stand in tasks/);
a finished run's models; the command line. FedBiOT section 4.1, Appendix A.

    python eval.py --run runs/gsm8k-fedbiot-b0.2-s2-seed0 --model adapfu
    python eval.py --ckpt llama-2-7b --data-dir data --task dolly --limit 200
    python eval.py --ckpt tiny/llama --prompt "Once upon a time"
    python eval.py --task gsm8k --predictions answers.jsonl
    python eval.py --task rosetta --predictions samples.jsonl --run-code
"""
import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import torch

from data import TASKS, accuracy, prompt_of, read_pairs, read_rows, texts_of
from fedbiot import option
from model import LM, UserError, clean_text, generate, load, read_saved, room

HERE = Path(__file__).resolve().parent
BUNDLED_CKPT, BUNDLED_DATA = HERE / "tiny" / "llama", HERE / "tiny" / "data"
MOST = 10**9                    # of any number on the command line

# ---- flags --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One flag a field; a flag that was not given is absent from the result."""

    def __init__(self, description: str, config: type, **extra):
        def lines(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=27, width=100)
        super().__init__(description=description, formatter_class=lines, allow_abbrev=False,
                         argument_default=argparse.SUPPRESS, **extra)
        self.add(config)

    def add(self, config: type):
        for f in fields(config):
            default = "" if f.default in (None, False) else f" ({f.default})"
            choices, how = f.metadata.get("choices"), {}
            if kind_of(f) is bool:
                how = {"action": argparse.BooleanOptionalAction}
            else:
                how = {"type": share if kind_of(f) is Fraction else kind_of(f), "choices": choices,
                       "metavar": "|".join(choices) if choices and len(choices) < 4 else "X"}
            text = f.metadata["help"] + default
            if choices and len(choices) > 3:
                text += ": " + ", ".join(choices)
            self.add_argument(flag(f.name), help=text.replace("%", "%%"), **how)

    def error(self, message):
        raise UserError(message)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(f) -> type:
    """A field's type, where `int | None` is int."""
    return next(k for k in (bool, int, float, str, Fraction) if k.__name__ in str(f.type))


def share(text: str) -> Fraction:
    """What was typed, exactly: 0.2 is 1/5."""
    try:
        float(value := Fraction(text))
    except ArithmeticError:
        raise ValueError(text) from None                    # argparse makes one line of it
    return value


def checked(config: type, values: dict):
    """A configuration whose values have their fields' types, choices and ranges; else UserError."""
    known = {f.name: f for f in fields(config)}
    if odd := sorted(map(str, values.keys() - known.keys())):
        raise UserError(f"{flag(odd[0][:80])}: no such setting")
    for name, value in values.items():
        f, kind = known[name], kind_of(known[name])
        choices, least = f.metadata.get("choices"), f.metadata.get("least", 0)
        if value is None and "None" in str(f.type):
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{flag(name)} {value!r:.80}: expected {kind.__name__}")
        if choices and value not in choices:
            raise UserError(f"{flag(name)} {value!r:.80}: expected one of {', '.join(choices)}")
        if value == "" and kind is str:
            raise UserError(f"{flag(name)}: expected a text, found an empty one (a shell variable "
                            f"that is not set?)")
        if kind in (int, float) and not least <= value <= f.metadata.get("most", MOST):
            raise UserError(f"{flag(name)} {value}: expected {least} or more, at most "
                            f"{f.metadata.get('most', MOST):,}")
    return config(**values)


@dataclass(frozen=True)
class EvalConfig:
    """What scoring depends on. None: the task's own."""
    task: str | None = option(None, "test set; default the run's", choices=tuple(TASKS))
    data_dir: str | None = option(None, "data folder; default the run's, or the bundled one")
    limit: int = option(0, "first N test examples, of each language; N a scenario (0: all)")
    shots: int | None = option(None, "worked examples in the prompt; bundled model 0, else 8")
    batch_size: int = option(0, "sequences generated at a time (0: what 6 GB of cache hold, at "
                                "most 64)")
    max_new_tokens: int = option(0, "0: the task's own (GSM8K 256)")
    samples: int | None = option(None, "programs a problem; bundled model 1, else 20", least=1)
    temperature: float | None = option(None, "of the samples; 0.1, for a single one 0")
    top_k: int = option(40, "sample among so many pieces (0: all)")
    top_p: float = option(0.75, "and among those that hold this probability", most=1)
    k: int = option(0, "of pass@k; 0: 1, and 10 where there are 10 samples")
    run_code: bool = option(False, "run a model's programs, each in a sandbox, to score them")
    unsafe_no_sandbox: bool = option(False, "run them without one where none works")
    predictions: str | None = option(None, "score this JSONL file instead of a model")
    save_predictions: str | None = option(None, "keep the samples in this file")
    seed: int = option(0, "of the samples")
    validate: int = option(0, "score the last N training rows instead (GSM8K)")


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
# An answer is read as the paper's evaluation reads it (Appendix A, the authors' code): the first
# number behind the first `The answer is`, or behind OpenAI's own `####`; without a marker the last
# number of the text. lm-evaluation-harness takes `####` strictly, or the last number. In all three
# the text ends where the model begins a next question of its own.

NEXT_QUESTION = re.compile(r"\n\s*(?:Q:|Question:|### Instruction:)")
MARKER = re.compile(r"the answer is|####", re.IGNORECASE)
GROUPED = "[0-9]{1,3}(?:[,\u00a0\u2009\u202f][0-9]{2,3})*[,\u00a0\u2009\u202f][0-9]{3}(?![0-9])"
NUMBER = re.compile(rf"(?:(?<![\w)])-)?\$?(?:(?:{GROUPED}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def numbers(text: str) -> list[Decimal]:
    """Every number of a text, exactly; separators of groups, `$`, `%`, a final dot do not matter."""
    found = NUMBER.findall(text.replace("\u2212", "-"))                         # the minus sign
    return [Decimal(re.sub("[,$\u00a0\u2009\u202f]", "", n)) for n in found]


def extract_number(text: str) -> Decimal | None:
    """A model's answer; None where there is none, also where a marker has no number behind it."""
    text = NEXT_QUESTION.split(text, maxsplit=1)[0]
    marker = MARKER.search(text)
    found = numbers(text[marker.end():] if marker else text)
    return found[0 if marker else -1] if found else None


def read_gold(cfg: EvalConfig) -> tuple[list[str], list[Decimal]]:
    """The questions that are scored, and what stands behind the last `####` of their answers."""
    split = "train" if cfg.validate else "test"
    pairs, gold = read_pairs(cfg.data_dir, split), []
    for i, (_, answer) in enumerate(pairs, 1):
        found = numbers(answer.rpartition("####")[2])
        if "####" not in answer or not found:
            raise UserError(f"{cfg.data_dir}/gsm8k/{split}.jsonl, row {i}: expected an answer that "
                            f"ends in #### and a number, found {answer[-40:]!r}")
        gold.append(found[0])
    return [question for question, _ in pairs], gold


def worked_examples(shots: int) -> str:
    """Worked examples in front of the question: `Q: …  A: …`, written for this project."""
    path = HERE / "tiny" / "gsm8k_shots.jsonl"
    pairs = texts_of(read_rows(path), path, ("question", "answer"))
    if shots > len(pairs):
        raise UserError(f"--shots {shots}: {len(pairs)} worked examples are at hand, so choose "
                        f"0..{len(pairs)}")
    told = [(q, a.replace("####", "The answer is")) for q, a in pairs[:shots]]
    return "".join(f"Q: {q}\nA: {a}.\n\n" for q, a in told)


def prepare(cfg: EvalConfig) -> list[Path]:
    """Reads what `score` will need, so that a mistake ends before any training; its files."""
    read_gold(cfg), worked_examples(cfg.shots or 0)
    return [Path(cfg.data_dir) / "gsm8k" / ("train.jsonl" if cfg.validate else "test.jsonl")]


def score(lm: LM, tokenizer, cfg: EvalConfig, progress: str) -> dict:
    """Greedy chain of thought. Without shots the prompt is the training template's."""
    questions, gold = (part[-cfg.validate:][:cfg.limit or None] for part in read_gold(cfg))
    head = worked_examples(cfg.shots)
    prompts = [f"{head}Q: {q}\nA:" if cfg.shots else prompt_of(q) for q in questions]
    ids = [[tokenizer.bos] + tokenizer.encode(prompt) for prompt in prompts]
    texts = generate(lm, ids, cfg.max_new_tokens or 256, tokenizer.ends, cfg.batch_size,
                     progress=progress)
    return accuracy([extract_number(tokenizer.decode(text)) for text in texts], gold)


def score_predictions(cfg: EvalConfig) -> dict:
    """A file of {"index": row of test.jsonl, "text": …} -> accuracy over the file's rows."""
    path, (_, gold) = Path(cfg.predictions), read_gold(replace(cfg, validate=0))
    rows = read_rows(path)
    texts, indices, seen = texts_of(rows, path, ("text",)), [r.get("index") for r in rows], set()
    for i, index in enumerate(indices, 1):
        if type(index) is not int or not 0 <= index < len(gold) or index in seen:
            raise UserError(f"{path}, row {i}: expected an index in 0..{len(gold) - 1}, each once, "
                            f"found {index!r:.80}")
        seen.add(index)
    return accuracy([extract_number(text) for text, in texts], [gold[i] for i in indices])


def report(result: dict):
    print(f"gsm8k: {result['correct']} of {result['total']} correct, accuracy "
          f"{result['accuracy']:.2%}")


# ---- any task -----------------------------------------------------------------------------------

def scorer_of(task: str):
    """The module that scores a task: prepare, score, score_predictions, report, as above."""
    return room(TASKS[task].scorer)


def evaluate(lm: LM, tokenizer, cfg: EvalConfig, progress: str = "evaluate") -> dict:
    """{"correct", "total", "accuracy", …} of a model on the test set of cfg.task."""
    return scorer_of(cfg.task).score(lm, tokenizer, cfg, progress)


def models_of_run(folder: Path, device, dtype) -> tuple[dict, object, object]:
    """(models by name, tokenizer, configuration) of a finished run: its checkpoint, lora.pt and,
    where its emulator has weights of its own, emulator.pt."""
    from train import method_of, read_run                   # here: train.py imports this module
    cfg = read_run(folder)
    full, tokenizer = load(cfg.ckpt, dtype=dtype, device=device)
    server = method_of(cfg.method).Server(full, None, cfg)
    learnt = {"learnt": read_saved(folder / "lora.pt")}
    if server.emulator:
        learnt["emulator"] = read_saved(folder / "emulator.pt")
    try:
        server.load_state_dict(learnt)
    except (AssertionError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: lora.pt is not what this run learnt ({str(error)[:120]})"
                        ) from None
    return server.models(), tokenizer, cfg


# ---- command line -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Command(EvalConfig):
    """Every flag of eval.py."""
    run: str | None = option(None, "run folder of train.py")
    model: str = option("adapfu", "which of the run's models")
    ckpt: str | None = option(None, "checkpoint folder; default the bundled one")
    prompt: str | None = option(None, "print the greedy completion of this text, and nothing else")
    export: str | None = option(None, "write the model to this new folder for other tools")
    format: str = option("hf", "merged weights, or LoRA alone", choices=("hf", "meta", "peft"))
    dtype: str = option("auto", "bf16 on CUDA, else fp32", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "cpu, cuda, cuda:1, …")
    threads: int = option(0, "CPU threads (0: all cores)", most=4096)
    json: bool = option(False, "print one JSON object")


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


def parse_args(argv=None) -> Command:
    given = vars(Parser(__doc__, Command).parse_args(argv))
    args = checked(Command, given)
    samples = args.samples or (20 if args.ckpt else 1)
    if args.k > samples and not args.predictions:
        raise UserError(f"--k {args.k}: pass@k needs k samples of each problem; --samples is "
                        f"{samples}")
    if args.top_p == 0:
        raise UserError("--top-p 0: expected a share above 0, for example 0.75")
    there = args.export and Path(args.export)
    if there and there.exists() and not (there.is_dir() and not any(there.iterdir())):
        raise UserError(f"--export {there}: exists already and is not empty; choose another name")
    if args.run and args.ckpt:
        raise UserError("--run and --ckpt: a run knows its checkpoint; give one of the two")
    return replace(args, samples=samples)


def complete(lm: LM, tokenizer, args: Command) -> str:
    """Greedy completion of raw text after BOS, no template."""
    prompt = [tokenizer.bos] + tokenizer.encode(clean_text(args.prompt))
    ids = generate(lm, [prompt], args.max_new_tokens or 64, tokenizer.ends)[0]
    text, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    return whole[len(text):]                # decoded together: the first piece keeps its space


def loaded(args: Command) -> tuple[LM, object, Command, str]:
    """(model, tokenizer, args with what the run or checkpoint suggests, the checkpoint's path)."""
    device = pick_device(args.device)
    dtype = None if args.export and args.dtype == "auto" else pick_dtype(args.dtype, device)
    if args.run:
        models, tokenizer, cfg = models_of_run(Path(args.run), device, dtype)
        if args.model not in models:
            raise UserError(f"--model {args.model}: a {cfg.method} run has {', '.join(models)}")
        lm, suggested = models[args.model], (cfg.ckpt, cfg.task, cfg.data_dir, cfg.shots)
    else:
        lm, tokenizer = load(args.ckpt or BUNDLED_CKPT, dtype=dtype, device=device)
        suggested = str(args.ckpt or BUNDLED_CKPT), None, str(BUNDLED_DATA), 8 if args.ckpt else 0
    ckpt, task, data_dir, shots = suggested
    args = replace(args, task=args.task or task, data_dir=args.data_dir or data_dir,
                   shots=shots if args.shots is None else args.shots)
    return lm, tokenizer, args, ckpt


def main(argv=None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    if args.predictions:
        args = replace(args, task=args.task or "gsm8k", data_dir=args.data_dir or str(BUNDLED_DATA))
        return show(scorer_of(args.task).score_predictions(args), args)
    if not (args.task or args.run or args.prompt is not None or args.export):
        raise UserError(f"--task: expected one of {', '.join(TASKS)} (or --prompt, --run, "
                        f"--predictions)")
    lm, tokenizer, args, ckpt = loaded(args)
    if args.export:
        room("extras.huggingface").export(lm, Path(args.export).absolute(), args.format, ckpt)
        return 0
    if args.prompt is not None:
        print(complete(lm, tokenizer, args))
        return 0
    scorer_of(args.task).prepare(args)
    return show(evaluate(lm, tokenizer, args, args.task), args)


def show(result: dict, args: Command) -> int:
    print(json.dumps(result)) if args.json else scorer_of(args.task).report(result)
    return 0


if __name__ == "__main__":
    main_guard(main)
