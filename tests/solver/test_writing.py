import os
import stat
import threading

import pytest

from memo_solver.errors import InputError
from memo_solver.writing import check_writable, write_atomically


def test_a_link_stays_a_link_and_its_file_gets_the_text(tmp_path):
    (tmp_path / "file.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("file.csv")
    check_writable(tmp_path / "link.csv")
    write_atomically(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "file.csv").read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    check_writable(pipe)
    write_atomically(pipe, "text")
    reader.join(timeout=10)
    assert got == ["text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_open_file_of_the_program_is_refused(tmp_path):
    with (tmp_path / "out.csv").open("w") as file, pytest.raises(InputError, match="redirected to a file"):
        check_writable(f"/dev/fd/{file.fileno()}")


@pytest.mark.parametrize(("name", "why"), [("loop", "a loop of links"), ("x" * 300, "too long"), ("a/b", "no folder")])
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, name, why):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=why):
        check_writable(tmp_path / name)


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    write_atomically(tmp_path / ("x" * 255), "text")
    assert (tmp_path / ("x" * 255)).read_text() == "text"
