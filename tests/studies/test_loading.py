"""Studies from files and by name: what is executed, and what is said where there is none."""

import pytest

from robust_peft.studies import built_in_studies, load_study

HEAD = "from robust_peft.studies import Method, Study\n"
ONE = HEAD + "study = Study(name='mine', methods=[Method('A')])\n"
SCALED = HEAD + "def study(scale{default}):\n    return Study(name=f'mine-{{scale}}', methods=[Method('A')])\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def to_file(text):
        (tmp_path / "mine.py").write_text(text)
        return "mine.py"

    return to_file


def test_a_file_with_a_study_or_a_function(write):
    assert load_study(write(ONE)).name == "mine"
    assert load_study(write(SCALED.format(default="")), "tiny").name == "mine-tiny"
    assert load_study(write(SCALED.format(default="='paper'"))).name == "mine-paper"


def test_a_file_imports_what_lies_beside_it(write, tmp_path):
    (tmp_path / "beside_the_study.py").write_text("NAME = 'neighbour'\n")
    text = ONE.replace("'mine'", "NAME")
    assert load_study(write("from beside_the_study import NAME\n" + text)).name == "neighbour"


@pytest.mark.parametrize(
    ("text", "scale", "message"),
    [
        ("x = 1", None, "mine.py should end with study = Study"),
        ("study = 3", None, "should be a Study. Found int"),
        ("def study(scale): return 3", "tiny", "should be a Study. Found int"),
        ("study = (", None, "mine.py, line 1: SyntaxError"),
        ("\n\n1 / 0", None, "mine.py, line 3: ZeroDivisionError"),
        (HEAD + "study = Study(name='a b', methods=[])", None, "mine.py, line 2: name should be of letters"),
        ("def study():\n    return 1 / 0", None, "mine.py, line 2: ZeroDivisionError"),
        (
            HEAD + "def study(): return Study(name='a b', methods=[])",
            None,
            "mine.py, line 2: name should be of letters",
        ),
        (ONE, "tiny", "takes no scale. Found scale = 'tiny'"),
        (HEAD + "def study(): return Study(name='s', methods=[Method('A')])", "tiny", "takes no scale"),
        (SCALED.format(default=""), None, "comes in several scales; name one as --scale"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(write, text, scale, message):
    with pytest.raises(ValueError, match=message):
        load_study(write(text), scale)


def test_a_wrong_name_lists_what_there_is(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.py does not exist. A study is a Python file, or one"):
        load_study("nothing.py")
    (tmp_path / "mine.toml").touch()
    with pytest.raises(ValueError, match="should be a Python file. Found mine.toml"):
        load_study("mine.toml")


@pytest.mark.parametrize("name", built_in_studies())
def test_what_comes_with_the_package_can_be_loaded(name):
    assert load_study(name, "tiny" if name.startswith("paper/") else None).points()
