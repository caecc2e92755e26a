"""Where files that users ask for go: through links, into pipes, and never in place of a device."""

import os
import threading

import pytest

from memo_runtime import persist
from memo_runtime.errors import ArgumentTypeError, OutputError
from memo_runtime.output import check_writable, write_output
from tests.reporting.samples import PLAN, PROFILE


def test_the_file_behind_links_is_replaced_and_the_links_stay(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("old")
    (tmp_path / "deep" / "near").symlink_to("file")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "near")
    check_writable(tmp_path / "link")
    persist.save(PLAN, tmp_path / "link")
    assert persist.load_plan(tmp_path / "deep" / "file") == PLAN
    assert (tmp_path / "link").is_symlink()
    assert sorted(entry.name for entry in (tmp_path / "deep").iterdir()) == ["file", "near"]


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    persist.save(PROFILE, pipe)
    reader.join()
    (tmp_path / "copy").write_bytes(read[0])
    assert persist.load_profile(tmp_path / "copy") == PROFILE
    assert pipe.is_fifo()


def test_a_device_stays_one():
    check_writable("/dev/null")
    write_output("/dev/null", b"nothing")
    assert os.path.exists("/dev/null")
    assert not os.path.isfile("/dev/null")


def test_an_open_file_is_not_replaced(tmp_path):
    with (tmp_path / "log").open("w") as file:
        name = f"/dev/fd/{file.fileno()}"
        for write in (check_writable, lambda path: write_output(path, b"")):
            with pytest.raises(OutputError, match="redirected to a file: name that file"):
                write(name)


def test_a_loop_of_links_is_named(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    for write in (check_writable, lambda path: write_output(path, b"")):
        with pytest.raises(OutputError, match=r"one: .*links"):
            write(tmp_path / "one")


@pytest.mark.parametrize("path", [5, b"plan.json", None, PLAN])
def test_what_is_no_name_of_a_file_is_refused(path):
    for use in (lambda: persist.save(PLAN, path), lambda: persist.load(path), lambda: check_writable(path)):
        with pytest.raises(ArgumentTypeError, match="is no name of a file: give a str"):
            use()


@pytest.mark.parametrize("value", [5, None, "plan", {"policy": "swap"}])
def test_what_is_neither_plan_nor_profile_is_not_saved(value, tmp_path):
    with pytest.raises(ArgumentTypeError, match="save writes a plan or a profile and got"):
        persist.save(value, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
