"""What a study runs and what it leaves alone; everything in this process, the processes have tests of their own."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from importlib import metadata

import pytest

import robust_peft as rp
from robust_peft.evaluation import Report
from robust_peft.runs import run_images
from robust_peft.studies import Measurement, Method, collect, run_study
from robust_peft.studies.runner import run_point
from robust_peft.studies.status import describe_end, describe_status
from robust_peft.studies.store import PointFolder
from robust_peft.studies.survey import accuracies
from robust_peft.studies.work import attacks_by_norm

MEASURED_ATTACKS = ["clean", "fgsm", "pgd-2"]  # conftest's

STAGES = ("measured", "confirmed")
LUCK = "net.py:broken failed: RuntimeError: out of luck."


def started(output, stage=None):
    """How often each point's stages were started."""
    counts = {}
    for path in output.glob("points/*/log.jsonl"):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "started" and stage in (None, event["stage"]):
                counts[path.parent.name, event["stage"]] = counts.get((path.parent.name, event["stage"]), 0) + 1
    return counts


def test_a_study_is_trained_measured_confirmed_and_then_left_alone(make_study, same_process, tmp_path):
    study, output, said = make_study(seeds=(0, 1)), tmp_path / "out", []
    findings = run_study(study, output, engine=same_process(), say=said.append)
    records = collect(study, output)
    assert [record.status for record in records] == ["done"] * 6
    assert [(record.method, record.seed) for record in records[:4]] == [
        ("vanilla (lam 0.1)", 0),
        ("vanilla (lam 0.9)", 0),
        ("CA-AT", 0),
        ("vanilla (lam 0.1)", 1),
    ]
    for record in records:
        assert [verdicts.attack for verdicts in record.measured] == MEASURED_ATTACKS
        assert [verdicts.threat for verdicts in record.measured] == ["", "L-inf 0.2", "L-inf 0.2"]
        assert all(verdicts.accuracy.total == 10 for verdicts in record.measured)
        assert record.training["trainable_parameters"] > 1000 and record.training["bytes_on_disk"] > 4000
        assert 0 < record.training["seconds_per_step"] < record.training["seconds"]
        assert (record.folder / "README.md").is_file()
    # The figures are the saved model's own.
    images, threat = run_images(records[1].folder).validation, rp.ThreatModel("linf", "0.2")
    again = rp.evaluate(rp.load_run(records[1].folder), images, [threat], MEASURED_ATTACKS, batch_size=4, limit=10)
    assert [result.accuracy for result in again.results] == [v.accuracy for v in records[1].measured]

    # The single member of a family is always on its front; of the others those that no other one beats.
    means = {}
    for finding in findings:
        means.setdefault(finding.point.method.name, []).append(accuracies(finding.point, finding.measured))
    pairs = {name: tuple(sum(values) for values in zip(*of_seeds, strict=True)) for name, of_seeds in means.items()}
    low, high = pairs["vanilla (lam 0.1)"], pairs["vanilla (lam 0.9)"]
    beaten = {
        "vanilla (lam 0.1)": low != high and low[0] <= high[0] and low[1] <= high[1],
        "vanilla (lam 0.9)": low != high and high[0] <= low[0] and high[1] <= low[1],
        "CA-AT": False,
    }
    for record in records:
        assert bool(record.confirmed) is not beaten[record.method]
        assert [verdicts.accuracy.total for verdicts in record.confirmed] in ([], [12, 12])
    assert sum("confirmed" in line for line in said) == sum(bool(record.confirmed) for record in records)

    before = started(output)
    assert set(before.values()) == {1}
    engine = same_process()
    run_study(study, output, engine=engine)
    assert engine.tasks == [] and started(output) == before
    report = Report.load(output / "points" / study.points()[0].folder / "measured.json")
    assert report.finished and report.data == "validation"
    with pytest.raises(ValueError, match="holds the study colours, not other"):
        run_study(make_study(name="other"), output, engine=same_process())


def test_a_failing_point_is_kept_with_its_error_and_stops_nothing_else(make_study, same_process, tmp_path):
    broken = Method("broken", settings={"backbone.name": "net.py:broken"})
    study = make_study(methods=(broken, Method("CA-AT")))
    run_study(study, tmp_path / "out", engine=same_process(), say=lambda line: None)
    failed, done = collect(study, tmp_path / "out")
    assert failed.status == "failed" and failed.error == f"ValueError: {LUCK}" and not failed.measured
    assert done.status == "done" and done.confirmed
    files = PointFolder(tmp_path / "out", study.points()[0])
    assert "Traceback" in (files.notes / "error.txt").read_text()
    said = describe_status(study, tmp_path / "out")
    assert f"FAILED: all, broken, seed 0: {failed.error}" in said and "--retry-failed tries again" in said

    run_study(study, tmp_path / "out", engine=(again := same_process()), say=lambda line: None)
    assert again.tasks == []
    text = (tmp_path / "net.py").read_text()
    (tmp_path / "net.py").write_text(text.replace('raise RuntimeError("out of luck")', "return network()"))
    run_study(study, tmp_path / "out", engine=same_process(), retry_failed=True, say=lambda line: None)
    assert [record.status for record in collect(study, tmp_path / "out")] == ["done", "done"]
    assert not (files.notes / "error.json").exists()


def test_what_is_measured_otherwise_is_measured_again_and_not_trained_again(make_study, same_process, tmp_path):
    study, output = make_study(methods=(Method("CA-AT"),), confirm=None), tmp_path / "out"
    run_study(study, output, engine=same_process(), say=lambda line: None)
    other = replace(study, measure=Measurement(("clean", "pgd-2"), split="validation", limit=6))
    (record,) = collect(other, output)
    assert record.status == "trained" and not record.measured
    run_study(other, output, engine=same_process(), say=lambda line: None)
    (record,) = collect(other, output)
    assert [verdicts.accuracy.total for verdicts in record.measured] == [6, 6]
    on_test = replace(study, measure=Measurement(("clean", "pgd-2"), split="test", limit=6, eps=("0.1",)))
    run_study(on_test, output, engine=same_process(), say=lambda line: None)
    (record,) = collect(on_test, output)
    assert [verdicts.threat for verdicts in record.measured] == ["", "L-inf 0.2", "L-inf 0.1"]
    assert set(started(output, "train").values()) == {1} and set(started(output, "measured").values()) == {3}


def test_another_norm_is_measured_with_the_attacks_that_it_has(make_study, same_process, tmp_path):
    measure = Measurement(("clean", "mifgsm-1", "fgsm", "ddn-1"), limit=6, each=True, eps=("0.1", "l2 0.5"))
    study, output = make_study(methods=(Method("CA-AT"),), measure=measure), tmp_path / "out"
    run_study(study, output, engine=same_process(), say=lambda line: None)
    (record,) = collect(study, output)
    assert [(verdicts.attack, verdicts.threat) for verdicts in record.measured] == [
        ("clean", ""),
        *((attack, threat) for threat in ("L-inf 0.2", "L-inf 0.1") for attack in ("mifgsm-1", "fgsm")),
        *((attack, "L2 0.5") for attack in ("fgsm", "ddn-1")),
    ]
    assert record.confirmed and {verdicts.accuracy.total for verdicts in record.measured} == {6}


def test_a_report_says_by_which_versions_and_on_which_images_it_was_measured(make_study, same_process, tmp_path):
    measure = Measurement(("clean", "fgsm"), split="validation", limit=6, eps=("l2 0.5",))
    confirm = Measurement(("clean", "fgsm"), split="test", limit=6)
    methods = (Method("A"), Method("B", settings={"data.validation_share": 0.2}))
    study, output = make_study(methods=methods, measure=measure, confirm=confirm, seeds=(0, 1)), tmp_path / "out"
    run_study(study, output, engine=same_process(), say=lambda line: None)
    paths = {name: [PointFolder(output, p).notes / f"{name}.json" for p in study.points()] for name in STAGES}
    content = {name: [json.loads(path.read_text())["images_sha256"] for path in paths[name]] for name in STAGES}
    (first, second, *again), of_test = content["measured"], set(content["confirmed"])
    assert again == [first, second] and len({first, second, *of_test}) == 3 and len(of_test) == 1
    for path in (*paths["measured"], *paths["confirmed"]):
        versions = json.loads(path.read_text())["versions"]
        assert all(versions[name] == metadata.version(name) for name in ("robust_peft", "torch", "timm", "peft"))

    before = collect(study, output)
    for path in (*paths["measured"], *paths["confirmed"]):  # as of a version that did not write these down
        report = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in report.items() if k not in ("versions", "images_sha256")}))
    for record, then in zip(collect(study, output), before, strict=True):
        assert record.measured == then.measured and record.confirmed == then.confirmed and record.confirmed

    fewer = replace(study, measure=replace(measure, limit=5), methods=methods[:1], seeds=(0,), confirm=None)
    run_study(fewer, output, engine=same_process(), say=lambda line: None)
    assert json.loads(paths["measured"][0].read_text())["images_sha256"] != first


def test_a_run_of_other_settings_is_neither_reused_nor_overwritten(make_study, same_process, tmp_path):
    """A default that another version of the package changed: the folder's name does not tell."""
    study, output = make_study(methods=(Method("A"),), seeds=(0, 1), confirm=None), tmp_path / "out"
    run_study(study, output, engine=same_process(), say=lambda line: None)
    before = collect(study, output)
    path = before[0].folder / "config.json"
    description = json.loads(path.read_text())
    settings = description["config"]
    settings["only_then"] = settings["optim"]["only_then_too"] = 1  # what this version does not know
    del settings["compile"], settings["optim"]["momentum"]  # and what that one did not
    path.write_text(json.dumps(description))
    assert collect(study, output) == before

    settings["optim"]["lr"], settings["seed"] = 1e-4, 7
    path.write_text(json.dumps(description))
    said = (
        f"The run in {path.parent} was trained with other settings: optim.lr was 0.0001, is 0.003; seed was 7, is 0. "
        "Remove that folder to train it anew, or give the study another name to keep it."
    )
    failed, done = collect(study, output)
    assert (failed.status, failed.error, failed.measured) == ("failed", said, ()) and done == before[1]
    engine = same_process()
    run_study(study, output, engine=engine, retry_failed=True, say=lambda line: None)
    assert len(engine.tasks) == 0 and collect(study, output)[0] == failed
    files = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert run_point(study, output, failed.key) == (f"all, A, seed 0: FAILED. {said}", 1)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == files

    shutil.rmtree(path.parent)
    run_study(study, output, engine=same_process(), say=lambda line: None)
    assert [record.measured for record in collect(study, output)] == [record.measured for record in before]


@pytest.mark.parametrize(
    ("attacks", "norms", "message"),
    [
        (("clean", "ddn"), ("linf",), "ddn exists for l2 only. Found norm = 'linf'"),
        (("clean", "ddn"), ("linf", "l2"), "attacks should have one that exists for linf. Found clean, ddn"),
        (("clean", "mifgsm"), ("linf", "l2"), "attacks should have one that exists for l2"),
    ],
)
def test_a_norm_without_an_attack_is_an_error(attacks, norms, message):
    with pytest.raises(ValueError, match=message):
        attacks_by_norm(attacks, norms)


def test_a_misspelt_attack_is_found_before_anything_is_trained(make_study, same_process, tmp_path):
    for name in ("measure", "confirm"):
        wrong = replace(getattr(make_study(), name), attacks=("clean", "pdg-20"))
        with pytest.raises(ValueError, match="pdg"):
            run_study(make_study(**{name: wrong}), tmp_path / "out", engine=same_process())
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(make_study, same_process, tmp_path):
    (tmp_path / "my_study.py").touch()
    with pytest.raises(ValueError, match=r"my_study.py is a file, and no folder for a study"):
        run_study(make_study(), tmp_path / "my_study.py", engine=same_process())


def test_one_error_of_many_points_is_said_once(make_study, same_process, tmp_path):
    methods = [Method("broken", f"lam {lam}", {"backbone.name": "net.py:broken", "surgery.lam": lam}) for lam in (0, 1)]
    methods = [replace(m, settings={"surgery.name": "vanilla", **m.settings}) for m in methods]
    findings = run_study(make_study(methods=methods), tmp_path / "out", engine=same_process(), say=lambda line: None)
    said = describe_end(findings)
    assert said.count(LUCK) == 1 and "broken (lam 0), seed 0 and 1 more: " in said and said.endswith("2 failed")


def test_runs_of_other_settings_are_mentioned(make_study, same_process, tmp_path):
    first, second = (make_study(methods=(Method("CA-AT", settings={"surgery.gamma": g}),)) for g in (0.5, 0.9))
    run_study(first, tmp_path / "out", engine=same_process(), say=lambda line: None)
    assert "more run" not in describe_status(first, tmp_path / "out")
    assert "1 more run lies in this folder, made with settings" in describe_status(second, tmp_path / "out")


def test_an_audit_goes_with_the_confirmation(make_study, same_process, tmp_path):
    study = make_study(methods=(Method("CA-AT"),), confirm=replace(make_study().confirm, audit=True))
    run_study(study, tmp_path / "out", engine=same_process(), say=lambda line: None)
    (record,) = collect(study, tmp_path / "out")
    assert record.audit in ("passed", "warnings", "failed")
    assert (record.audit == "failed") is bool(record.audit_failures)
    assert (record.folder.parents[1] / "points" / record.folder.name / "audit" / "audit.md").is_file()


def test_the_time_limit_stops_and_the_same_call_goes_on(make_study, same_process, tmp_path):
    study, output = make_study(methods=(Method("CA-AT"),), confirm=None), tmp_path / "out"
    tries = 0
    while collect(study, output)[0].status != "done":
        run_study(study, output, engine=same_process(), time_limit=0.02 * 1.2**tries, say=lambda line: None)
        tries += 1
        assert tries < 60
    assert tries > 2
    whole = tmp_path / "whole"
    run_study(study, whole, engine=same_process(), say=lambda line: None)
    assert collect(study, output)[0].measured == collect(study, whole)[0].measured


def test_a_point_that_another_process_holds_is_let_be(make_study, same_process, tmp_path):
    study, output = make_study(confirm=None), tmp_path / "out"
    point = study.points()[1]
    with PointFolder(output, point).claimed() as held:
        assert held
        assert [record.status for record in collect(study, output)] == ["waiting", "running", "waiting"]
        said, status = run_point(study, output, point.key)
        assert status == 0 and said == "all, vanilla (lam 0.9), seed 0: another process is at it."
        with pytest.raises(KeyboardInterrupt):  # at a third task: it would wait for the other process
            run_study(study, output, engine=same_process(most=1), say=lambda line: None)
    assert [record.status for record in collect(study, output)] == ["done", "waiting", "waiting"]
    said, status = run_point(study, output, point.key)
    assert status == 0 and "% standard" in said
    with pytest.raises(ValueError, match="has no point abc"):
        run_point(study, output, "abc")


def test_an_unfinished_start_is_no_obstacle(make_study, same_process, tmp_path):
    """A process that was killed while it wrote a run's first file."""
    study, output = make_study(methods=(Method("CA-AT"),), confirm=None), tmp_path / "out"
    run = PointFolder(output, study.points()[0]).run
    run.mkdir(parents=True)
    (run / ".config.json.abc.tmp").write_text("{")
    run_study(study, output, engine=same_process(), say=lambda line: None)
    assert collect(study, output)[0].status == "done"


class Dying:
    """Every process ends without a word, and before it notes that it started."""

    def __init__(self):
        self.tasks, self.waiting = [], []

    @property
    def free(self):
        return not self.waiting

    def submit(self, task):
        self.tasks.append(task)
        assert len(self.tasks) < 20
        self.waiting.append((task, "The process was ended by signal 9."))

    def ended(self, timeout):
        found, self.waiting = self.waiting, []
        return found

    def close(self):
        pass


def test_a_process_that_dies_before_its_first_word_is_not_started_again(make_study, same_process, tmp_path):
    """What was under way is the task's to say: the log's last start is an earlier stage's."""
    study, output = make_study(methods=(Method("CA-AT"),)), tmp_path / "out"
    files = PointFolder(output, study.points()[0])

    def dies(study, count, stage):
        run_study(study, output, engine=(engine := Dying()), say=lambda line: None)
        assert len(engine.tasks) == count
        assert json.loads((files.notes / "error.json").read_text())["stage"] == stage
        files.forget_failure()

    dies(study, 1, "train")
    run_study(replace(study, confirm=None), output, engine=same_process(), say=lambda line: None)
    dies(study, 1, "confirmed")
    run_study(study, output, engine=same_process(), say=lambda line: None)
    dies(replace(study, measure=Measurement(("clean", "fgsm"), limit=4)), 1, "measured")
    assert set(started(output).values()) == {1}


def test_whoever_looks_does_not_look_like_somebody_at_work(make_study, tmp_path):
    study = make_study()
    files = PointFolder(tmp_path / "out", study.points()[0])
    assert not files.busy
    with files.claimed():
        assert files.busy
    with files.looked_at():
        assert not files.busy and [record.status for record in collect(study, tmp_path / "out")] == ["waiting"] * 3
        with files.claimed(patience=0.1) as held:
            assert not held
    with files.claimed() as held:
        assert held


class Interfered:
    """Each task ends in a word of `perform`, and then somebody else has the point."""

    def __init__(self, outcome, before):
        self.outcome, self.before, self.claim, self.free = outcome, before, None, True

    def submit(self, task):
        self.before(task.files)
        self.claim, self.free = (task, task.files.claimed()), False
        assert self.claim[1].__enter__()

    def ended(self, timeout):
        if self.claim is None:
            raise KeyboardInterrupt  # it would wait for the other process
        (task, held), self.claim = self.claim, None
        self.held = held
        return [(task, self.outcome)]

    def close(self):
        self.held.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("outcome", "before", "said"),
    [
        ("failed", lambda files: files.write_failure("train", None, "E: x", ""), "all, CA-AT, seed 0: FAILED. E: x"),
        ("failed", lambda files: None, "all, CA-AT, seed 0: FAILED, and is being tried again."),
        ("done", lambda files: None, "all, CA-AT, seed 0: done, and is being worked on again."),
        ("A signal.", lambda files: None, "all, CA-AT, seed 0: FAILED. A signal."),
    ],
)
def test_somebody_else_at_a_point_ends_no_run(make_study, tmp_path, outcome, before, said):
    study, lines = make_study(methods=(Method("CA-AT"),), confirm=None), []
    with suppress(KeyboardInterrupt):
        run_study(study, tmp_path / "out", engine=Interfered(outcome, before), say=lines.append)
    assert [line.partition("] ")[2] for line in lines] == [said]


def test_an_error_is_seen_while_somebody_holds_the_point_and_gone_once_it_is_tried_again(make_study, tmp_path):
    study, output = make_study(methods=(Method("CA-AT"),), confirm=None), tmp_path / "out"
    files = PointFolder(output, study.points()[0])
    files.notes.mkdir(parents=True)
    files.write_failure("train", None, "E: x", "")
    with files.claimed():
        assert [record.status for record in collect(study, output)] == ["failed"]
    _, status = run_point(study, output, study.points()[0].key, time_limit=-1)
    assert status == 0 and [record.status for record in collect(study, output)] == ["waiting"]
