"""JSON and JSONL read record by record: what is skipped, and how wrong lines are named."""

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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"1\n{oops", r"^x line 2 is not valid JSON: .* \(column 2\)$"),
        (b"[1,\n2", r"^x line 2 is not valid JSON"),
        (b"\xff\xfe", "^x is not UTF-8 text"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(content, said):
    with pytest.raises(DataError, match=said):
        list(parse_records(content, "x"))


def test_a_reader_that_stops_early_does_not_meet_what_follows():
    assert next(parse_records(b"1\n{oops", "x")) == ("x line 1", 1)
