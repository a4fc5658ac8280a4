"""The command line: every mistake is one line on standard error and exit status 2, before anything is trained."""

import subprocess
import sys

import pytest

from robust_peft import cli
from robust_peft.config import RunConfig, SurgeryConfig, to_dict
from robust_peft.files import write_json
from robust_peft.presets import PRESETS

BAD = [
    (["--surgery.gamma", "1.2"], r"surgery.gamma should be in [0, 1]. Found gamma = 1.2."),
    (["--threat.eps", "8/0"], "threat.eps should be a number or a fraction like \"8/255\". Found eps = '8/0'."),
    (["--threat.eps", "8"], 'did you mean "8/255"?'),
    (["--surgery.name", "vanilla", "--surgery.gamma", "0.8"], "surgery.gamma is no parameter of 'vanilla'"),
    (["--surgery.name", "average"], "invalid choice 'average' for argument '--surgery.name'. Expected one of"),
    (["--attack.name", "deepfool"], "invalid choice 'deepfool' for argument '--attack.name'"),
    (["--evaluation.attacks", "clean", "deepfool"], "attack should be one of clean, fgsm, pgd-K"),
    (["--surgery.gama", "0.8"], "Unrecognized options: --surgery.gama"),
    (["--optim.lr", "fast"], "Error parsing --optim.lr"),
    (
        ["--data.name", "imagenet"],
        "data.name should be one of digits, cub200, ",
    ),
    (["--data.name", "parquet"], "needs data.train"),
    (["--data.name", "parquet", "--data.train", "nowhere.parquet"], "nowhere.parquet does not exist"),
    (
        ["--backbone.name", "resnet"],
        "backbone should be micro_swin, ares/swin_small, ",
    ),
    (["--resume"], "holds no run to resume"),
    (["--resume", "--overwrite"], "resume and overwrite exclude each other"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_status_2(flags, message, tmp_path, capsys):
    status = cli.main(["train", "quickstart", "--output", str(tmp_path / "run"), *flags])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_all_problems_are_told_at_once(tmp_path, capsys):
    flags = ["--surgery.gamma", "1.2", "--threat.eps", "8/0", "--optim.lr", "-1", "--data.batch-size", "0"]
    assert cli.main(["train", "quickstart", "--output", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    for part in ("surgery.gamma", "threat.eps", "optim.lr", "data.batch_size"):
        assert part in error


@pytest.mark.parametrize("arguments", [[], ["paint"], ["train", "nonsense"], ["evaluate", "nowhere"]])
def test_wrong_commands(arguments, capsys):
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert "usage" in said.out or said.err.startswith("error: ")


def test_a_flag_that_names_another_method_drops_the_presets_parameters():
    default = RunConfig(surgery=SurgeryConfig(name="ca-at", gamma=0.9))
    changed = cli.with_methods(default, ["--surgery.name", "vanilla", "--adapter.name=lora"])
    assert changed.surgery == SurgeryConfig(name="vanilla")
    assert changed.adapter.name == "lora" and changed.adapter.reduction_factor is None
    assert cli.with_methods(default, ["--surgery.name", "ca-at"]) == default


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_preset_without_flags_is_the_preset(flags):
    assert all(cli.with_methods(preset, flags) == preset for preset in PRESETS.values())


def test_another_norm_needs_its_own_budget(tmp_path, capsys):
    write_json(tmp_path / "config.json", {"config": to_dict(PRESETS["quickstart"]), "classes": []})
    assert cli.main(["evaluate", str(tmp_path), "--norm", "l2"]) == 2
    assert "--norm l2 needs --eps" in capsys.readouterr().err


def test_help_needs_no_torch_and_shows_every_preset():
    code = (
        "import sys; from robust_peft import cli; status = cli.main(['--help']); "
        "assert status == 0 and 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert PRESETS and all(name in done.stdout for name in PRESETS)


@pytest.mark.parametrize("command", [["train", "quickstart"], ["evaluate"], ["zoo"]])
def test_every_command_has_help(command, capsys):
    try:
        status = cli.main([*command, "--help"])
    except SystemExit as stop:
        status = stop.code or 0
    assert status == 0
    assert "usage" in capsys.readouterr().out


def test_zoo_lists_the_embedded_backbone(capsys):
    assert cli.main(["zoo"]) == 0
    assert "micro_swin" in capsys.readouterr().out


# --- any model, any images ---

FACTORY = """
import torch
from torch import nn


def network(num_classes=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))
"""


@pytest.fixture
def own_model(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    return f"{tmp_path / 'mine.py'}:network"


def test_evaluate_takes_any_model_and_budgets_and_goes_on(own_model, tmp_path, capsys):
    flags = ["evaluate", own_model, "--data", "digits", "--limit", "6", "--attacks", "fgsm", "apgd-ce-3", "--eps"]
    flags += ["0.1", "0.2", "--output", str(tmp_path / "kept")]
    assert cli.main(flags) == 0
    first = capsys.readouterr().out
    assert "fgsm" in first and "L-inf 0.1" in first and "L-inf 0.2" in first and "(n=6)" in first
    assert (tmp_path / "kept" / "report.json").is_file()
    lines = (tmp_path / "kept" / "verdicts-0.jsonl").read_bytes()
    assert cli.main(flags) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "kept" / "verdicts-0.jsonl").read_bytes() == lines  # nothing was measured twice


def test_evaluate_says_when_the_time_limit_came_first(own_model, capsys):
    assert (
        cli.main(["evaluate", own_model, "--data", "digits", "--limit", "6", "--eps", "0.1", "--time-limit", "0"]) == 0
    )
    said = capsys.readouterr().out
    assert "not finished: 6 of 6 samples to go" in said and "Stopped by the time limit." in said


def test_audit_ends_with_status_1_where_a_check_failed(own_model, tmp_path, capsys):
    flags = ["audit", own_model, "--data", "digits", "--train-data", "digits", "--limit", "8", "--eps", "0.1"]
    flags += ["--checks", "train images", "train mode", "--output", str(tmp_path / "audit")]
    assert cli.main(flags) == 1
    said = capsys.readouterr().out
    assert "The figure cannot be believed: train images failed" in said
    assert (tmp_path / "audit" / "audit.json").is_file() and (tmp_path / "audit" / "audit.md").is_file()
    assert cli.main([*flags, "--checks", "train mode"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["evaluate", "OWN", "--data", "digits"], "Give the budget as --eps, e.g. --eps 8/255"),
        (["evaluate", "OWN", "--eps", "0.1"], "Name the images as --data"),
        (["evaluate", "OWN", "--eps", "0.1", "--data", "nowhere"], "nowhere"),
        (["evaluate", "OWN", "--eps", "0.1", "--data", "digits", "--attacks", "pgd"], "attack should be one of"),
        (["evaluate", "OWN", "--eps", "0.1", "--data", "digits", "--attacks", "ddn"], "ddn exists for l2 only"),
        (["evaluate", "OWN", "--eps", "0.1", "--data", "digits", "--attacks", "transfer"], "needs a second model"),
        (["evaluate", "OWN", "--eps", "0.1", "--data", "digits", "--suite", "all"], "suite should be one of"),
        (["evaluate", "nothing", "--eps", "0.1", "--data", "digits"], "nothing"),
        (["audit", "OWN", "--eps", "0.1", "--data", "digits", "--checks", "vibes"], "vibes"),
        (["audit", "OWN", "--data", "digits"], "Give the budget as --eps"),
        (["zoo", "animals"], "zoo takes nothing, or attacks"),
    ],
)
def test_mistakes_in_an_evaluation_are_one_line(flags, message, own_model, capsys):
    assert cli.main([own_model if flag == "OWN" else flag for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_zoo_lists_every_attack(capsys):
    from robust_peft.attacks import ENTRIES

    assert cli.main(["zoo", "attacks"]) == 0
    said = capsys.readouterr().out
    assert len(ENTRIES) > 15 and all(entry.name in said and entry.source in said for entry in ENTRIES)


def test_images_of_other_classes_than_the_runs_are_refused(tmp_path, capsys):
    description = {"config": to_dict(PRESETS["quickstart"]), "classes": ["cat", "dog"]}
    write_json(tmp_path / "config.json", description)
    assert cli.main(["evaluate", str(tmp_path), "--data", "digits"]) == 2
    assert "was trained on 2 classes (cat, dog, ...), digits has 10" in capsys.readouterr().err
