"""The paper's tables and figures from made-up records: each number where it belongs, and the paper's beside it."""

import importlib
import json
import re
from dataclasses import replace

import pytest

from robust_peft.studies.paper import figures, published, tables
from robust_peft.studies.paper.published import (
    CA_AT,
    MEAN,
    STANDARD,
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    TABLE_5,
    VANILLA,
)
from robust_peft.studies.report import write_report

TABLES = {"table1": TABLE_1, "table2": TABLE_2, "table3": TABLE_3, "table4": TABLE_4, "table5": TABLE_5}


class Experiment:
    """A figure's or table's module and study, with made-up records of it."""

    def __init__(self, name, folder, made_up, scale="paper"):
        self.module = importlib.import_module(f"robust_peft.studies.paper.{name}")
        self.study = self.module.study(scale)
        self.records = made_up.records(self.study, folder)
        self.folder = folder

    def sections(self):
        return self.study.extra(self.study, self.records, self.folder)

    def section(self):
        (section,) = self.sections()
        return section


@pytest.fixture
def experiment(tmp_path, made_up):
    """A function that makes the experiment of that name; ``scale`` as in `Experiment`."""
    return lambda name, scale="paper": Experiment(name, tmp_path, made_up, scale)


def texts(path):
    """matplotlib writes each text as a comment beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def percent(count, of):
    return f"{100 * count / of:.2f} "


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_of_a_table(name, experiment, made_up):
    made = experiment(name)
    study, section = made.study, made.section()
    (table,) = section.blocks
    threats = getattr(made.module, "THREATS", ("",))
    points = {(point.panel_name, point.method.name): point for point in study.points()}
    assert len(table.rows) == len(points) * len(threats)
    seen = 0
    for row in table.rows:
        point, threat = points[row[:2]], row[2] if threats != ("",) else ""
        cells = dict(zip(table.header, row, strict=True))
        own = TABLES[name].get((*row[:2], threat), {})
        wanted = {f"{STANDARD}, %": (made_up.right(point, "clean", ""), own.get(STANDARD))}
        for column in made.module.COLUMNS:
            title = f"{column.title}, {column.threat}, %" if column.threat else f"{column.title}, %"
            (attack,) = [a for a in study.measure.attacks if tables.short(a) == column.attack]
            wanted[title] = (made_up.right(point, attack, column.threat or threat), own.get(column.title))
        for title, (count, of_paper) in wanted.items():
            assert cells[title].startswith(percent(count, made_up.images)), title
            assert cells[title].endswith("]" if of_paper is None else f" (paper: {100 * of_paper:.2f})")
        counts = [count for count, _ in wanted.values()]
        if threats != ("",):  # the same images are right first under every attack
            assert cells[f"{tables.WORST}, %"].startswith(percent(min(counts), made_up.images))
        if name == "table2":
            mean = sum(counts[1:]) / len(counts[1:])
            assert cells[f"{MEAN}, %"].startswith(f"{100 * mean / made_up.images:.2f}")
        assert [link.path for link in row[-1]] == [f"runs/{point.folder}"]
        seen += sum("(paper: " in cell for cell in row[:-1])
    assert seen == sum(len(values) for values in TABLES[name].values()) > 20


@pytest.mark.parametrize("name", TABLES)
def test_a_tiny_table_has_the_same_attacks_and_none_of_the_paper_s_numbers(name, experiment):
    (table,) = experiment(name, "tiny").section().blocks
    (whole,) = experiment(name).section().blocks
    assert table.header == tuple(title for title in whole.header if "AutoAttack" not in title)
    assert not any("(paper: " in cell for row in table.rows for cell in row[:-1])


def test_several_seeds_are_a_mean_with_their_spread(experiment, made_up, tmp_path):
    made = experiment("table5")
    study = replace(made.study, seeds=(0, 1))
    (section,) = study.extra(study, made_up.records(study, tmp_path), tmp_path)
    first = section.blocks[0].rows[0]
    counts = [made_up.right(p, "clean", "") for p in study.points() if (p.panel_name, p.method.name) == first[:2]]
    assert first[2].startswith(f"{100 * sum(counts) / 2 / made_up.images:.2f} [")
    assert [link.text for link in first[-1]] == ["0", "1"]


@pytest.mark.parametrize("name", [*TABLES, "fig1", "fig3", "fig8", "fig12"])
def test_nothing_measured_gives_nothing(name, experiment, tmp_path):
    made = experiment(name)
    waiting = [replace(record, status="waiting", measured=()) for record in made.records]
    assert made.study.extra(made.study, waiting, tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["table1", "fig1"])
def test_the_report_has_the_sections_before_the_cost(name, experiment, tmp_path):
    made = experiment(name)
    page = write_report(made.study, made.records, tmp_path).read_text()
    (own,) = re.findall(rf"<h2[^>]*>{re.escape(made.section().title)}", page)
    last_panel = max(page.index(panel) for panel in re.findall(r"<h2[^>]*>[^<]*: search", page))
    assert last_panel < page.index(own) < page.index(">Where the numbers come from<")
    budgets = "at the run&#x27;s own budget and at 16/255, 24/255, 32/255."
    assert (budgets in page) == (name == "table1")


def test_the_paper_s_tables_agree_with_one_another():
    """What it prints twice is the same number here: a slip in copying it would show."""
    common = ("PGD", "AutoPGD", "MI-FGSM", "FAB", "T-FAB", "FGSM", STANDARD)
    own, first = TABLE_2["ResNet-18, PGD", CA_AT, ""], TABLE_1["ResNet-18", CA_AT, "L-inf 8/255"]
    assert [own[name] for name in common] == [first[name] for name in common]
    fourth = TABLE_4["ResNet-18", CA_AT, "L2 0.5"]
    assert [own[f"{name}-L2"] for name in ("PGD", "AutoPGD", "T-AutoPGD")] == [*fourth.values()]
    for network in ("ResNet-18", "ResNet-34"):
        for method in (VANILLA, CA_AT):
            assert TABLE_3[network, method, ""][STANDARD] == TABLE_1[network, method, "L-inf 8/255"][STANDARD]
    for row in TABLE_2.values():
        attacks = [value for name, value in row.items() if name not in (STANDARD, MEAN)]
        assert len(attacks) == 11 and sum(attacks) / 11 == pytest.approx(row[MEAN], abs=2e-4)
    assert TABLE_1["ResNet-34", VANILLA, "L-inf 32/255"]["FGSM"] == 0.088
    assert TABLE_5["ResNet-34", CA_AT, ""]["PGD"] == 0.8466 > TABLE_5["ResNet-34", CA_AT, ""]["FGSM"]
    assert all(0 < value < 1 for table in TABLES.values() for row in table.values() for value in row.values())
    assert set(published.TABLE_3) == {(n, m, "") for n in ("ResNet-18", "ResNet-34") for m in
                                      ("vanilla (lam 0.0)", VANILLA, CA_AT)}  # fmt: skip


def test_bars(experiment, made_up):
    made = experiment("fig1")
    figure, table = made.section().blocks
    shown = texts(made.folder / figure.path)
    for words in ("standard", "pgd-20", "autoattack", "vanilla", "CA-AT", "ResNet-18"):
        assert words in shown, words
    for point in made.study.points():
        attacks = made.study.measure.attacks
        counts = [made_up.right(point, a, "" if a == "clean" else "L-inf 8/255") for a in attacks]
        cells = [row[2] for row in table.rows if row[0] == point.method.name]
        assert len(cells) == 3
        assert all(cell.startswith(percent(n, made_up.images)) for cell, n in zip(cells, counts, strict=True))
        assert {f"{100 * n / made_up.images:.1f}" for n in counts} <= set(shown)


def write_metrics(record, values):
    """A log with two steps for each epoch's (mu, cos), a skipped step and a validation."""
    record.folder.mkdir(parents=True)
    lines = []
    for epoch, (mu, cos) in enumerate(values):
        for sign in (-1, 1):
            lines.append({"kind": "train", "epoch": epoch, "mu": mu * (1 + sign / 2), "cos": cos + sign / 8})
        lines += [{"kind": "train", "epoch": epoch, "mu": None, "cos": None}]
        lines += [{"kind": "validation", "epoch": epoch + 1, "mean_accuracy": 0.5}]
    (record.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_conflict_by_epoch(experiment):
    record = experiment("fig3").records[0]
    write_metrics(record, [(2.0, 0.25), (4.0, 0.5)])
    assert figures.conflict_by_epoch(record.folder / "metrics.jsonl") == [(2.0, 0.25), (4.0, 0.5)]


def test_conflict_over_epochs(experiment):
    made = experiment("fig3")
    for place, record in enumerate(made.records):
        write_metrics(record, [(2.0 + place, 0.25), (4.0 + place, 0.5), (9.0 + place, 0.75)])
    sections = made.sections()
    names = list(dict.fromkeys(point.panel_name for point in made.study.points()))
    assert [section.title for section in sections] == [f"Fig. 3: {name}" for name in names] and len(names) == 7
    figure, table = sections[1].blocks
    assert table.rows[2][:6] == ("CA-AT (gamma 0.8)", "8", "15", "11", "0.500", "3")
    assert [link.path for link in table.rows[2][6]] == [f"runs/{made.records[6].folder.name}"]
    shown = texts(made.folder / figure.path)
    for words in ("mu", "cosine", "epoch, from 0", names[1], *(record.method for record in made.records[:4])):
        assert words in shown, words


def test_accuracy_over_budgets(experiment, made_up):
    made = experiment("fig8")
    blocks = made.section().blocks
    assert [type(block).__name__ for block in blocks] == ["Figure", "Table"] * 3
    point = next(p for p in made.study.points() if p.panel_name == "trained at 12/255")
    for attack, table in zip(made.study.measure.attacks[1:], blocks[1::2], strict=True):
        rows = [row for row in table.rows if row[0] == f"{point.method.name}, trained at 12/255"]
        assert [row[1] for row in rows] == [f"{budget}/255" for budget in range(0, 33, 4)]
        counts = [made_up.right(point, "clean", "")]
        counts += [made_up.right(point, attack, f"L-inf {budget}/255") for budget in range(4, 33, 4)]
        assert all(row[2].startswith(percent(n, made_up.images)) for row, n in zip(rows, counts, strict=True))
    assert "budget of the attack, n/255 (L-inf)" in texts(made.folder / blocks[0].path)


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_accuracy_over_settings(experiment, made_up, scale):
    made = experiment("fig12", scale)
    (of_rates, rates, of_batches, batches) = made.section().blocks
    points = made.study.points()
    found = {(p.config.optim.lr, p.config.data.batch_size, p.method.name): p for p in points}
    lr, batch = points[0].config.optim.lr, points[0].config.data.batch_size
    for table, place in ((rates, lambda x: (float(x), batch)), (batches, lambda x: (lr, int(x)))):
        values = [float(row[1]) for row in table.rows]
        assert values == sorted(values) and len(table.rows) == 4 * len(set(values))
        for row in table.rows:
            point = found[(*place(row[1]), row[0])]
            attacked = [made_up.right(point, attack, "L-inf 8/255") for attack in made.study.measure.attacks[1:]]
            wanted = made_up.right(point, "clean", "") if row[2] == "standard" else min(attacked)
            assert row[3].startswith(percent(wanted, made_up.images))
    assert "learning rate" in texts(made.folder / of_rates.path)
    assert "batch size" in texts(made.folder / of_batches.path)
