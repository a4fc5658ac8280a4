"""Processes: killed at any moment, several at once on one folder, a process that dies, cores and GPUs shared."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robust_peft.studies import LocalEngine, Method, collect, load_study, make_engine, run_study
from robust_peft.studies.report import write_report
from robust_peft.studies.store import PointFolder

STUDY = """
from robust_peft.studies import Measurement, Method, Study, grid

study = Study(
    name="colours",
    settings={settings!r},
    methods=(Method("CA-AT"), *grid("vanilla", "surgery.lam", (0.1, 0.9), {{"surgery.name": "vanilla"}})),
    measure=Measurement(("clean", "pgd-2"), split="validation", limit=10),
    confirm=Measurement(("clean", "pgd-4"), limit=12),
)
"""


@pytest.fixture
def study(make_study):
    settings = dict(make_study().settings) | {"save_every_steps": 1}
    Path("study.py").write_text(STUDY.format(settings=settings))
    return load_study("study.py")


def start(output, *flags, **options):
    """`study run` in a session of its own, so that it can be killed with all that it started."""
    command = [sys.executable, "-m", "robust_peft.cli", "study", "run", "study.py", "--output", output, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True, **options
    )


def verdicts(study, output):
    return [(r.method, r.status, r.measured, r.confirmed) for r in collect(study, output)]


def report(study, output):
    """The report's text and figures, without what training took and what, where and by which commands it was done."""
    write_report(study, collect(study, output), Path(output))
    text = (Path(output) / "report.md").read_text()
    text, tables = re.subn(r"(?<=What the runs were made with\.).*?(?=\nAll 3 runs)", "", text, flags=re.DOTALL)
    costs = r"^((?:\|[^|\n]*){4})(?:\|[^|\n]*){3}(\| *\[0\].*)$"  # seconds and memory stand between those
    text, rows = re.subn(costs, r"\1\2", text, flags=re.MULTILINE)
    figures = {path.name: path.read_bytes() for path in (Path(output) / "figures").iterdir()}
    assert (tables, rows, len(figures)) == (1, 3, 2)
    return text.splitlines(), figures


def events(output):
    found = []
    for path in Path(output).glob("points/*/log.jsonl"):
        found += [(path.parent.name, json.loads(line)) for line in path.read_text().splitlines()]
    return found


def kill_when(process, happened, seconds=240, kill=True):
    """End a process and all that it started as soon as something has happened; True unless it ended before."""
    limit = time.monotonic() + seconds
    while process.poll() is None and not happened():
        assert time.monotonic() < limit
        time.sleep(0.02)
    alive = process.poll() is None
    if kill and alive:
        os.killpg(process.pid, signal.SIGKILL)
    if kill or not alive:
        process.communicate()
    return alive


def test_killed_and_gone_on_with_equals_uninterrupted(study, same_process, tmp_path):
    out = tmp_path / "killed"
    assert kill_when(start("killed"), lambda: list(out.glob("runs/*/state/*")))  # in the middle of a training
    first = list(out.glob("runs/*/metrics.jsonl"))
    assert len(first) == 1 and not list(out.glob("points/*/measured.json"))
    # The main process alone: what it started notices.
    process = start("killed")
    while not list(out.glob("points/*/measured/verdicts-0.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    last = start("killed", "--jobs", "2")
    said, _ = last.communicate(timeout=600)
    assert last.returncode == 0 and "3 done" in said
    run_study(study, tmp_path / "whole", engine=same_process(), say=lambda line: None)
    assert verdicts(study, "killed") == verdicts(study, "whole")
    assert all(status == "done" for _, status, *_ in verdicts(study, "killed"))
    assert report(study, "killed") == report(study, "whole")


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_equals_uninterrupted(study, same_process, tmp_path):
    """The fast twin is above."""
    draw, kills, folders = random.Random(0), 0, ["killed"]
    while kills < 10:
        # Counted from the first work on, which on a busy machine is a while after the start.
        before, pause = len(events(folders[-1])), draw.uniform(0, 3)
        process = start(folders[-1], "--jobs", "2")
        working = kill_when(process, lambda folder=folders[-1], n=before: len(events(folder)) > n, kill=False)
        end = time.monotonic() + pause
        if working and kill_when(process, lambda end=end: time.monotonic() > end):
            kills += 1
        else:  # through before
            folders.append(f"killed{len(folders)}")
    last = start(folders[-1], "--jobs", "2")
    said, _ = last.communicate(timeout=600)
    assert last.returncode == 0 and "3 done" in said
    run_study(study, tmp_path / "whole", engine=same_process(), say=lambda line: None)
    whole = report(study, "whole")
    for folder in folders:
        assert verdicts(study, folder) == verdicts(study, "whole")
        assert report(study, folder) == whole


@pytest.mark.parametrize(("by", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_all_processes_and_says_no_more_than_that(study, by, status):
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored it would be so in there too
    try:
        process = start("stopped", "--jobs", "2", stderr=subprocess.STDOUT)
    finally:
        signal.signal(signal.SIGINT, kept)
    assert kill_when(process, lambda: events("stopped"), kill=False)
    if by == signal.SIGINT:
        os.killpg(process.pid, by)  # as a terminal does
    else:
        process.send_signal(by)  # as a scheduler does
    said, _ = process.communicate(timeout=30)
    first, *more = said.splitlines()
    assert process.returncode == status and first.endswith("3 points, in stopped")
    assert [line[:12] for line in more] == (["Interrupted."] if by == signal.SIGINT else [])
    assert not any(PointFolder("stopped", point).busy for point in study.points()), "somebody still works"


def test_two_at_once_on_one_folder_never_run_a_point_twice(study):
    processes = [start("shared", "--jobs", "2"), start("shared")]
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(status == "done" for _, status, *_ in verdicts(study, "shared"))
    starts = [(point, event["stage"]) for point, event in events("shared") if event["event"] == "started"]
    assert len(starts) == len(set(starts)) >= 8
    assert all("3 done" in text for text in said)


def test_a_process_that_dies_has_failed_its_point_and_no_other(make_study, tmp_path):
    deadly = Method("deadly", settings={"backbone.name": "net.py:deadly"})
    study = make_study(methods=(deadly, Method("CA-AT")), confirm=None)
    run_study(study, "out", engine=LocalEngine(), say=lambda line: None)
    failed, done = collect(study, "out")
    assert failed.status == "failed" and "ended by signal 9 (the machine's memory was full?)" in failed.error
    assert done.status == "done" and done.training["peak_memory_bytes"] > 0
    assert "output.txt" in (PointFolder("out", study.points()[0]).notes / "error.txt").read_text()


@pytest.mark.parametrize(
    ("given", "devices"), [("4,5,7", "5"), ("4", "4"), ("", ""), (None, None)], ids=["three", "one", "none", "unset"]
)
def test_processes_share_cores_and_gpus(given, devices):
    code = "import os; from robust_peft.studies.local_engine import share_machine; share_machine(1, 2); import torch; "
    code += "print(torch.get_num_threads(), os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['LOCAL_WORLD_SIZE'])"
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    environment |= {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split(" ", 1) == [str(max(1, len(os.sched_getaffinity(0)) // 2)), f"{devices} 2\n"]


def test_wrong_engines():
    with pytest.raises(ValueError, match="jobs should be at least 1. Found jobs = 0"):
        make_engine("local", 0)
    with pytest.raises(ValueError, match="engine should be local or ray. Found engine = 'slurm'"):
        make_engine("slurm")


def test_ray_names_its_extra_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "robust_peft\[ray\]"'):
        make_engine("ray")


def test_ray_does_the_same(make_study, same_process, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    methods = (
        Method("broken", settings={"backbone.name": "net.py:broken"}),
        Method("deadly", settings={"backbone.name": "net.py:deadly"}),
        Method("CA-AT"),
    )
    study = make_study(methods=methods)
    run_study(study, "out", engine=make_engine("ray", 2), say=lambda line: None)
    broken, deadly, done = collect(study, "out")
    assert broken.status == "failed" and "out of luck" in broken.error
    assert deadly.status == "failed" and "Ray lost the process" in deadly.error
    assert done.status == "done" and done.confirmed
    alone = make_study(methods=methods[2:])
    run_study(alone, "whole", engine=same_process(), say=lambda line: None)
    assert verdicts(alone, "whole") == verdicts(study, "out")[2:]
