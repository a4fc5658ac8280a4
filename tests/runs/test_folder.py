"""What a run notes about itself."""

import subprocess
import sys
from pathlib import Path

import pytest

import robust_peft
from robust_peft.runs import folder


def git(*arguments: str, where: Path) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=where, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_repository_that_holds_the_package(tmp_path, monkeypatch):
    package = Path(robust_peft.__file__).parent
    copied = tmp_path / "checkout" / package.name / Path(folder.__file__).relative_to(package)
    copied.parent.mkdir(parents=True)
    copied.write_text("")
    monkeypatch.setattr(folder, "__file__", str(copied))
    assert folder._commit() is None, "no repository"

    checkout = tmp_path / "checkout"
    git("init", "--quiet", where=checkout)
    git("add", ".", where=checkout)
    git("commit", "--quiet", "--message", "all", where=checkout)

    assert folder._commit() == git("rev-parse", "HEAD", where=checkout)


def test_the_commit_is_not_that_of_a_repository_around_the_installed_package(tmp_path, monkeypatch):
    package = Path(robust_peft.__file__).parent
    copied = tmp_path / "site-packages" / package.name / Path(folder.__file__).relative_to(package)
    copied.parent.mkdir(parents=True)
    copied.write_text("")
    git("init", "--quiet", where=tmp_path)
    git("add", ".", where=tmp_path)
    git("commit", "--quiet", "--message", "all", where=tmp_path)
    monkeypatch.setattr(folder, "__file__", str(copied))

    assert folder._commit() is None


@pytest.mark.parametrize(
    ("called", "said"),
    [
        (["/opt/env/bin/robust-peft", "study", "run", "my study.py"], "robust-peft study run 'my study.py'"),
        (["/opt/env/robust_peft/cli/__main__.py", "study"], "python -m robust_peft.cli study"),
        (["recipes/cub_swin.py", "--seed", "1"], "python recipes/cub_swin.py --seed 1"),
    ],
)
def test_the_command_can_be_typed_again(monkeypatch, called, said):
    monkeypatch.setattr(sys, "argv", called)
    assert folder.command_line() == said
