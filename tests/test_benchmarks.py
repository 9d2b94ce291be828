"""What the programs of benchmarks/ read of a run."""
import contextlib
import io
import subprocess
import sys

import train
from tests.common import HERE, benchmark, folder, needs


def write_log(run, rows):
    """log.csv as train.py writes it: an empty cell where a row has no value."""
    columns = list(dict.fromkeys([*train.COLUMNS, *(name for row in rows for name in row)]))
    lines = [columns] + [[str(row.get(name, "")) for name in columns] for row in rows]
    (run / "log.csv").write_text("".join(",".join(line) + "\n" for line in lines))


def test_curves_read_every_column_of_the_log():
    # kills: bytes of one direction; not cumulative; an empty cell read; the alignment's terms by
    # name, so that a fork's new term has no panel
    plot = benchmark("plot")
    first = {"round": 1, "client_loss": 2.0, "bytes_down": 3e6, "bytes_up": 1e6, "seconds": 1.0}
    second = first | {"round": 2, "client_loss": 1.0, "bytes_up": 2e6, "adapfu": 0.5}
    with folder() as path:
        write_log(path, [first, second])
        rows = plot.read_log(path)
        assert plot.exchanged(rows) == ([1, 2], [4, 9])
        assert plot.column(rows, "adapfu") == ([2], [0.5])
        assert plot.column(rows, "align_kl") == ([], [])
        new = {"a": rows, "b": [second | {"align_l2": 1.0, "align_of_a_fork": 2.0}]}
        assert plot.measured(new) == ["client_loss", "align_l2", "align_of_a_fork"]
        needs("matplotlib")
        with contextlib.redirect_stdout(io.StringIO()):
            plot.main([str(path), str(path), "--out", str(path / "p.png")])
        assert (path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_a_log_becomes_tensorboard_events():
    # kills: all rows at one step; an empty cell as a number
    reader, = needs("tensorboard.backend.event_processing.event_accumulator")
    rows = [{"round": t, "client_loss": 3.0 - t, "seconds": 1.0} for t in (1, 2)]
    with folder() as path:
        write_log(path, [rows[0], rows[1] | {"adapfu": 0.5}])
        subprocess.run([sys.executable, HERE / "benchmarks" / "tensorboard_log.py", path],
                       check=True, capture_output=True)
        board = reader.EventAccumulator(str(path))
        board.Reload()
        events = [(e.step, e.value) for e in board.Scalars("client_loss")]
        assert events == [(1, 2.0), (2, 1.0)] and len(board.Scalars("adapfu")) == 1


def test_the_comparison_runs_a_cell_and_prints_its_row():
    # kills: train.parse read as a pair; a finished run that is run again
    with folder() as path:
        command = [sys.executable, HERE / "benchmarks" / "compare.py", "--methods", "fedbiot",
                   "--dropouts", "0.5", "--adapters", "2", "--seeds", "0", "--lr", "0.01",
                   "--jobs", "1", "--out", path, "--", "--rounds", "1", "--align-init", "0",
                   "--eval-limit", "2", "--align-init-on", "lora"]
        for _ in range(2):
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        row, = (line for line in done.stdout.splitlines() if line.startswith("| fedbiot"))
        assert row.startswith("| fedbiot | 0.5 | 2 | 0.01 | 0 |") and "not run" not in row
        logged, = path.glob("fedbiot*seed0.out")
        assert logged.read_text().count("round 1 |") == 1
