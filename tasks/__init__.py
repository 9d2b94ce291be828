"""The test sets beside GSM8K, one file each: eval.py for --task rosetta and --task dolly."""


def accuracy(predicted: list, gold: list) -> dict:
    correct = sum(p is not None and p == g for p, g in zip(predicted, gold, strict=True))
    return {"correct": correct, "total": len(gold), "accuracy": correct / max(len(gold), 1)}
