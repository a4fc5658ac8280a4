"""From a config to a run folder and back: what is written, what is loaded, what is refused."""

import dataclasses
import json
from importlib import metadata

import peft
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

import robust_peft as rp
from robust_peft import config as configs
from robust_peft.config import (
    AdapterConfig,
    AttackConfig,
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    OptimConfig,
    RunConfig,
    ValidationConfig,
)
from robust_peft.data import Splits
from robust_peft.evaluation import Report
from robust_peft.models import zoo
from robust_peft.models.micro_swin import micro_swin
from robust_peft.runs import parts as run_parts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch):
    """The embedded architecture, narrow, so that a run takes a second; and the digits without their package."""

    def narrow(num_classes=10, *, image_size=32, **_):
        return micro_swin(num_classes, image_size=image_size, width=16, depths=(1, 1), num_heads=(1, 2))

    monkeypatch.setattr(zoo, "micro_swin", narrow)
    generator = torch.Generator().manual_seed(0)

    def images(count, name):
        labels = torch.arange(count) % 4
        noise = torch.randint(0, 90, (count, 3, 32, 32), generator=generator)
        return rp.data.ImageSet((noise + 50 * labels[:, None, None, None]).to(torch.uint8), labels, tuple("abcd"), name)

    parts = Splits(images(32, "train"), images(8, "validation"), images(12, "test"))
    monkeypatch.setattr(run_parts, "load_splits", lambda name, **_: parts)
    return RunConfig(
        backbone=BackboneConfig(checkpoint="random"),
        attack=AttackConfig(steps=1),
        data=DataConfig(batch_size=8),
        optim=OptimConfig(epochs=2, lr=1e-2),
        validation=ValidationConfig(steps=1),
        evaluation=EvaluationConfig(attacks=("clean", "pgd-2"), batch_size=5),
        precision="fp32",
    )


def probe_images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", configs.ADAPTER_PARAMETERS)
def test_a_run_folder_is_complete_and_gives_the_trained_model_back(small, tmp_path, method):
    config = dataclasses.replace(small, adapter=AdapterConfig(name=method))
    result = rp.run(config, tmp_path / "run", progress=False)
    assert result.finished and result.fit.steps == 8
    written = {path.name for path in (tmp_path / "run").iterdir()}
    weights = "model.safetensors" if method == "full" else "adapter"
    assert written == {"config.json", "metrics.jsonl", weights, "state", "evaluation", "evaluation.json", "README.md"}
    description = json.loads((tmp_path / "run" / "config.json").read_text())
    assert description["versions"]["torch"] == metadata.version("torch")
    assert description["classes"] == list("abcd")
    assert description["images"] == {"train": 32, "validation": 8, "test": 12}

    model = rp.load_run(tmp_path / "run")
    assert not model.training
    torch.testing.assert_close(model(probe_images()), result.model(probe_images()), rtol=0, atol=0)
    report = Report.load(tmp_path / "run" / "evaluation.json")
    threat = rp.ThreatModel("linf", "8/255")
    assert report.clean.total == report[threat, "pgd-2"].total == 12
    again = rp.evaluate(model, run_parts.load_splits("digits").test, [threat], ["pgd-2"], batch_size=12)
    assert again.clean == report.clean
    card = (tmp_path / "run" / "README.md").read_text()
    assert str(report[threat, "pgd-2"]) in card and "load_run" in card


def test_peft_itself_loads_the_adapter(small, tmp_path):
    result = rp.run(small, tmp_path / "run", progress=False)
    base = run_parts.build_backbone(small, 4)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    torch.testing.assert_close(loaded(probe_images()), result.model(probe_images()), rtol=0, atol=0)


def test_interrupted_and_resumed_equals_uninterrupted(small, tmp_path):
    whole = rp.run(small, tmp_path / "whole", progress=False)
    piece = rp.run(small, tmp_path / "pieces", time_limit=0.0, progress=False)
    assert not piece.finished and piece.report is None
    with pytest.raises(FileNotFoundError, match="is not finished"):
        rp.load_run(tmp_path / "pieces")
    resumed = rp.run(small, tmp_path / "pieces", resume=True, progress=False)
    assert resumed.finished
    torch.testing.assert_close(resumed.model(probe_images()), whole.model(probe_images()), rtol=0, atol=0)
    assert resumed.report == whole.report


@pytest.mark.parametrize("head_init", ["random", "linear-probe", "robust-linear-probe", "keep"])
def test_heads(small, head_init):
    config = dataclasses.replace(small, adapter=AdapterConfig(head_init=head_init, head_epochs=3))
    splits = run_parts.load_splits("digits")
    backbone = run_parts.build_backbone(config, 4)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    run_parts.initialise_head(backbone, config, splits, None, 0, progress=False)
    after = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    head = "backbone.head.fc."
    assert all(name.startswith(head) for name in changed)
    assert (head + "weight" in changed) == (head_init != "keep")
    assert all(type(module).__module__.split(".")[0] != "peft" for module in backbone.modules())
    if head_init.endswith("probe"):
        # A probe has learnt something that a random head has not.
        images = splits.train.images.float() / 255
        losses = []
        for weights in (before, after):
            backbone.load_state_dict(weights, strict=False)
            with torch.no_grad():
                losses.append(torch.nn.functional.cross_entropy(backbone(images), splits.train.labels).item())
        assert losses[1] < losses[0]


def test_a_probe_is_kept_by_the_run_and_by_load_run(small, tmp_path):
    config = dataclasses.replace(small, adapter=AdapterConfig(head_init="robust-linear-probe", head_epochs=1))
    result = rp.run(config, tmp_path / "run", progress=False)
    torch.testing.assert_close(
        rp.load_run(tmp_path / "run")(probe_images()), result.model(probe_images()), rtol=0, atol=0
    )


# --- what is refused, each in one line ---


def refusal(*arguments, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        rp.run(*arguments, progress=False, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_that_holds_a_run(small, tmp_path):
    rp.run(small, tmp_path / "run", time_limit=0.0, progress=False)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "holds a run" in refusal(small, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert rp.run(small, tmp_path / "run", overwrite=True, progress=False).finished


def test_a_folder_that_holds_something_else_is_never_emptied(small, tmp_path):
    (tmp_path / "thesis.tex").write_text("my work")
    for overwrite in (False, True):
        assert "is not empty and holds no run" in refusal(small, tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "my work"


def test_a_mistake_does_not_cost_the_run_that_is_there(small, tmp_path):
    rp.run(small, tmp_path / "run", progress=False)
    broken = dataclasses.replace(small, backbone=BackboneConfig(checkpoint="nowhere.safetensors"))
    assert "nowhere.safetensors does not exist" in refusal(broken, tmp_path / "run", overwrite=True)
    blocks = dataclasses.replace(small, adapter=AdapterConfig(blocks=(99,)))
    refusal(blocks, tmp_path / "run", overwrite=True)
    rp.load_run(tmp_path / "run")


def test_a_run_killed_before_its_first_state_starts_afresh(small, tmp_path):
    rp.run(small, tmp_path / "run", time_limit=0.0, progress=False)
    (tmp_path / "run" / "state" / "last.pt").unlink()
    assert rp.run(small, tmp_path / "run", resume=True, progress=False).fit.steps == 8


def test_a_backbone_that_changed_under_its_adapter_is_noticed(small, tmp_path):
    rp.run(small, tmp_path / "run", progress=False)
    path = tmp_path / "run" / "config.json"
    description = json.loads(path.read_text())
    description["config"]["seed"] = 1  # the random backbone of another seed
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="are not those that"):
        rp.load_run(tmp_path / "run")


def test_overwrite_removes_only_what_a_run_writes(small, tmp_path):
    rp.run(small, tmp_path / "run", time_limit=0.0, progress=False)
    (tmp_path / "run" / "notes.txt").write_text("keep me")
    rp.run(small, tmp_path / "run", overwrite=True, progress=False)
    assert (tmp_path / "run" / "notes.txt").read_text() == "keep me"


def test_a_folder_in_use(small, tmp_path):
    with FileLock(str(tmp_path / ".run.lock")):
        assert "Another process is writing" in refusal(small, tmp_path / "run")
    assert rp.run(small, tmp_path / "run", progress=False).finished


def test_resuming_with_other_settings(small, tmp_path):
    rp.run(small, tmp_path / "run", time_limit=0.0, progress=False)
    other = dataclasses.replace(small, optim=dataclasses.replace(small.optim, lr=0.5))
    assert "started with other settings: optim.lr: 0.01 -> 0.5" in refusal(other, tmp_path / "run", resume=True)


def test_resuming_nothing(small, tmp_path):
    assert "holds no run to resume" in refusal(small, tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        rp.load_run(tmp_path / "run")


def test_an_unknown_attack_is_refused_before_training(small, tmp_path):
    config = dataclasses.replace(small, evaluation=EvaluationConfig(attacks=("clean", "autopgd-x")))
    assert "attack should be one of" in refusal(config, tmp_path / "run")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_another_checkpoint_than_the_one_trained_on(small, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    backbone = run_parts.build_backbone(small, 4).backbone
    save_file({k: v.contiguous() for k, v in backbone.state_dict().items()}, path)
    config = dataclasses.replace(small, backbone=BackboneConfig(checkpoint=str(path)))
    result = rp.run(config, tmp_path / "run", progress=False)
    torch.testing.assert_close(
        rp.load_run(tmp_path / "run")(probe_images()), result.model(probe_images()), rtol=0, atol=0
    )
    save_file({k: v.contiguous() + 1 for k, v in backbone.state_dict().items()}, path)
    with pytest.raises(ValueError, match="its hash differs"):
        rp.load_run(tmp_path / "run")


def test_the_probe_is_interrupted_and_resumed_too(small, tmp_path):
    config = dataclasses.replace(small, adapter=AdapterConfig(head_init="robust-linear-probe", head_epochs=2))
    whole = rp.run(config, tmp_path / "whole", progress=False)
    pieces = rp.run(config, tmp_path / "pieces", time_limit=0.0, progress=False)
    count = 1
    while not pieces.finished:  # each piece is one step: of the probe first, of the adapters then
        assert not (tmp_path / "pieces" / "adapter").exists()
        pieces = rp.run(config, tmp_path / "pieces", resume=True, time_limit=0.0, progress=False)
        count += 1
        assert count < 30
    assert count > 12  # 8 steps of the probe, 8 of the run
    torch.testing.assert_close(pieces.model(probe_images()), whole.model(probe_images()), rtol=0, atol=0)
    assert pieces.report == whole.report
    assert len((tmp_path / "whole" / "probe" / "metrics.jsonl").read_text().splitlines()) == 8


FACTORY = """
import torch
from robust_peft.models.micro_swin import micro_swin


def build(num_classes=4):
    torch.manual_seed({seed})
    return micro_swin(num_classes, width=16, depths=(1, 1), num_heads=(1, 2))
"""


def test_resuming_on_another_backbone_is_refused_at_once(small, tmp_path):
    (tmp_path / "net.py").write_text(FACTORY.format(seed=0))
    backbone = BackboneConfig(name=f"{tmp_path / 'net.py'}:build")
    config = dataclasses.replace(small, backbone=backbone)
    rp.run(config, tmp_path / "run", time_limit=0.0, progress=False)
    (tmp_path / "net.py").write_text(FACTORY.format(seed=1))
    with pytest.raises(ValueError, match="backbone's weights are not those"):
        rp.run(config, tmp_path / "run", resume=True, progress=False)
    (tmp_path / "net.py").write_text(FACTORY.format(seed=0))
    assert rp.run(config, tmp_path / "run", resume=True, progress=False).finished
    rp.load_run(tmp_path / "run")
    (tmp_path / "net.py").write_text(FACTORY.format(seed=0) + "\nprint('edited')\n")
    with pytest.raises(ValueError, match="net.py is not the file"):
        rp.load_run(tmp_path / "run")


def test_python_inside_a_run_folder_is_not_executed(small, tmp_path):
    """A run folder may come from somebody else."""
    (tmp_path / "net.py").write_text(FACTORY.format(seed=0))
    config = dataclasses.replace(small, backbone=BackboneConfig(name=f"{tmp_path / 'net.py'}:build"))
    rp.run(config, tmp_path / "run", progress=False)
    description = json.loads((tmp_path / "run" / "config.json").read_text())
    inside = tmp_path / "run" / "net.py"
    inside.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'executed')!r}).touch()\n")
    description["config"]["backbone"]["name"] = f"{inside}:build"
    description["factory_sha256"] = None
    (tmp_path / "run" / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="inside the run folder"):
        rp.load_run(tmp_path / "run")
    assert not (tmp_path / "executed").exists()


def test_a_whole_model_needs_no_starting_checkpoint(small, tmp_path):
    start = run_parts.build_backbone(small, 4)
    save_file(start.backbone.state_dict(), tmp_path / "start.safetensors")
    backbone = BackboneConfig(checkpoint=str(tmp_path / "start.safetensors"))
    config = dataclasses.replace(small, backbone=backbone, adapter=AdapterConfig(name="full"))
    trained = rp.run(config, tmp_path / "run", progress=False).model
    (tmp_path / "start.safetensors").unlink()
    torch.testing.assert_close(rp.load_run(tmp_path / "run")(probe_images()), trained(probe_images()), rtol=0, atol=0)


def test_loading_a_run_says_nothing_of_the_head_that_it_replaces(small, tmp_path, caplog):
    other = micro_swin(7, width=16, depths=(1, 1), num_heads=(1, 2))
    save_file(other.state_dict(), tmp_path / "seven.safetensors")
    config = dataclasses.replace(small, backbone=BackboneConfig(checkpoint=str(tmp_path / "seven.safetensors")))
    rp.run(config, tmp_path / "run", progress=False)
    assert "its head for 7 classes is left out" in caplog.text
    caplog.clear()
    rp.load_run(tmp_path / "run")
    assert caplog.text == ""
