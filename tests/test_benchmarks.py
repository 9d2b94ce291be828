"""What the programs of benchmarks/ read of a run."""
import contextlib
import io

import train
from tests.common import benchmark, folder, needs


def test_curves_read_every_column_of_the_log():
    # kills: bytes of one direction; not cumulative; an empty cell read
    plot = benchmark("plot")
    first = {"round": 1, "client_loss": 2.0, "bytes_down": 3e6, "bytes_up": 1e6, "seconds": 1.0}
    second = first | {"round": 2, "client_loss": 1.0, "bytes_up": 2e6, "adapfu": 0.5}
    with folder() as path:
        columns = [*train.COLUMNS, "adapfu"]
        lines = [[str(row.get(name, "")) for name in columns] for row in (first, second)]
        (path / "log.csv").write_text("\n".join(map(",".join, [columns, *lines])) + "\n")
        rows = plot.read_log(path)
        assert plot.exchanged(rows) == ([1, 2], [4, 9])
        assert plot.column(rows, "adapfu") == ([2], [0.5])
        assert plot.column(rows, "align_kl") == ([], [])
        needs("matplotlib")
        with contextlib.redirect_stdout(io.StringIO()):
            plot.main([str(path), str(path), "--out", str(path / "p.png")])
        assert (path / "p.png").read_bytes()[:4] == b"\x89PNG"
