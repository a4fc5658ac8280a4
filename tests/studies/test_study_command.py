"""``robust-peft study ...``: what it prints, its exit status, and a user's mistakes in one line."""

import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from robust_peft import cli, studies
from robust_peft.studies import collect, load_study, run_study
from robust_peft.studies.status import duration
from robust_peft.studies.store import PointFolder

STUDY = """
from robust_peft.studies import Measurement, Method, Study

study = Study(
    name="colours",
    settings={settings!r},
    methods=[Method("CA-AT"), Method("vanilla", settings={{"surgery.name": "vanilla"}}){more}],
    measure=Measurement(("clean", "pgd-2"), split="validation", limit=10),
    confirm=Measurement(("clean", "pgd-4"), limit=12),
)
"""
BROKEN = ', Method("broken", settings={"backbone.name": "net.py:broken"})'


@pytest.fixture
def write(make_study, monkeypatch, same_process):
    """A function that writes study.py; what `study run` starts is done in this process."""
    monkeypatch.setattr(studies, "make_engine", lambda name, jobs: same_process())
    settings = dict(make_study().settings)
    return lambda more="": Path("study.py").write_text(STUDY.format(settings=settings, more=more))


def test_run_and_status(write, capsys):
    write(BROKEN)
    assert cli.main(["study", "status", "study.py"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("colours in runs/studies/colours: 3 waiting\n")
    assert "The time left is not known before a first one is finished." in said
    assert cli.main(["study", "run", "study.py"]) == 1
    said = capsys.readouterr().out
    assert "[1/3] all, CA-AT, seed 0: " in said and "% adversarial (L-inf 0.2)" in said
    assert "[3/3] all, broken, seed 0: FAILED. ValueError: net.py:broken failed: RuntimeError: out of luck." in said
    assert said.count("confirmed, ") == 2 and said.endswith("2 done, 1 failed of 3\n")
    assert cli.main(["study", "status", "study.py"]) == 0
    said = capsys.readouterr().out
    assert "all: 2 done, 1 failed of 3; 2 of 2 on the fronts confirmed" in said and "broken   1 failed" in said
    failure = "FAILED: all, broken, seed 0: ValueError: net.py:broken failed: RuntimeError: out of luck."
    assert f"{failure} (runs/studies/colours/points/" in said
    assert said.endswith("Nothing is left to do.\n")
    write()
    assert cli.main(["study", "run", "study.py"]) == 0


def test_the_time_left_comes_from_what_finished_points_took(write, capsys):
    write()
    study = load_study("study.py")
    for finished, point in zip((True, False), study.points(), strict=True):
        files = PointFolder("out", point)
        files.notes.mkdir(parents=True)
        files.log(stage="train", event="started")
        if finished:
            files.run.mkdir(parents=True)
            (files.run / "evaluation.json").write_text("{}")
            (files.run / "README.md").touch()
            files.log(stage="train", event="finished", seconds=3600.0)
            files.log(stage="measured", event="started")
            files.log(stage="measured", event="finished", seconds=1800.0)
            rows = [{"attack": "clean", "verdicts": "1"}, {"norm": "linf", "eps": 0.2, "verdicts": "0"}]
            files.write_report("measured", study.measure, {"results": rows})
    assert cli.main(["study", "status", "study.py", "--output", "out"]) == 0
    said = capsys.readouterr().out
    assert "1 done, 1 waiting of 2" in said
    assert "Time left: about 1 h 30 min, one after another, by what 1 finished point took; the confirmation" in said
    assert cli.main(["study", "status", "study.py", "--output", "out", "--jobs", "2"]) == 0
    assert "Time left: about 45 min, 2 side by side" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "said"), [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_status_needs_no_torch(write):
    write()
    code = "import sys; from robust_peft import cli; status = cli.main(['study', 'status', 'study.py']); "
    code += "assert status == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 waiting" in done.stdout, done.stderr


def test_the_printed_commands_do_the_same_as_a_run(write, same_process, monkeypatch, capsys):
    write()
    assert cli.main(["study", "commands", "study.py", "--output", "out"]) == 0
    *points, last = capsys.readouterr().out.strip().splitlines()
    assert len(points) == 2 and all(
        line.startswith("accelerate launch -m robust_peft.cli study point ") for line in points
    )
    first = shlex.split(points[0])
    launcher = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    done = subprocess.run([launcher, *first[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all, CA-AT, seed 0: " in done.stdout, done.stderr
    assert cli.main(shlex.split(points[1])[4:]) == 0
    assert "all, vanilla, seed 0: " in capsys.readouterr().out
    assert cli.main(["study", "commands", "study.py", "--output", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [last]

    written = {}
    report = types.ModuleType("report")
    report.write_report = lambda study, records, output: written.update(records=records) or output / "report.html"
    monkeypatch.setitem(sys.modules, "robust_peft.studies.report", report)
    for command in last.split(" && "):
        assert cli.main(shlex.split(command)[1:]) == 0
    assert "Report: out/report.html" in capsys.readouterr().out
    study = load_study("study.py")
    run_study(study, "whole", engine=same_process(), say=lambda line: None)
    found = [[(r.method, r.status, r.measured, r.confirmed) for r in collect(study, f)] for f in ("out", "whole")]
    assert found[0] == found[1] and all(record.confirmed for record in written["records"])


def test_a_failing_point_has_status_1(write, capsys):
    write(BROKEN)
    assert cli.main(["study", "commands", "study.py", "--output", "out"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[2])[4:]
    assert cli.main(command) == 1
    assert "all, broken, seed 0: FAILED. ValueError: net.py:broken" in capsys.readouterr().out
    for flags, count in (([], 3), (["--retry-failed"], 4)):
        assert cli.main(["study", "commands", "study.py", "--output", "out", *flags]) == 0
        assert len(capsys.readouterr().out.splitlines()) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["walk", "study.py"],
            "The command of study should be one of run, status, commands, point, report. Found 'walk'",
        ),
        (["run", "nothing.py"], "nothing.py does not exist. A study is a Python file, or one that comes with"),
        (["run", "study.py", "--scale", "tiny"], "takes no scale"),
        (["run", "study.py", "--engine", "slurm"], "invalid choice 'slurm'"),
        (["point", "study.py", "--key", "abc", "--output", "out"], "colours has no point abc"),
        (
            ["report", "study.py", "--output", "nowhere"],
            "nowhere does not exist: nothing of colours has been run there",
        ),
        (["run"], "required"),
    ],
)
def test_mistakes_are_one_line(arguments, message, write, capsys):
    write()
    assert cli.main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_it_is_not_launched_in_several_processes(write, monkeypatch, capsys):
    write()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["study", "run", "study.py"]) == 2
    assert "study run starts its own processes" in capsys.readouterr().err


def test_help(capsys):
    assert cli.main(["study", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("run FILE", "status FILE", "commands FILE", "point FILE", "report FILE"))
    assert cli.main(["study"]) == 2
