"""Files are whole or absent, and what cannot be read is named."""

import os
import stat

import pytest

from robust_peft.files import read_json, sha256, write_json, write_text, write_whole


def test_a_writer_that_dies_leaves_the_earlier_file_and_no_litter(tmp_path):
    path = write_text(tmp_path / "a" / "file.txt", "before")

    def dies(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, dies)
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


def test_a_written_file_has_ordinary_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        path = write_text(tmp_path / "file.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_json_round_trip_and_refusals(tmp_path):
    path = write_json(tmp_path / "x.json", {"a": [1, None, "ü"]})
    assert read_json(path) == {"a": [1, None, "ü"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    assert read_json(path) == {"a": [1, None, "ü"]}
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        read_json(tmp_path / "nowhere.json")
    write_text(path, "{")
    with pytest.raises(ValueError, match="x.json is no valid JSON"):
        read_json(path)


def test_sha256_of_a_known_text(tmp_path):
    path = write_text(tmp_path / "abc", "abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
