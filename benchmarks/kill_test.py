"""kill -9 at random moments, twenty times in a row: does the run still end in the same bits?

    python benchmarks/kill_test.py [--kills 20] [--processes 1] [--seed 0] [-- flags of train.py]

A whole run first; then the same run, killed with all its processes at a random moment,
and resumed, until it has been killed that often; at last it is left to end. Compares lora.pt
and the columns of log.csv that are no times. Needs nothing but train.py; exit status 0 = the same bits.
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
SHORT = ("--rounds 30 --local-steps 4 --batch-size 4 --align-init 4 --align-steps 2 --eval-limit 2 --eval-every 10 "
         "--threads 1").split()


def command(processes: int, flags: list[str], out: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, str(TRAIN), *flags, "--out", str(out), "--resume"]


def run(argv: list[str], seconds: float | None = None) -> tuple[int | None, float]:
    """(exit status or None if it was killed, seconds it took); its own session, so that all of it can be killed."""
    began = time.perf_counter()
    job = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, err = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in descendants(job.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.communicate()
        return None, time.perf_counter() - began
    if job.returncode:
        sys.exit(f"the run ended with status {job.returncode}:\n{err}")
    return 0, time.perf_counter() - began


def descendants(pid: int) -> list[int]:
    """A process and all below it, from /proc: torchrun gives its workers sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:                                 # it has just ended
            continue
    found = [pid]
    for parent in found:                                # grows while it is read
        found += [p for p in parents if parents[p] == parent]
    return found


def outcome(out: Path) -> tuple:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(out / "log.csv"))]
    return hashlib.sha256((out / "lora.pt").read_bytes()).hexdigest(), rows


def rounds_done(out: Path) -> int:
    return len(list(csv.DictReader(open(out / "log.csv")))) if (out / "log.csv").exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    rng, flags = random.Random(args.seed), SHORT + args.flags
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        _, seconds = run(command(args.processes, flags, whole))
        print(f"never stopped: {seconds:.0f} s", flush=True)
        kills = 0
        while kills < args.kills:
            # Short lives make no progress, so some last longer; each starts with the import of torch.
            status, lived = run(command(args.processes, flags, killed), rng.uniform(0.05, 0.6) * seconds)
            if status == 0:                             # finished before all kills: again from nothing
                print(f"finished after {kills} kills; the same bits: {outcome(killed) == outcome(whole)}", flush=True)
                if outcome(killed) != outcome(whole):
                    return 1
                killed = killed.with_name(killed.name + "+")
                continue
            kills += 1
            print(f"kill {kills} after {lived:.1f} s, {rounds_done(killed)} rounds in the log", flush=True)
        run(command(args.processes, flags, killed))
        same = outcome(killed) == outcome(whole)
        print(f"{kills} kills, the same bits: {same}")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
