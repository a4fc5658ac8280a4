"""Runs recipes as a user does: as programs, under plain python or torchrun."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def execute():
    """execute(script, *flags, processes=1, status=0, **environment): the finished process, after a look at its status.

    It runs on CPUs with one thread each. Warnings are not shown, unless the environment says PYTHONWARNINGS.
    """

    def run(*arguments, processes=1, status=0, **environment):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        defaults = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [*command, *map(str, arguments)],
            env=os.environ | defaults | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    return run
