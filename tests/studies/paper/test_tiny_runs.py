"""Tiny studies from end to end: trained, measured, confirmed, tabulated."""

import shutil
from dataclasses import replace

import pytest

from robust_peft.studies import collect, load_study, run_study
from robust_peft.studies.paper import table1
from robust_peft.studies.report import write_report
from robust_peft.studies.report_blocks import Figure

TINIEST = {"data.limit": 20, "data.batch_size": 10, "optim.epochs": 1, "attack.steps": 2, "attack.step_size": None}


def run(study, folder, engine):
    """Everything done; the records."""
    run_study(study, folder, engine=engine, say=lambda line: None)
    records = collect(study, folder)
    assert [(record.status, record.error) for record in records] == [("done", None)] * len(study.points())
    for record in records:
        assert [v.attack for v in record.measured[:1]] == ["clean"]
        assert {v.accuracy.total for v in record.measured} == {study.measure.limit}
        assert (record.folder / "metrics.jsonl").is_file()
    assert any(record.confirmed for record in records) == (study.confirm is not None)
    assert write_report(study, records, folder).is_file()
    return records


@pytest.mark.parametrize("name", ["paper/fig1", "paper/fig5", "paper/fig7", "paper/table3"])
def test_two_points(name, tmp_path, same_process):
    study = load_study(name, "tiny")
    (axis, panels), *_ = study.axes.items()
    study = replace(
        study,
        settings={**study.settings, **TINIEST},
        axes={axis: dict([*panels.items()][:1])},
        methods=[study.methods[0], study.methods[-1]],
        measure=replace(study.measure, limit=10),
        confirm=None if study.confirm is None else replace(study.confirm, limit=10),
    )
    records = run(study, tmp_path, same_process())
    sections = [] if study.extra is None else study.extra(study, records, tmp_path)
    if name == "paper/fig1":
        cells = [row[2].split()[0] for row in sections[0].blocks[1].rows]
        assert cells == [f"{100 * v.accuracy.accuracy:.2f}" for record in records for v in record.measured]
        # What Table 1 has in common with it is then trained there too.
        shutil.copytree(tmp_path / "runs", tmp_path / "table1" / "runs")
        other = table1.study("tiny")
        other = replace(other, settings={**other.settings, **TINIEST})
        statuses = {(r.panel["model"], r.status) for r in collect(other, tmp_path / "table1")}
        assert statuses == {("ResNet-18, width 4", "trained"), ("ResNet-34, width 4", "waiting")}
    if name == "paper/fig7":
        shown = [block.caption for block in sections[0].blocks if isinstance(block, Figure)]
        tried = ("t-fab-3, L-inf 8/255", "pgd-5, L-inf 8/255", "mifgsm-5, L-inf 8/255", "t-pgd-3, L2 0.5")
        assert len(shown) == 4 and all(attack in caption for attack, caption in zip(tried, shown, strict=True))
    if name == "paper/table3":
        (table,) = sections[0].blocks
        assert table.header[3:-1] == ("DDN, L2 0.5, %", "C&W, L2 0.5, %", "Square, L-inf 8/255, %")
        assert len(table.rows) == 2 and all(cell for row in table.rows for cell in row)


@pytest.mark.slow  # its fast twin is test_two_points
def test_a_whole_tiny_study(tmp_path, same_process):
    study = table1.study("tiny")
    records = run(study, tmp_path, same_process())
    (section,) = table1.extra(study, records, tmp_path)
    (table,) = section.blocks
    assert len(table.rows) == 16 and all(cell for row in table.rows for cell in row)
