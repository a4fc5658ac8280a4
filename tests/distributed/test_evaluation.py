"""An evaluation's draws and verdicts belong to the samples, whatever the batches and the processes are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "evaluation_worker.py"


def launch(output, *, processes=1, dtype="float64", batch_size=64, folder=""):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(WORKER), str(output), str(folder), dtype, str(batch_size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    found = {dtype: launch(folder / dtype, dtype=dtype) for dtype in ("float64", "float32")}
    for dtype in found:
        rows = found[dtype]["verdicts"]
        standing = [rows[name].count("1") for name in rows]
        assert found[dtype]["world"] == 1 and len(rows) == 11
        assert len(set(standing)) > 4 and 10 < min(standing) < 190  # there is something to agree on
    return found


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 1), (1, 7), (2, 7), (2, 64)])
def test_float64_verdicts_and_draws_are_equal(tmp_path, alone, processes, batch_size):
    found = launch(tmp_path / "found", processes=processes, batch_size=batch_size)
    assert found["world"] == processes
    assert found["verdicts"] == alone["float64"]["verdicts"]
    assert found["draws"] == alone["float64"]["draws"] and len(found["draws"]) > 1000


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 7), (2, 64)])
def test_float32_verdicts_differ_for_one_sample_in_200_at_most(tmp_path, alone, processes, batch_size):
    # Rounding depends on the shape of the batch, so a sample on the very boundary may fall to either side.
    found = launch(tmp_path / "found", processes=processes, batch_size=batch_size, dtype="float32")
    for name, verdicts in alone["float32"]["verdicts"].items():
        wrong = sum(a != b and "." not in (a, b) for a, b in zip(verdicts, found["verdicts"][name], strict=True))
        assert wrong <= 1, name


def test_two_processes_go_on_where_one_stopped(tmp_path, alone):
    folder = tmp_path / "evaluation"
    first = launch(tmp_path / "first", folder=folder)
    lines = (folder / "verdicts-0.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "verdicts-0.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])
    second = launch(tmp_path / "second", processes=2, folder=folder)
    assert second["world"] == 2
    assert second["verdicts"] == first["verdicts"] == alone["float64"]["verdicts"]
    assert len(second["draws"]) < len(first["draws"])  # it did not begin anew
