"""Two processes equal one on the joined batch: real PGD, adapters, accumulation, drop path and augmentation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
BUILDERS = HERE.parent / "training"


def launch(output, processes, *, accumulation, dtype, loss="ce", joined_batch=8):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(HERE / "worker.py"), str(BUILDERS), str(output), str(joined_batch), str(accumulation), dtype, loss]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize(("accumulation", "loss"), [(2, "ce"), (1, "trades")])
def test_two_processes_equal_one_in_float64(tmp_path, accumulation, loss):
    # The single process takes the joined batch in one piece: accumulation and sharding are tested in one comparison.
    one = launch(tmp_path / "one.pt", 1, accumulation=1, dtype="float64", loss=loss)
    two = launch(tmp_path / "two.pt", 2, accumulation=accumulation, dtype="float64", loss=loss)
    assert (one["world"], two["world"]) == (1, 2)
    assert one["steps"] == two["steps"] == 6
    assert one["draws"] == two["draws"] and len(one["draws"]) > 24
    assert len(one["parameters"]) > 4
    for name, expected in one["parameters"].items():
        difference = (two["parameters"][name] - expected).norm() / expected.norm()
        assert difference < 1e-8, name
    assert one["verdicts"] == two["verdicts"] and len(one["verdicts"][0]) == 23
    validations = [[r for r in json.loads(run["history"]) if r["kind"] == "validation"] for run in (one, two)]
    assert validations[0] == validations[1] and validations[0][0]["total"] == 23


def test_two_processes_draw_the_same_in_float32(tmp_path):
    # Near zero a gradient's sign may differ by rounding and move a pixel, so parameters are not compared here.
    one = launch(tmp_path / "one.pt", 1, accumulation=1, dtype="float32")
    two = launch(tmp_path / "two.pt", 2, accumulation=2, dtype="float32")
    assert (one["world"], two["world"]) == (1, 2)
    # The draws are the same to the bit; their sums over pixels are taken in one order, so they are too.
    assert one["draws"] == two["draws"] and len(one["draws"]) > 24
    losses = [[r["adv_loss"] for r in json.loads(run["history"]) if r["kind"] == "train"] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_one_process_that_believes_to_be_alone_is_refused(tmp_path, monkeypatch):
    import robust_peft as rp
    from robust_peft.processes import process_state

    sys.path.insert(0, str(BUILDERS))
    from builders import tiny_adapted, tiny_attack

    process_state()  # made while this process was alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but Accelerate joined 1"):
        rp.Trainer(tiny_adapted(), attack=tiny_attack(), progress=False)
