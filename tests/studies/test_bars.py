"""Bars from run folders: real tiny runs, and copies of them that differ in what must agree."""

import json
import re
import shutil

import pytest

import robust_peft as rp
from robust_peft.config import (
    AttackConfig,
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    OptimConfig,
    RunConfig,
    SurgeryConfig,
    ValidationConfig,
)
from robust_peft.evaluation import Report
from robust_peft.models import zoo
from robust_peft.models.micro_swin import micro_swin
from robust_peft.studies import bars
from robust_peft.studies.bars import bars_from_runs

THREAT = rp.ThreatModel("linf", "8/255")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Vanilla and CA-AT on a dozen digits, with a narrow backbone."""

    def narrow(num_classes=10, *, image_size=32, **_):
        return micro_swin(num_classes, image_size=image_size, width=16, depths=(1, 1), num_heads=(1, 2))

    where = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "micro_swin", narrow)
        for surgery in (SurgeryConfig(name="vanilla", lam=0.5), SurgeryConfig(name="ca-at", gamma=0.8)):
            config = RunConfig(
                backbone=BackboneConfig(checkpoint="random"),
                attack=AttackConfig(steps=1),
                surgery=surgery,
                data=DataConfig(batch_size=6, limit=12),
                optim=OptimConfig(epochs=1, warmup_epochs=0),
                validation=ValidationConfig(steps=1),
                evaluation=EvaluationConfig(attacks=("clean", "fgsm", "pgd-2"), batch_size=12),
                precision="fp32",
            )
            rp.run(config, where / surgery.name, progress=False)
    return where / "vanilla", where / "ca-at"


@pytest.fixture
def copies(folders, tmp_path):
    """Copies that a test may change, with reports of its own making."""
    made = []
    for folder in folders:
        made.append(tmp_path / folder.name)
        shutil.copytree(folder, made[-1])
    return made


def change(folder, edit):
    path = folder / "evaluation.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def texts(path):
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_two_runs_side_by_side(folders, tmp_path):
    shown = texts(bars_from_runs(folders, tmp_path / "bars.svg"))
    # An attack is tried on what the one before left standing, so that the last figure is a worst case.
    for words in ("standard", "adversarial: worst case up to PGD-2, L-inf 8/255", "vanilla", "CA-AT", "gamma 0.8"):
        assert words in shown, words
    assert "accuracy (%), n=12" in shown and any("McNemar" in words for words in shown)
    assert bars_from_runs(folders, tmp_path / "bars.png", attack="fgsm").read_bytes().startswith(b"\x89PNG")


def test_bars_are_the_reports_figures_in_the_order_of_the_folders(folders, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(bars, "plot_bars", lambda groups, path, **options: drawn.append((groups, options)) or path)
    bars_from_runs(folders[::-1], tmp_path / "x.png", attack="fgsm", title="mine")
    bars_from_runs(folders, tmp_path / "x.png")
    (groups, options), (_, default) = drawn
    assert list(groups) == ["CA-AT\ngamma 0.8", "vanilla\nlam 0.5"] and options["title"] == "mine"
    for folder, group in zip(folders[::-1], groups.values(), strict=True):
        report = Report.load(folder / "evaluation.json")
        assert list(group.values()) == [report.clean, report[THREAT, "fgsm"]]
    assert default["title"] == Report.load(folders[0] / "evaluation.json").data


def test_runs_of_one_method_carry_their_folders_names(copies, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(bars, "plot_bars", lambda groups, path, **options: drawn.append((groups, options)) or path)
    shutil.copytree(copies[0], tmp_path / "seed-1")
    bars_from_runs([*copies, tmp_path / "seed-1"], tmp_path / "x.png")
    (groups, options) = drawn[0]
    assert list(groups) == ["vanilla\nlam 0.5\nvanilla", "CA-AT\ngamma 0.8\nca-at", "vanilla\nlam 0.5\nseed-1"]
    assert options["note"] == "95 % intervals"


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("eps", 0.01, "threat model: L-inf 8/255, box 0 to 1 against L-inf 0.01, box 0 to 1"),
        ("norm", "l2", "threat model"),
        ("box", None, "against L-inf 8/255, no box"),
        ("attack", "pgd-3", "attack: worst case up to PGD-2 against worst case up to PGD-3"),
    ],
)
def test_another_threat_or_attack_is_refused(copies, tmp_path, field, value, said):
    change(copies[1], lambda values: [row.__setitem__(field, value) for row in values["results"][2:]])
    with pytest.raises(ValueError, match="cannot be compared") as caught:
        bars_from_runs(copies, tmp_path / "x.png")
    assert said in str(caught.value)
    assert not (tmp_path / "x.png").exists()


def test_other_test_images_are_refused(copies, tmp_path):
    (verdicts,) = (copies[1] / "evaluation").glob("verdicts-*.jsonl")
    verdicts.write_text(re.sub(r'("hashes": \[")(..)', r"\1zz", verdicts.read_text(), count=1))
    with pytest.raises(ValueError, match="content of the test images"):
        bars_from_runs(copies, tmp_path / "x.png")


@pytest.mark.parametrize("key, value, said", [("data", "other", "test images"), ("precision", "bf16", "precision")])
def test_another_evaluation_is_refused(copies, tmp_path, key, value, said):
    change(copies[1], lambda values: values.__setitem__(key, value))
    with pytest.raises(ValueError, match=said):
        bars_from_runs(copies, tmp_path / "x.png")


def test_without_hashes_the_configs_images_decide(copies, tmp_path):
    for folder in copies:
        shutil.rmtree(folder / "evaluation")
    assert bars_from_runs(copies, tmp_path / "x.png").is_file()
    path = copies[1] / "config.json"
    description = json.loads(path.read_text())
    description["config"]["data"]["limit"] = 30
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="differ in data"):
        bars_from_runs(copies, tmp_path / "y.png")


def test_an_attack_that_was_not_run(folders, tmp_path):
    with pytest.raises(ValueError, match="autoattack .* was not measured"):
        bars_from_runs(folders, tmp_path / "x.png", attack="autoattack")


def test_an_unfinished_evaluation_is_refused(copies, tmp_path):
    def cut(values):
        row = values["results"][-1]
        row["verdicts"] = row["verdicts"][:-1] + "?"

    change(copies[0], cut)
    with pytest.raises(ValueError, match="is not finished"):
        bars_from_runs(copies, tmp_path / "x.png")


def test_a_run_without_an_evaluation(copies, tmp_path):
    (copies[1] / "evaluation.json").write_text('{"training": {}}')
    with pytest.raises(FileNotFoundError, match="without an evaluation"):
        bars_from_runs(copies, tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        bars_from_runs([copies[0], tmp_path], tmp_path / "x.png")


@pytest.mark.parametrize("count", [0, 1])
def test_one_run_is_no_comparison(folders, tmp_path, count):
    with pytest.raises(ValueError, match="two or more different run folders"):
        bars_from_runs([folders[0]] * 2 * count, tmp_path / "x.png")
