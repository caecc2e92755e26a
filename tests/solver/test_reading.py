import gzip

import pytest

from memo_solver import read_placement, read_problem, write_placement
from memo_solver.errors import FileFormatError, InputError
from memo_solver.reading import parse, read_file
from memo_solver.records import Placement
from memo_solver.writing import format_csv, format_json, write_atomically, write_problem

GOOD = "id,lower,upper,size\na,0,4,3\nb,2,6,3\n"


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("id,lower,upper\na,0,4\n", 1, "size"),
        ("id,lower,upper,size,colour\na,0,4,3,red\n", 1, "colour"),
        ("id,lower,upper,size,size\n", 1, "size"),
        ("id,lower,upper,size\na,0,4\n", 2, "size"),
        ("id,lower,upper,size\na,0,4,3,9\n", 2, None),
        ("id,lower,upper,size\n\na,0,4,-3\n", 3, "size"),
        ("id,lower,upper,size\na,5,4,3\n", 2, "upper"),
        ("id,lower,upper,size\na,0,4,3\nb,0,4,3\na,0,1,1\n", 4, "id"),
        ("id,lower,upper,size\na,0,4,9223372036854775808\n", 2, "size"),
        ("id,lower,upper,size\na,0,4,3.5\n", 2, "size"),
        ("id,lower,upper,size\na,,4,3\n", 2, "lower"),
        ("id,lower,upper,size\n,0,4,3\n", 2, "id"),
        ("id,lower,upper,size,alignment\na,0,4,3,0\n", 2, "alignment"),
        ("id,lower,upper,size,offset\na,0,4,3,0\nb,0,4,3,\n", 3, "offset"),
        ("id,lower,upper,size,offset\na,0,4,3,0\nb,0,4,3,2\n", 3, "offset"),
        ('id,lower,upper,size\n"a,0,4,3\n', 2, None),
        ("id,lower,upper,size\na,0,4," + 5000 * "9" + "\n", 2, "size"),
        ("id,lower,upper,size\na,0,4,-" + 5000 * "9" + "\n", 2, "size"),
        ("id,lower,upper,size\na,0,4,1e3\n", 2, "size"),
        ("id,lower,upper,size\na,0,4,nan\n", 2, "size"),
        ("id,lower,upper,size\nb,0,4,\N{ARABIC-INDIC DIGIT THREE}\n", 2, "size"),
    ],
)
def test_csv_mistakes_name_line_and_field(text, line, field):
    with pytest.raises(FileFormatError) as caught:
        parse(text.encode(), path="x.csv")
    assert (caught.value.line, caught.value.field) == (line, field)
    assert str(caught.value).startswith("x.csv, line")


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ('[{"id": "a", "lower": 0, "upper": 4}]', 1, "size"),
        ('[\n{"id": "a", "lower": 0, "upper": 4, "size": 1},\n{"id": "a", "lower": 0, "upper": 4, "size": 1}]',
         3, "id"),
        ('{"requests": [\n{"id": "a", "lower": 0, "upper": 4, "size": 1.5}]}', 2, "size"),
        ('{"requests": [\n{"id": "a", "lower": 0, "upper": 4, "size": true}]}', 2, "size"),
        ('[\n{"id": "a", "lower": 0, "upper": 4, "size": ' + 5000 * "9" + "}]", 2, "size"),
        ('[{"id": "a", "lower": 0, "upper": 4, "size": NaN}]', 1, "size"),
        ('[{"id": "\\ud800", "lower": 0, "upper": 4, "size": 1}]', 1, "id"),
        ('[{"id": "a", "lower": 0, "upper": 4, "size": 1, "x": 2}]', 1, "x"),
        ('[{"id": "a", "id": "b", "lower": 0, "upper": 4, "size": 1}]', 1, None),
        ('{"requests": [], "capacity": "9"}', 1, "capacity"),
        ('{"capacity": 9}', 1, "requests"),
        ('{"requests": [],\n "other": 9}', 2, None),
        ("[1]", 1, None),
        ("[{]", 1, None),
        ("3", 1, None),
        ("[]\n[]", 2, None),
        ('[{"id": "a"}', 1, None),
        ("[" * 100_000, 1, None),
        ('[{"id": ' + "[" * 100_000, 1, None),
    ],
)  # fmt: skip
def test_json_mistakes_name_line_and_field(text, line, field):
    with pytest.raises(FileFormatError) as caught:
        parse(text.encode(), path="x.json")
    assert (caught.value.line, caught.value.field) == (line, field)


@pytest.mark.parametrize("path", ["x.csv", "x.json"])
@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_a_problem_without_requests(path, data):
    assert parse(data, path=path).problem.requests == ()


def test_what_is_no_text_is_refused_with_its_line():
    with pytest.raises(FileFormatError, match="line 2: not UTF-8"):
        parse(b"id,lower,upper,size\n\xff\xfe", path="x.csv")


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("id;lower;upper;size", "separated by semicolons"),
        ("id\tlower\tupper\tsize", "separated by tabs"),
        ("id,lower,uper,size", "did you mean 'upper'"),
        ("id,lower,upper,Size", "did you mean 'size'"),
    ],
)
def test_an_unknown_column_says_what_may_have_been_meant(header, hint):
    with pytest.raises(FileFormatError, match=hint):
        parse(header.encode(), path="x.csv")


def test_a_compressed_file_is_named_as_one():
    with pytest.raises(FileFormatError, match="gzip"):
        parse(gzip.compress(GOOD.encode()), path="x.csv")


def test_zeros_in_front_are_no_size():
    text = f"id,lower,upper,size\na,-{40 * '0'},4,+{40 * '0'}3\n"
    (request,) = parse(text.encode(), path="x.csv").problem.requests
    assert (request.lower, request.size) == (0, 3)


def test_a_capacity_below_the_largest_request_names_it():
    with pytest.raises(FileFormatError, match="at least 3"):
        parse(GOOD.encode(), path="x.csv", capacity=2)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_problem(tmp_path / "none.csv")


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    problem = parse(b"id,lower,upper,size,alignment\na,0,4,3,2\n\"b,c\",2,6,3,1\n", path="x.csv").problem
    write_problem(problem, tmp_path / f"problem.{suffix}")
    assert read_problem(tmp_path / f"problem.{suffix}") == problem
    placement = Placement(problem=problem, offsets=(0, 3))
    write_placement(placement, tmp_path / f"placed.{suffix}")
    assert read_placement(tmp_path / f"placed.{suffix}") == placement
    with pytest.raises(FileFormatError, match="no offsets"):
        read_placement(tmp_path / f"problem.{suffix}")


def test_columns_may_come_in_any_order():
    rows = parse(b"size, upper ,lower,id\n3,4,0,a\n", path="x.csv").problem.requests
    assert (rows[0].id, rows[0].lower, rows[0].upper, rows[0].size) == ("a", 0, 4, 3)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "out.csv"
    target.write_text("good")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(InputError, match="No space"):
        write_atomically(target, "half")
    assert target.read_text() == "good"
    assert list(tmp_path.iterdir()) == [target]


def test_both_formats_hold_the_same(tmp_path):
    problem = parse(GOOD.encode(), path="x.csv").problem
    assert parse(format_csv(problem).encode(), path="x.csv").problem == problem
    assert parse(format_json(problem).encode(), path="x.json").problem == problem
    (tmp_path / "a.JSON").write_text(format_json(problem, (0, 3)))
    assert read_file(tmp_path / "a.JSON").placement.offsets == (0, 3)
