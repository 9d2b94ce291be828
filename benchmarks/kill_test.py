"""kill -9 at random moments, twenty times in a row: does the run still end in the same bits?

    python benchmarks/kill_test.py [--kills 20] [--processes 1] [--seed 0] [-- flags of train.py]

A whole run first; then the same run, killed with all its processes at a random moment and resumed,
until it has been killed that often; at last it is left to end. The moment is drawn by progress, so
that no machine is too fast or too slow: half of the lives end at a random time before the first new
round, half a random part of a round after it. Compares lora.pt, emulator.pt and the columns of
log.csv that are no times. Exit status 0 = the same bits.
"""
import argparse
import contextlib
import csv
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SHORT = ("--local-steps 4 --batch-size 4 --align-init 4 --align-steps 2 --eval-limit 2 "
         "--eval-every 10 --threads 1").split()


def start(processes: int, flags: list[str], out: Path) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = launcher if processes > 1 else []
    argv = [sys.executable, *launcher, str(TRAIN), *flags, "--out", str(out)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*argv, "--resume"], **silent)


def descendants(pid: int) -> list[int]:
    """A process and all below it, from /proc: torchrun gives its workers sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):              # it may just have ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:                                # grows while it is read
        found += [p for p in parents if parents[p] == parent]
    return found


def rows(out: Path) -> list[dict]:
    if not (out / "log.csv").exists():
        return []
    with open(out / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def outcome(out: Path) -> tuple:
    """What must be the same: the learnt tensors, with --align-init-on weights the emulator's, and
    the log."""
    files = [out / name for name in ("lora.pt", "emulator.pt") if (out / name).is_file()]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files], rows(out)


def until(job: subprocess.Popen, reached, seconds: float = float("inf")):
    """Waits until `reached()`, or for so many seconds; an end of its own is an error here."""
    began = time.perf_counter()
    while not reached() and time.perf_counter() - began < seconds:
        if job.poll() is not None:
            sys.exit(f"the run ended by itself, with status {job.returncode}; give it more "
                     f"--rounds")
        time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    # A life makes two rounds at most before its kill is due, and another while that is under way.
    flags, rng = [*SHORT, "--rounds", str(3 * args.kills), *args.flags], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        began = time.perf_counter()
        job = start(args.processes, flags, whole)
        until(job, lambda: rows(whole))
        first = time.perf_counter() - began             # seconds to the end of the first round
        if job.wait():
            sys.exit(f"the run ended with status {job.returncode}")
        total = time.perf_counter() - began
        later = (total - first) / max(len(rows(whole)) - 1, 1)  # seconds of a later round
        print(f"never stopped: {len(rows(whole))} rounds in {total:.0f} s", flush=True)
        for kill in range(1, args.kills + 1):
            began, done = time.perf_counter(), len(rows(killed))
            job = start(args.processes, flags, killed)
            if rng.random() < 0.5:
                until(job, lambda: len(rows(killed)) > done, rng.uniform(0, first))
            else:
                until(job, lambda: len(rows(killed)) > done)
                until(job, lambda: False, rng.uniform(0, later))
            for pid in descendants(job.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            job.wait()
            lived = time.perf_counter() - began
            print(f"kill {kill} after {lived:.2f} s, {len(rows(killed))} rounds in the log",
                  flush=True)
        status = start(args.processes, flags, killed).wait()
        same = outcome(killed) == outcome(whole)
        print(f"{args.kills} kills in a row, then left to end: status {status}, the same bits: "
              f"{same}")
    return 0 if same and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
