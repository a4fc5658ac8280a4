"""The report: its answer, every number with its folder, and nothing of what users wrote taken for markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_studies import full_records, full_study, troubled_records, troubled_study

from robust_peft.studies.report import write_report
from robust_peft.studies.report_blocks import Table
from robust_peft.studies.statistics import panels_of


class Page(HTMLParser):
    """The page's text, its tags with their attributes, and whether they are closed in order."""

    VOID = {"meta", "link", "img", "br", "hr"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.tables = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.tables.append([])
        if tag in ("td", "th"):
            self.tables[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder, study = tmp_path_factory.mktemp("full"), full_study()
    records = full_records(study, folder)
    return study, records, write_report(study, records, folder / "report")


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    folder, study = tmp_path_factory.mktemp("troubled"), troubled_study()
    records = troubled_records(study, folder)
    return study, records, write_report(study, records, folder / "report")


def test_the_page_needs_nothing_else(full):
    page = Page(full[2].read_text(encoding="utf-8"))
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "style"):
            value = attributes.get(name, "")
            assert "http" not in value and not re.search(r"url\((?!#)", value), (tag, value)
    assert sum(tag == "svg" for tag, _ in page.tags) == 4  # two panels, each searched and finally measured
    assert all(a.get("role") == "img" and a.get("aria-label") for tag, a in page.tags if tag == "svg")


def test_the_first_paragraph_asks_and_answers(full):
    study, _, path = full
    first = (path.parent / "report.md").read_text().split("\n\n")[1]
    assert first.startswith(study.question)
    for words in ("CA-AT against vanilla: the front is better", "on MNIST", "on Fashion-MNIST", "not after Holm's",
                  "3 seeds are too few for a test over seeds", "PCGrad is one point and no front"):  # fmt: skip
        assert words in first, words


def test_every_number_is_that_of_its_folder(full):
    study, records, path = full
    numbers = json.loads((path.parent / "report.json").read_text())
    page = Page(path.read_text())
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    folders = {(path.parent / link).resolve() for link in links}
    assert folders == {record.folder.resolve() for record in records}
    by_folder = {record.folder.resolve(): record for record in records}
    seen = 0
    for panel in numbers["panels"]:
        for front in panel["fronts"]:
            for method in front["methods"]:
                for run in method["runs"]:
                    record = by_folder[(path.parent / run["folder"]).resolve()]
                    verdicts = getattr(record, panel["stage"])
                    assert record.seed == run["seed"] and record.method == method["method"]
                    assert run["standard_accuracy"] == pytest.approx(verdicts[0].accuracy.accuracy)
                    assert run["adversarial_accuracy"] == pytest.approx(verdicts[-1].accuracy.accuracy)
                    seen += 1
    assert seen == sum(bool(record.measured) + bool(record.confirmed) for record in records)
    assert len(numbers["runs"]) == len(records)


def test_tables_show_the_numbers(full):
    study, records, path = full
    rows = Page(path.read_text()).tables
    (panel, *_) = panels_of(study, records, "measured")
    for method in panel.methods:
        row = next(
            row for row in rows if row[0].startswith(method.name) and row[1].startswith(f"{100 * method.mean[0]:.2f}")
        )
        assert row[2].startswith(f"{100 * method.mean[1]:.2f} [")
        assert row[-1].split() == [str(seed) for seed in method.seeds]
    header = next(row for row in rows if "left after t-apgd-dlr, L-inf 8/255, %" in row)
    assert header[:2] == ["method", "standard, %"]
    assert ["MNIST", "PCGrad", "20,490", "0.0881", "0.034", "61", "0 1 2 3 4 5"] in rows


def test_where_it_comes_from_is_said(full):
    text = Page(full[2].read_text()).text
    for words in ("x86_64 CPU", "torch 2.11", "c" * 40, "robust-peft study run front.py", "Seeds: 0, 1, 2, 3, 4, 5.",
                  "first 200 images of the validation split", "passed", "autoattack"):  # fmt: skip
        assert words in text, words


def test_the_same_records_give_the_same_files(troubled, tmp_path):
    study, records, path = troubled
    again = write_report(study, records, path.parent.parent / "again")
    files = sorted(p.relative_to(path.parent) for p in path.parent.rglob("*") if p.is_file())
    assert {p.suffix for p in files} == {".html", ".md", ".json", ".svg"}
    for file in files:
        assert (again.parent / file).read_bytes() == (path.parent / file).read_bytes(), file


def test_markup_in_names_and_errors_is_text(troubled):
    page = Page(troubled[2].read_text())
    assert not {"script", "img", "b", "i"} & {tag for tag, _ in page.tags}
    for words in ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<b>base</b> & *co*", "<i>this</i>"):
        assert words in page.text, words
    lines = (troubled[2].parent / "report.md").read_text().splitlines()
    assert not any(re.search(r"(?<!\\)<(script|img|b|i)\b", line) for line in lines)
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
    assert widths and all(width > 2 for width in widths)


def test_what_failed_and_what_is_missing_is_said(troubled):
    page = Page(troubled[2].read_text())
    assert "6 of 8 runs are done, 1 failed, 1 waiting" in page.text
    assert any("never finished" in row and "waiting" in row for row in page.tables)
    assert any("never finished" in row and row[-1].startswith("RuntimeError") for row in page.tables)


def test_nothing_measured_yet(tmp_path):
    study = troubled_study()
    records = [record for record in troubled_records(study, tmp_path) if not record.measured]
    text = Page(write_report(study, records, tmp_path / "r").read_text()).text
    assert "nothing has been measured" in text
    assert not Path(tmp_path / "r" / "figures").exists()


def test_a_table_has_as_many_cells_as_its_header():
    with pytest.raises(ValueError, match="rows should have 2 cells"):
        Table("t", ("a", "b"), (("1",),))
