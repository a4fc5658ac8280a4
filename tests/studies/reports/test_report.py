"""The report: its answer, every number with its folder, and nothing of what users wrote taken for markup."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_studies import (
    BASE,
    SEARCH,
    full_records,
    full_study,
    records_of,
    troubled_records,
    troubled_study,
    verdicts,
)

from robust_peft.config import to_dict
from robust_peft.results import wilson_interval
from robust_peft.studies.report import write_report
from robust_peft.studies.report_blocks import Table
from robust_peft.studies.report_training import trained_with
from robust_peft.studies.statistics import panels_of
from robust_peft.studies.study import Method, Study, grid


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


def lead_of(study, records, folder):
    text = (write_report(study, records, folder).parent / "report.md").read_text()
    return text.split("\n\n")[1].replace("\\", ""), text


def test_the_first_paragraph_asks_and_answers(full):
    study, _, path = full
    first = (path.parent / "report.md").read_text().split("\n\n")[1]
    assert first.startswith(study.question)
    for words in (
        "CA-AT against vanilla: on MNIST its front is better (+",
        "final measurement, 6 seeds",
        "on Fashion-MNIST its front is better for these 3 seeds' models",
        "PCGrad is one setting and no front, as measured on MNIST",
    ):
        assert words in first, words


SMALL = (
    *grid("vanilla", "surgery.lam", (0.0, 0.5), {"surgery.name": "vanilla"}),
    *grid("CA-AT", "surgery.gamma", (0.5, 0.8), {"surgery.name": "ca-at"}),
)


def answered(folder, gain, seeds=6, methods=SMALL, final=None, final_seeds=6, **changes):
    """The first paragraph of a study where CA-AT is so much better in the search, and in the final measurement."""
    study = Study("s", methods, BASE, measure=SEARCH, seeds=range(seeds), question="Is it?")

    def seen(by, total=200):
        def verdict(point):
            standard, adversarial = (140, 60) if point.method.label in ("lam 0.0", "gamma 0.5") else (120, 80)
            more = by * (point.method.family == "CA-AT")
            right = [i < standard + more for i in range(total)]
            return verdicts(right, ("pgd", [i < adversarial + more for i in range(total)]))

        return verdict

    records = records_of(study, folder, seen(gain), (lambda p: ()) if final is None else seen(final))
    if final is not None:
        done, left = {"confirmation": "done", "audit": "passed"}, {"confirmed": ()}
        records = [replace(r, **(done if r.seed < final_seeds else left)) for r in records]
        records[-1] = replace(records[-1], **changes)
    return lead_of(study, records, folder / "report")


@pytest.mark.parametrize("gain, seeds, words", [
    (20, 6, "its front is better (+"), (-20, 6, "its front is worse (-"), (0, 6, "no difference between the fronts"),
    (20, 3, "better for these 3 seeds' models and other images; 3 seeds are too few to speak of the methods"),
])  # fmt: skip
def test_the_lead_says_what_was_found(tmp_path, gain, seeds, words):
    lead, _ = answered(tmp_path, gain, seeds)
    assert words in lead and ("better" in lead) == (gain > 0) and ("worse" in lead) == (gain < 0)


def test_a_complete_final_measurement_decides(tmp_path):
    lead, text = answered(tmp_path, 20, final=-20)
    assert re.search(
        r"vanilla: its front is worse \(.*final measurement, 6 seeds\)\. Beside it: its front is better", lead
    )
    assert "The study is not complete" not in text


@pytest.mark.parametrize("changes, left", [
    ({"confirmation": "failed", "error": "it broke", "confirmed": ()}, "23 of 24 final measurements are done, 1 fai"),
    ({"confirmation": "waiting", "confirmed": ()}, "23 of 24 final measurements are done."),
])  # fmt: skip
def test_an_incomplete_final_measurement_does_not(tmp_path, changes, left):
    lead, text = answered(tmp_path, 20, final=-20, **changes)
    assert "its front is better" in lead and "worse" not in lead and left in text
    assert ("| final measurement waiting |" in text) == (changes["confirmation"] == "waiting")
    assert ("it broke" in text) == ("error" in changes)


def test_panels_are_named_where_only_one_of_them_has_a_final_measurement(tmp_path):
    study = full_study()
    records = full_records(study, tmp_path)
    first, second = (label for label in study.axes["data"])
    records = [
        replace(record, confirmed=(), confirmation=None, audit=None) if record.panel["data"] == second else record
        for record in records
    ]
    lead, _ = lead_of(study, records, tmp_path / "report")
    assert f"CA-AT against vanilla: on {first} its front is better" in lead
    assert f"search, 3 seeds). Beside it: on {first} " in lead


def test_nothing_is_counted_of_fronts_that_are_not_whole(tmp_path):
    study = Study("s", SMALL, BASE, measure=SEARCH)
    records = records_of(study, tmp_path, lambda p: verdicts([True] * 9, ("pgd", [p.method.label > "h"] * 9)))
    whole = lead_of(study, records, tmp_path / "a")[1]
    records[0] = replace(records[0], status="waiting", measured=())
    assert "0 of vanilla's 2 by one of CA-AT" in whole and "As measured, without a test, 2 of the 2 means" in whole
    assert "As measured, without a test" not in lead_of(study, records, tmp_path / "b")[1]


def test_one_seed_is_one_seed(tmp_path):
    lead, _ = answered(tmp_path, 20, seeds=1)
    assert "for this seed's models and other images; 1 seed is too few to speak of the methods" in lead


def test_the_search_decides_where_it_has_more_seeds(tmp_path):
    lead, _ = answered(tmp_path, 20, final=-20, final_seeds=2)
    assert lead.index("its front is better") < lead.index("Beside it: its front is worse for these 2 seeds' models")


def test_the_search_decides_where_families_had_different_numbers_of_settings(tmp_path):
    methods = (*SMALL, *grid("CA-AT", "surgery.gamma", (0.6, 0.7), {"surgery.name": "ca-at"}))
    lead, text = answered(tmp_path, 20, final=-20, methods=methods)
    assert re.search(
        r"on equally many settings, 2 of CA-AT's 4 drawn at random, its front is better .*search, 6 seeds", lead
    )
    assert lead.index("better") < lead.index("Beside it: its front is worse") and "favours the family with more" in text


@pytest.mark.parametrize("at, words", [
    ((130, 50), "dominated by vanilla (lam 0.0)."),
    ((110, 50), "dominated by vanilla (lam 0.0) and vanilla (lam 0.5)."),
    ((140, 60), "not dominated by any setting of vanilla."), ((150, 10), "not dominated by any setting of vanilla."),
    ((140, 50), "dominated by vanilla (lam 0.0)."),
])  # fmt: skip
def test_one_setting_beside_a_front_in_the_lead(tmp_path, at, words):
    study = Study("s", (*SMALL[:2], Method("MGDA", settings={"surgery.name": "mgda"})), BASE, measure=SEARCH)
    places = {"lam 0.0": (140, 60), "lam 0.5": (120, 80), "": at}

    def seen(point):
        right, withstood = places[point.method.label]
        return verdicts([i < right for i in range(200)], ("pgd", [i < withstood for i in range(200)]))

    lead, _ = lead_of(study, records_of(study, tmp_path, seen), tmp_path / "report")
    assert lead.endswith(f"MGDA is one setting and no front, as measured {words}")


def test_methods_are_compared_in_the_final_measurement_as_the_search_chose_them(tmp_path):
    study = Study("s", SMALL, BASE, measure=SEARCH, seeds=range(6))
    searched = {"lam 0.0": (140, 60), "lam 0.5": (100, 70), "gamma 0.5": (140, 60), "gamma 0.8": (100, 70)}
    final = {"lam 0.0": (100, 70), "lam 0.5": (140, 60), "gamma 0.5": (100, 70), "gamma 0.8": (140, 60)}

    def seen(places):
        def verdict(point):
            right, withstood = places[point.method.label]
            return verdicts([i < right for i in range(200)], ("pgd", [i < withstood for i in range(200)]))

        return verdict

    path = write_report(study, records_of(study, tmp_path, seen(searched), seen(final)), tmp_path / "report")
    numbers = json.loads((path.parent / "report.json").read_text())
    of_methods = {
        panel["stage"]: [
            (c["first"], c["second"]) for c in panel["comparisons"] if c["quantity"] == "standard accuracy"
        ]
        for panel in numbers["panels"]
    }
    # What was chosen by its figures is not tested by them.
    assert of_methods == {"measured": [], "confirmed": [("CA-AT (gamma 0.5)", "vanilla (lam 0.0)")]}
    assert "The exact test over 6 seeds cannot give less than p = 0.031" in path.read_text()


def test_two_methods_that_are_the_same_run_keep_their_own_numbers(tmp_path):
    methods = (Method("one", settings=SMALL[1].settings), Method("another", settings=SMALL[1].settings))
    study = Study("s", methods, BASE, measure=SEARCH)
    right = {"one": 150, "another": 130}

    def seen(point):
        of_method = [i < right[point.method.family] for i in range(200)]
        return verdicts(of_method, ("pgd", of_method))

    records = records_of(study, tmp_path, seen)
    assert records[0].key == records[1].key
    rows = Page(write_report(study, records, tmp_path / "report").read_text()).tables
    assert [row[4] for row in rows if row[:2] in (["all", "one"], ["all", "another"])] == ["75.00", "65.00"]


def test_seeds_that_are_all_equal_can_be_drawn(tmp_path):
    lead, _ = answered(tmp_path, 7, seeds=3)  # e.g. three times 127 of 200, whose mean is not exactly that
    assert "better" in lead


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
    for run, record in zip(numbers["runs"], records, strict=True):
        for stage in ("measured", "confirmed"):
            for row, verdicts in zip(run[stage], getattr(record, stage), strict=True):
                assert [letter == "1" for letter in row["verdicts"]] == list(verdicts.correct.values())


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


def test_what_was_trained_is_said(tmp_path):
    axes = {"data": {"MNIST": {}, "Fashion-MNIST": {"data.name": "fashion_mnist", "optim.epochs": 3}}}
    study = Study("s", SMALL, "quickstart", settings={"backbone.name": "net.py:build"}, axes=axes, measure=SEARCH)
    records = full_records(study, tmp_path)
    about = json.loads((records[0].folder / "config.json").read_text())
    (records[0].folder / "config.json").write_text(json.dumps(about | {"images": {"train": 2500, "test": 70}}))
    _, text = lead_of(study, records, tmp_path / "report")
    text = text.replace("\\", "")
    for words in (
        "the preset quickstart, with the study's changes",
        "| all runs | backbone | name net.py:build |",
        "| Fashion-MNIST | data, optim | name fashion_mnist; epochs 3 |",
        "| vanilla (lam 0.5) | surgery | name vanilla, lam 0.5 |",
        "MNIST, images: 2,500 for train, 70 for test.",
    ):
        assert words in text, words
    found = json.loads((tmp_path / "report" / "report.json").read_text())["trained_with"]
    assert found["common"]["attack"]["name"] == "pgd" and "epochs" not in found["common"]["optim"]
    assert found["by_panel"]["MNIST"]["data"]["name"] == "digits" and "seed" not in found["common"].get("", {})


def mixed_study():
    """A rate that depends on the panel and, for some methods, on the method."""
    axes = {"data": {"MNIST": {"optim.lr": 0.1}, "Fashion-MNIST": {"data.name": "fashion_mnist"}}}
    fast = Method("fast", settings={"surgery.name": "vanilla", "surgery.lam": 0.5, "optim.lr": 0.5})
    return Study("s", (*SMALL, fast), BASE, axes=axes, seeds=(0, 1))


@pytest.mark.parametrize("study", [full_study(), troubled_study(), mixed_study()], ids=lambda study: study.name)
def test_every_setting_of_every_point_is_found_again_in_what_was_trained(study):
    found = trained_with(study)
    for point in study.points():
        panel, method = point.panel_name, point.method.name
        said = {}
        for parts in (found.common, found.by_panel[panel], found.by_method[method]):
            said |= {(part, name): value for part, values in parts.items() for name, value in values.items()}
        for part, values in found.by_both.get(f"{panel}, {method}", {}).items():
            said |= {(part, name): value for name, value in values.items()}
        for part, values in to_dict(point.config).items():
            for name, value in (values if isinstance(values, dict) else {part: values}).items():
                where = part if isinstance(values, dict) else ""
                if part not in ("evaluation", "seed"):
                    assert said.get((where, name)) == (None if value in ([], ()) else value), (part, name)
    assert bool(found.by_both) == (study.name == "s")


def test_the_intervals_of_few_seeds_are_over_images(tmp_path):
    study = Study("s", SMALL, BASE, measure=SEARCH, seeds=(0, 1))
    right = {0: 10, 1: 15}
    seen = lambda p: verdicts([i < right[p.seed] for i in range(24)], ("pgd", [False] * 24))  # noqa: E731
    lead, text = lead_of(study, records_of(study, tmp_path, seen), tmp_path / "report")
    low, high = wilson_interval(12, 24)  # of 12.5, to even
    assert f"52.08 [{100 * low:.2f}, {100 * high:.2f}] |" in text.replace("\\", "")
    assert "no model is right under attack, so that there are no fronts to compare (search, 2 seeds)" in lead
    assert "-0.00" not in text


def test_a_run_that_failed_early_has_its_error_linked_and_no_folder(tmp_path):
    study = Study("s", SMALL, BASE, measure=SEARCH)
    records = records_of(study, tmp_path, lambda p: verdicts([True] * 9, ("pgd", [True] * 9)))
    records[0] = replace(records[0], status="failed", error="it broke", measured=())
    notes = tmp_path / "points" / records[0].folder.name
    notes.mkdir(parents=True)
    (notes / "error.txt").write_text("Traceback")
    _, text = lead_of(study, records, tmp_path)
    assert f"[error.txt](points/{notes.name}/error.txt) | it broke |" in text
    for target in re.findall(r"\]\((points/[^)]*|runs/[^)]*)\)", text):
        assert (tmp_path / target).exists() or records[0].folder.name not in target, target


def test_the_code_moved_on_while_the_study_ran(tmp_path):
    study = full_study()
    records = [record for record in full_records(study, tmp_path) if record.seed == 0]
    for record, commit in zip(records, ["a" * 40, "b" * 40, "b" * 40], strict=False):
        path = record.folder / "config.json"
        path.write_text(path.read_text().replace("c" * 40, commit))
    rows = Page(write_report(study, records, tmp_path / "r").read_text()).tables
    (row,) = [row for row in rows if "x86_64 CPU" in row]
    left = len(records) - 3
    assert row[0] == str(len(records))
    assert row[-1] == f"{'a' * 40} (1), {'b' * 40} (2), {'c' * 40} ({left})"


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
