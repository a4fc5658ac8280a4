"""The paper's experiments as studies: what each of them would run, beside the paper's text and the page about them."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from robust_peft.attacks.suite import check_attack_name
from robust_peft.cli import studying
from robust_peft.cli.flags import parse
from robust_peft.presets import get_preset
from robust_peft.studies import built_in_studies, load_study
from robust_peft.studies.paper.setups import SCALES
from robust_peft.studies.work import attacks_by_norm

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "paper_studies.md").read_text(encoding="utf-8")
NAMES = [name for name in built_in_studies() if name.startswith("paper/")]
FIGURES = ("fig1", "fig3", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10", "fig11", "fig12")
TABLES = ("table1", "table2", "table3", "table4", "table5")
PEFT = ("paper/fig4", "paper/fig5")


def rows_of_the_page():
    """Study's name -> the row's cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    return {found[1]: row for row in rows if (found := re.fullmatch(r"`(paper/\w+)`", row[1]))}


def panels(study):
    """Panel's name -> its first point's config."""
    return {point.panel_name: point.config for point in reversed(study.points())}


def lambdas_and_gammas(study):
    configs = [point.config.surgery for point in study.points()]
    by_name = {name: {c for c in configs if c.name == name} for name in ("vanilla", "ca-at")}
    return sorted({c.lam for c in by_name["vanilla"]}), sorted({c.gamma for c in by_name["ca-at"]})


def test_all_experiments_are_there_and_on_the_page():
    assert sorted(NAMES) == sorted(f"paper/{name}" for name in (*FIGURES, *TABLES))
    assert set(rows_of_the_page()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_tells_the_true_numbers_of_runs(name):
    row = rows_of_the_page()[name]
    assert [int(cell) for cell in row[3:5]] == [len(load_study(name, scale).points()) for scale in ("paper", "tiny")]
    kind, number = re.fullmatch(r"paper/(fig|table)(\d+)", name).groups()
    assert row[0] == f"{'Fig.' if kind == 'fig' else 'Table'} {number}"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_another_one_and_can_be_measured(name, scale):
    study = load_study(name, scale)
    points = study.points()
    assert study.name == f"{name.replace('/', '-')}-{scale}" and study.question.endswith("?")
    assert len({point.key for point in points}) == len({point.folder for point in points}) == len(points)
    # gamma 1 is Vanilla(0): nobody trains it twice.
    assert all(point.config.surgery.gamma != 1 for point in points)
    for measurement in filter(None, (study.measure, study.confirm)):
        assert all(check_attack_name(attack) == attack for attack in measurement.attacks)
        assert attacks_by_norm(measurement.attacks, ["linf", *(norm for norm, _ in measurement.budgets("linf"))])
    assert study.measure.split == "validation" or (study.measure.each and study.measure.limit)
    # Of test images nothing is chosen; fig3 is about the conflict alone.
    assert (study.confirm is None) == (name in ("paper/fig3", "paper/table2", "paper/table3"))
    if study.confirm is not None:
        assert (study.confirm.attacks == ("clean", "autoattack") and study.confirm.audit) == (scale == "paper")
        assert study.confirm.split == "test"


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_scale_needs_no_download_and_is_small(name):
    study = load_study(name, "tiny")
    for config in (point.config for point in study.points()):
        assert config.data.name == "digits" and config.data.limit <= 1000 and config.optim.epochs <= 3
        embedded = config.backbone.name == "micro_swin" and config.backbone.checkpoint is None
        random = config.backbone.checkpoint == "random" and config.backbone.width in (4, 8)
        assert embedded if name in PEFT else random
    for measurement in filter(None, (study.measure, study.confirm)):
        assert measurement.limit <= 50 and "autoattack" not in measurement.attacks


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(PEFT)))
def test_training_from_scratch_is_section_5_1_s(name):
    for config in (point.config for point in load_study(name, "paper").points()):
        varied = {"paper/fig12": {"lr", "batch"}, "paper/fig8": {"eps"}}.get(name, set())
        if name not in ("paper/fig3", "paper/table2"):
            assert config.attack.name == "pgd"
        if config.attack.name in ("pgd", "pgd-dlr"):
            assert (config.attack.steps, config.attack.step_size) == (10, "2/255")
        assert config.threat.norm == "linf" and ("eps" in varied or config.threat.eps == "8/255")
        assert (config.optim.optimizer, config.optim.momentum, config.optim.epochs) == ("sgd", 0.9, 200)
        assert config.optim.schedule == "onecycle" and ("lr" in varied or config.optim.lr == 0.4)
        assert "batch" in varied or config.data.batch_size == 1024
        assert config.data.augment and config.data.rotation > 0 and config.data.name in ("cifar10", "cifar100")
        assert config.backbone.bn == "batch" and config.adapter.name == "full"
        assert config.validation.keep == "last"


@pytest.mark.parametrize(
    ("names", "lambdas", "gammas"),
    [
        (("fig3",), [0.5, 1], [0.8, 0.9]),
        (("fig4", "fig5"), [0, 0.5, 1], [0.8, 0.9, 1]),
        (("fig6", "fig7", "fig9", "fig10", "fig11"), [0, 0.25, 0.5, 0.75, 1], [0.7, 0.75, 0.8, 0.85, 0.9, 1]),
        (("fig1", "fig8", "fig12", "table1", "table4", "table5"), [0.5], [0.8]),
        (("table3",), [0, 0.5], [0.8]),
        (("table2",), [0.5], [0.8, 0.9]),
    ],
)
def test_lambdas_and_gammas_are_the_paper_s(names, lambdas, gammas):
    for name in names:
        found = lambdas_and_gammas(load_study(f"paper/{name}", "paper"))
        assert found == (lambdas, [gamma for gamma in gammas if gamma != 1])


def test_fine_tuning_is_what_the_presets_have():
    fig4, fig5 = (panels(load_study(name, "paper")) for name in PEFT)
    presets = {"CUB-200": "cub_swin", "Stanford Dogs": "dogs_swin", "CIFAR-10": "cifar_swin"}
    assert [*fig4] == ["CIFAR-100", "CIFAR-10", "Stanford Dogs", "CUB-200"] and [*fig5] == ["Stanford Dogs"]
    pairs = [(fig4[panel], get_preset(name)) for panel, name in presets.items()]
    hundred = get_preset("cifar_swin")
    pairs.append((fig4["CIFAR-100"], replace(hundred, data=replace(hundred.data, name="cifar100"))))
    pairs.append((fig5["Stanford Dogs"], get_preset("dogs_vit")))
    for config, preset in pairs:
        same = {"surgery": preset.surgery, "evaluation": preset.evaluation, "seed": preset.seed}
        assert replace(config, **same) == preset
        assert (config.adapter.name, config.adapter.reduction_factor) == ("bottleneck", 8)
        assert (config.attack.steps, config.attack.step_size, config.threat.eps) == (10, "2/255", "8/255")


def test_panels_at_the_paper_s_scale():
    def found(name, *values):
        return [
            tuple(value(config) for value in values) for config in panels(load_study(f"paper/{name}", "paper")).values()
        ]

    def network(config):
        return config.backbone.name

    def data(config):
        return config.data.name

    def loss(config):
        return config.loss.name

    def solver(config):
        return config.attack.name

    assert set(found("fig3", data, network, solver)) == {
        *((images, net, "pgd") for images in ("cifar10", "cifar100") for net in ("resnet18", "resnet34")),
        *(("cifar10", "resnet18", attack) for attack in ("apgd", "apgd-dlr", "t-apgd-dlr")),
    }
    assert set(found("fig6", data, network, loss)) == {("cifar10", "resnet18", n) for n in ("ce", "trades", "clp")}
    assert set(found("fig7", data, network, loss)) == {("cifar100", n, "ce") for n in ("resnet18", "resnet34")}
    for name, own in (("fig9", "ce"), ("fig10", "trades"), ("fig11", "clp")):
        assert set(found(name, data, network, loss)) == {("cifar10", n, own) for n in ("resnet34", "wrn28_10")}
    assert {eps for (eps,) in found("fig8", lambda c: c.threat.eps)} == {"8/255", "12/255", "16/255"}
    assert set(found("fig12", lambda c: c.optim.lr, lambda c: c.data.batch_size)) == {
        *((rate, 1024) for rate in (0.1, 0.2, 0.4, 0.8)),
        *((0.4, batch) for batch in (256, 512, 2048)),
    }
    assert set(found("table2", network, solver)) == {("resnet18", "pgd"), ("resnet18", "pgd-dlr")}
    for name, own in (("table1", "ce"), ("table3", "ce"), ("table4", "ce"), ("table5", "mart")):
        assert set(found(name, data, network, loss)) == {("cifar10", n, own) for n in ("resnet18", "resnet34")}


def test_models_in_common_have_one_folder():
    folders = {name: {point.folder for point in load_study(f"paper/{name}", "paper").points()} for name in
               ("fig1", "table1", "table3", "table4")}  # fmt: skip
    assert folders["fig1"] < folders["table1"] == folders["table4"] < folders["table3"]


@pytest.mark.parametrize("name", NAMES)
def test_another_scale_is_refused(name):
    with pytest.raises(ValueError, match="scale should be one of tiny, paper. Found scale = 'huge'"):
        load_study(name, "huge")
    with pytest.raises(ValueError, match="comes in several scales"):
        load_study(name)


def test_the_page_s_commands():
    (block,) = re.findall(r"```\n(.*?)```", PAGE, re.S)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [command[:3] for command in commands] == [["robust-peft", "study", name] for name in ("run", "report")]
    for command, kind in zip(commands, (studying.Run, studying.Reported), strict=True):
        parsed = parse(kind, command[3:], prog="robust-peft study")
        assert load_study(parsed.source, parsed.scale).name == "paper-fig6-tiny"


def test_the_page_s_python():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    found = {}
    exec(compile(code, "paper_studies.md", "exec"), found)
    points = found["study"].points()
    assert len(points) == 180
    assert {(point.config.backbone.bn, point.config.data.root) for point in points} == {("running", "cifar-10")}
