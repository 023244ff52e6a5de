"""JSON and JSONL read record by record: what is skipped, and how wrong lines are named."""

import gzip
import json

import pytest

from pitome_vlm.loading.records import DataError, parse_records


def test_records_carry_their_place_and_blank_lines_count():
    lines = '\ufeff{"a": 1}\n\n  \n"line\u2028separator"\r\n[3]'
    assert list(parse_records(lines.encode(), "x")) == [
        ("x line 1", {"a": 1}),
        ("x line 4", "line\u2028separator"),
        ("x line 5", [3]),
    ]
    listed = parse_records(b' [{"id": 7},\n 2]', "x")
    assert list(listed) == [("x record 0 (id 7)", {"id": 7}), ("x record 1", 2)]
    assert not list(parse_records(b"\n", "x"))


def test_line_separators_inside_of_strings_are_text():
    """As `json.dumps(..., ensure_ascii=False)` writes them; lines after them keep their numbers."""
    for mark in "\u2028\u2029\x85\x0b\x0c\x1c\x1e\xa0\ufeff":
        text = json.dumps(f"a{mark}b", ensure_ascii=False) + "\r\n7\n{"
        found = parse_records(text.encode(), "x")
        assert [next(found), next(found)] == [("x line 1", f"a{mark}b"), ("x line 2", 7)]
        with pytest.raises(DataError, match=r"^x line 3 "):
            next(found)


def test_an_id_is_shown_on_one_line_and_not_at_length():
    for own in ("a" * 9000, "a\nb", {"a": ["b"] * 9000}, "\ud83d"):
        (where, _), *_ = parse_records(json.dumps([{"id": own}]).encode(), "x")
        assert where.isprintable()
        assert len(where) < 130


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"1\n{oops", r"^x line 2 is not valid JSON: .* \(column 2\)$"),
        (b"[1,\n2", r"^x line 2 is not valid JSON"),
        (b"\xff\xfe", "^x is not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "^x is not UTF-8 text.*save it as UTF-8"),
        (b"PAR1\x15\x04\x15\xbc", "^x is a Parquet file; it must be JSON or JSONL"),
        (gzip.compress(b"{}", mtime=0), "^x is compressed; it must be JSON or JSONL"),
        (b"1\n" + b"9" * 5000, "^x line 2 cannot be read as JSON: Exceeds the limit"),
        (b"1\n" + b"[" * 100_000, "^x line 2 cannot be read as JSON: maximum recursion"),
        (b'{\n  "data": [1]\n}\n', "^x holds one JSON object over many lines"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(content, said):
    with pytest.raises(DataError, match=said):
        list(parse_records(content, "x"))


def test_a_reader_that_stops_early_does_not_meet_what_follows():
    assert next(parse_records(b"1\n{oops", "x")) == ("x line 1", 1)
