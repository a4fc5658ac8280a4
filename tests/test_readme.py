"""What README and docs tell people to type works: Python blocks are run, commands are parsed, links exist."""

import re
import shlex
from pathlib import Path

import pytest

from robust_peft import cli
from robust_peft.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def blocks(page, language):
    """The fenced blocks of that language, in order."""
    found, current, inside = [], None, False
    for line in page.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("```"):
            if not inside:
                current = [] if line.strip() == f"```{language}" else None
            elif current is not None:
                found.append("".join(current))
            inside = not inside
        elif inside and current is not None:
            current.append(line)
    assert not inside, f"{page.name} opens a block and does not close it"
    return found


def test_the_readme_s_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / "README.md", "python")
    assert found
    for code in found:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "n=50" in capsys.readouterr().out
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_the_python_of_the_evaluation_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / "docs" / "evaluation.md", "python")
    assert found
    for code in found:
        exec(compile(code, "evaluation.md", "exec"), {"__name__": "page"})
    assert "worst case" in capsys.readouterr().out


def test_the_evaluation_page_lists_each_check_with_its_rule():
    from robust_peft.evaluation.checks import QUESTIONS

    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert len(QUESTIONS) > 12
    for question in QUESTIONS:
        assert f"| {question.name} | {question.text} | {question.threshold} | {question.source} |" in text


def test_commands_of_the_pages_parse():
    """Each ``robust-peft`` line is parsed by the real parser; a flag that is gone fails here."""
    seen = 0
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["robust-peft", "train"]:
                    preset, flags = words[2], words[3:]
                    cli.parse(
                        cli.Train, flags, default=cli.Train(output="x", config=cli.with_methods(PRESETS[preset], flags))
                    )
                elif words[:2] == ["robust-peft", "evaluate"]:
                    cli.parse(cli.Evaluate, words[2:])
                elif words[:2] == ["robust-peft", "audit"]:
                    cli.parse(cli.Audited, words[2:])
                else:
                    continue
                seen += 1
    assert seen >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"
