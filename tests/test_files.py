"""Files that survive a crash, and errors that a user can fix."""

import csv
import errno
import os
import shutil
import signal

import pytest
from conftest import run_python

from lib import errors, files
from lib.errors import UserError
from lib.files import atomic_directory, atomic_write


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError("a bug"), RuntimeError), (OSError(errno.ENOSPC, "No space left on device"), UserError)],
)
def test_a_failed_write_leaves_the_old_file(error, raised, tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(raised, match=r"a bug|result\.txt: No space left"), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    code = (
        "import os, sys\n"
        "from lib import errors, files\n"
        "with files.atomic_write(sys.argv[1]) as t, files.atomic_directory(sys.argv[2]) as d:\n"
        "    t.write_text('half'); (d / 'x').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    process = run_python("-c", code, tmp_path / "a.txt", tmp_path / "b", check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(os.listdir(tmp_path)) == 2
    living = tmp_path / f".a.{files._place()}-1-0.tmp.txt"
    living.touch()
    with atomic_write(tmp_path / "a.txt") as a, atomic_directory(tmp_path / "b") as b:
        a.write_text("whole")
        (b / "x").touch()
    assert sorted(os.listdir(tmp_path)) == [living.name, "a.txt", "b"]


def test_what_a_process_with_the_same_number_elsewhere_writes_stays(tmp_path, monkeypatch):
    """Containers that share a folder have processes of the same numbers, which do not see each other."""
    with monkeypatch.context() as elsewhere, atomic_directory(tmp_path / "d") as theirs:
        (theirs / "x").write_text("theirs")
        elsewhere.setattr(os, "readlink", lambda _: "pid:[1]")
        elsewhere.setattr(files, "_is_alive", lambda _: False)
        with atomic_directory(tmp_path / "d") as ours:
            assert theirs != ours
            (ours / "x").write_text("ours")
        assert (theirs / "x").read_text() == "theirs"
        shutil.rmtree(tmp_path / "d")
    assert (tmp_path / "d" / "x").read_text() == "theirs"


def test_a_failed_folder_leaves_nothing_and_a_folder_in_use_is_refused(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as folder:
        (folder / "x").touch()
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").touch()
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "d"):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path / "d") == ["mine"]


def test_csv_has_plain_line_ends_and_every_name_comes_back(tmp_path):
    names = ["a.npy", "a b", "a,b", 'a"b', "a\nb", "a\rb", "a\r\nb", "b\r", "é", "a|b", "a=1", " =1", "", "-0.5",
             "+1e3"]  # fmt: skip
    files.write_csv(tmp_path / "x.csv", [["file", "n"], *([name, "1"] for name in names)])
    content = (tmp_path / "x.csv").read_bytes()
    assert content.startswith(b"file,n\na.npy,1\n")
    assert all(b"\r" not in line[-2:] for line in content.replace(b'"b\r"', b"").split(b",1\n"))
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        assert [row["file"] for row in csv.DictReader(file)] == names


@pytest.mark.parametrize("name", ["=1+1.npy", "@SUM(1).npy", "+a", "-a", "-", "\tx", "\rx", "\nx", "＝1",
                                  "=1: cannot be read"])  # fmt: skip
def test_no_cell_is_a_formula(name, tmp_path):
    """With ./ in front, the path of a file still leads to it."""
    files.write_csv(tmp_path / "x.csv", [[name, name]])
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [[f"./{name}", f"./{name}"]]
    assert os.path.normpath(f"./{name}") == name


def test_json_that_is_none_is_refused(tmp_path):
    for text in ("", "[1]", "{" * 100_000, "{'a': 1}"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=r"x\.json"):
            files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (UserError("x.npy: remove it"), 2, "error: x.npy: remove it\n"),
        (OSError(errno.ENOSPC, "No space", "run/w.pth"), 2, "error: run/w.pth: No space\n"),
        (OSError(errno.ENOSPC, "No space"), 2, "error: No space\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(error, code, said, capsys):
    def main():
        if error:
            raise error
        return 0

    with pytest.raises(SystemExit) as ended:
        errors.run_main(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == said


def test_a_bug_is_not_taken_for_a_mistake_of_the_user():
    def main():
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        errors.run_main(main)
