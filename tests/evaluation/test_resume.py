"""Verdicts on disk: an evaluation that was interrupted anywhere ends as if it had not been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import robust_peft as rp
from robust_peft.attacks import suite
from robust_peft.data import ImageSet
from robust_peft.evaluation import evaluator

THREAT = rp.ThreatModel("linf", 0.1)
WIDER = rp.ThreatModel("linf", 0.2)
ATTACKS = ["fgsm", "pgd-3", "square-20"]


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def small_data(count=40, seed=3):
    images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = small_model()(images.double()).argmax(dim=1)
    return ImageSet(images, labels, ("a", "b", "c"), "noise")


def verdicts(report):
    return [(r.attack, r.threat, r.verdicts) for r in report.results]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, batches):
    """The attack raises in its so many-th batch."""
    left = iter(range(batches))
    make = suite.make_attack

    def making(name, threat, **options):
        if next(left, None) is None:
            raise Interrupted
        return make(name, threat, **options)

    monkeypatch.setattr(evaluator, "make_attack", making)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 4, 9])
def test_interrupted_and_gone_on_equals_uninterrupted(tmp_path, monkeypatch, batches, each):
    arguments = (small_model(), small_data(), [THREAT, WIDER], ATTACKS)
    options = {"batch_size": 7, "each": each}
    whole = rp.evaluate(*arguments, **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches)
        with pytest.raises(Interrupted):
            rp.evaluate(*arguments, **options, output=tmp_path)
    report = rp.evaluate(*arguments, **options, output=tmp_path)
    assert verdicts(report) == verdicts(whole)
    assert [r.forwards for r in report.results] == [r.forwards for r in whole.results]  # nothing was measured twice


def test_what_is_known_is_not_measured_again(tmp_path, monkeypatch):
    arguments = (small_model(), small_data(), [THREAT])
    first = rp.evaluate(*arguments, ATTACKS, output=tmp_path)
    interrupt_after(monkeypatch, 0)
    assert verdicts(rp.evaluate(*arguments, ATTACKS, output=tmp_path)) == verdicts(first)
    assert rp.evaluate(*arguments, ["fgsm"], output=tmp_path).find("fgsm", THREAT) == first.find("fgsm", THREAT)


def test_more_attacks_threats_and_samples_may_be_added(tmp_path):
    model, data = small_model(), small_data()
    rp.evaluate(model, data, [THREAT], ["fgsm"], limit=11, output=tmp_path, batch_size=5)
    grown = rp.evaluate(model, data, [THREAT, WIDER], ATTACKS, output=tmp_path, batch_size=5)
    assert verdicts(grown) == verdicts(rp.evaluate(model, data, [THREAT, WIDER], ATTACKS, batch_size=5))


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_that_was_cut_short_is_measured_again(tmp_path, cut):
    arguments = (small_model(), small_data(), [THREAT], ATTACKS)
    whole = rp.evaluate(*arguments, output=tmp_path, batch_size=7)
    lines = tmp_path / "verdicts-0.jsonl"
    for _ in range(3):  # a kill, going on, and another kill
        lines.write_bytes(lines.read_bytes()[:-cut])
        assert verdicts(rp.evaluate(*arguments, output=tmp_path, batch_size=7)) == verdicts(whole)


def test_a_time_limit_stops_between_batches_and_the_same_call_goes_on(tmp_path):
    arguments = (small_model(), small_data(), [THREAT], ATTACKS)
    report = rp.evaluate(*arguments, output=tmp_path, time_limit=0)
    assert not report.finished
    assert report.find("pgd-3", THREAT).verdicts == "?" * 40
    with pytest.raises(ValueError, match="clean is not finished: 40 of 40 samples have no verdict"):
        report.clean  # noqa: B018
    assert "not finished" in str(report) and "worst_case" in report.to_dict()
    assert verdicts(rp.evaluate(*arguments, output=tmp_path, time_limit=600)) == verdicts(rp.evaluate(*arguments))


def changed(data, how):
    if how == "shuffled":
        return data.subset(torch.arange(len(data)).flip(0), "noise")
    if how == "labels":
        return ImageSet(data.images, (data.labels + 1) % 3, data.classes, "noise")
    images = data.images.clone()
    images[17, 0, 0, 0] += 0.001
    return ImageSet(images, data.labels, data.classes, "noise")


@pytest.mark.parametrize("how", ["shuffled", "labels", "one pixel"])
def test_other_data_is_refused(tmp_path, how):
    data = small_data()
    rp.evaluate(small_model(), data, [THREAT], ["fgsm"], output=tmp_path)
    with pytest.raises(ValueError, match="Sample (0|17) is not the one that was evaluated before"):
        rp.evaluate(small_model(), changed(data, how), [THREAT], ["fgsm"], output=tmp_path)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"model": small_model(1)}, "model_sha256 was"),
        ({"save_images": True}, "save_images was False, is True"),
        ({"name": "else"}, "data was 'noise', is 'else'"),
    ],
)
def test_other_settings_are_refused(tmp_path, other, named):
    options = {"model": small_model(), "data": small_data(), "threats": [THREAT], "attacks": ["fgsm"]}
    rp.evaluate(**options, output=tmp_path)
    with pytest.raises(ValueError, match="was begun with something else") as error:
        rp.evaluate(**{**options, **other}, output=tmp_path)
    assert named in str(error.value)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty and holds no evaluation"):
        rp.evaluate(small_model(), small_data(), [THREAT], ["fgsm"], output=tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        rp.evaluate(small_model(), small_data(), [THREAT], ["fgsm"], output=tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# --- adversarial images on disk ---


def test_saved_images_are_the_broken_samples_and_hold(tmp_path):
    from robust_peft.evaluation.saved_images import load_images

    model, data = small_model(), small_data()
    report = rp.evaluate(model, data, [THREAT, WIDER], ATTACKS, output=tmp_path, save_images=True, batch_size=7)
    found = {}
    for saved in load_images(tmp_path):
        for index, adv_image in zip(saved.indices.tolist(), saved.adv_images, strict=True):
            found.setdefault((saved.attack, saved.threat), set()).add(index)
            # Without the evaluator: inside the ball, and wrong.
            assert (adv_image - data.images[index]).abs().max() <= saved.threat.eps + 1e-6
            assert model(adv_image[None]).argmax() != data.labels[index]
    for result in report.results[1:]:
        broken = {i for i, verdict in enumerate(result.verdicts) if verdict == "0"}
        assert found.get((result.attack, result.threat), set()) == broken
    assert sum(map(len, found.values())) > 5


def test_a_saved_image_that_does_not_hold_is_said(tmp_path):
    from safetensors.torch import load_file, save_file

    arguments = (small_model(), small_data(), [WIDER], ["pgd-3"])
    rp.evaluate(*arguments, output=tmp_path, save_images=True)
    (path,) = (tmp_path / "adversarial").iterdir()
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        described = file.metadata()
    tensors["adv_images"][0] = small_data().images[tensors["indices"][0]]  # the clean image fools nobody
    save_file(tensors, path, described)
    report = rp.evaluate(*arguments, output=tmp_path, save_images=True)
    index = int(tensors["indices"][0])
    assert report.rechecked is not None and f"; not pgd-3 L-inf 0.2 sample {index}" in report.rechecked
    assert "re-checked from the files" in str(report)


def test_where_nothing_is_broken_there_is_nothing_to_recheck(tmp_path):
    nothing = rp.ThreatModel("linf", 0.0)
    report = rp.evaluate(small_model(), small_data(), [nothing], ["pgd-2"], output=tmp_path, save_images=True)
    assert report.rechecked is not None and "0 of 0 hold" in report.rechecked


def test_a_forward_pass_that_changed_is_refused(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.model, self.scale = small_model(), scale

        def forward(self, images):
            return self.scale * self.model(images)

    arguments = (small_data(), [THREAT], ["fgsm"])
    rp.evaluate(Scaled(1.0), *arguments, output=tmp_path)
    with pytest.raises(ValueError, match="begun with a model that answers otherwise"):
        rp.evaluate(Scaled(1e6), *arguments, output=tmp_path)  # the same weights


def test_buffers_that_are_not_saved_belong_to_the_model(tmp_path):
    models = [rp.Normalized(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), [m] * 3, [1.0] * 3) for m in (0.0, 0.5)]
    models[1].load_state_dict(models[0].state_dict())
    rp.evaluate(models[0], small_data(), [THREAT], ["fgsm"], output=tmp_path)
    with pytest.raises(ValueError, match="model_sha256 was"):
        rp.evaluate(models[1], small_data(), [THREAT], ["fgsm"], output=tmp_path)


def test_a_row_does_not_depend_on_what_the_folder_was_used_for_before(tmp_path):
    model, data = small_model(), small_data()
    rp.evaluate(model, data, [WIDER], ["fgsm"], output=tmp_path)
    later = rp.evaluate(model, data, [WIDER], ["apgd-ce-10", "fgsm"], output=tmp_path)
    assert verdicts(later) == verdicts(rp.evaluate(model, data, [WIDER], ["apgd-ce-10", "fgsm"]))
    assert "." in later.find("fgsm", WIDER).verdicts


def test_data_that_changes_each_time_is_refused():
    class Jittered(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.rand(3, 4, 4), 0

    with pytest.raises(ValueError, match="is another one each time that it is fetched"):
        rp.evaluate(small_model(), Jittered(), [THREAT], ["fgsm"])


def test_transfer_may_be_added_and_belongs_to_its_source(tmp_path):
    model, data = small_model(), small_data()
    rp.evaluate(model, data, [WIDER], ["fgsm"], output=tmp_path)
    names = ["transfer-5"]
    found = [rp.evaluate(model, data, [WIDER], names, output=tmp_path, transfer_from=small_model(s)) for s in (0, 7)]
    fresh = [rp.evaluate(model, data, [WIDER], names, transfer_from=small_model(s)) for s in (0, 7)]
    assert [verdicts(r) for r in found] == [verdicts(r) for r in fresh] and verdicts(found[0]) != verdicts(found[1])


def test_saving_needs_a_folder():
    with pytest.raises(ValueError, match="save_images needs output"):
        rp.evaluate(small_model(), small_data(), [THREAT], ["fgsm"], save_images=True)


# --- kill -9 ---

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, test_resume as t, robust_peft as rp
torch.set_num_threads(1)
model, data = t.small_model(), t.small_data(300)
print("ready", flush=True)
report = rp.evaluate(model, data, [t.THREAT, t.WIDER], t.KILLED, output=sys.argv[2], batch_size=8, save_images=True)
report.save(sys.argv[3])
"""
KILLED = ["pgd-20", "apgd-ce-20", "square-1000"]


@pytest.mark.slow  # half a minute, most of it imports; interruption by an exception above is the fast twin
def test_killed_ten_times_at_random_moments(tmp_path):
    moments = random.Random(0)
    arguments = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "killed")]
    report = tmp_path / "report.json"
    kills = 0
    while not report.exists():
        process = subprocess.Popen([*arguments, str(report)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        if kills < 10:
            time.sleep(moments.uniform(0, 0.5))
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
            process.wait()
        else:
            assert process.wait() == 0
        process.stdout.close()
    assert kills == 10
    uninterrupted = rp.evaluate(small_model(), small_data(300), [THREAT, WIDER], KILLED, batch_size=8)
    assert verdicts(rp.evaluation.Report.load(report)) == verdicts(uninterrupted)
    lines = (tmp_path / "killed" / "verdicts-0.jsonl").read_bytes().split(b"\n")
    assert sum(1 for line in lines if line and json.loads(line)["job"] == "clean") == 38  # no batch twice
