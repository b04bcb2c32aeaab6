"""File patterns, as shells read them."""

from pathlib import Path

import pytest

from llava.data.patterns import expand_braces, expand_pattern, is_pattern
from llava.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("x{,y}", ["x", "xy"]),
        ("{only}.tar", ["{only}.tar"]),
        ("{a,{b,c}}", ["a", "b", "a", "c"]),
    ],
)
def test_braces_mean_what_they_mean_in_a_shell(text: str, expected: list[str]) -> None:
    assert sorted(expand_braces(text)) == sorted(expected)


def test_wildcards_come_in_order_of_name(tmp_path: Path) -> None:
    for name in ("2.tar", "10.tar", "1.tar", "note.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in expand_pattern(f"{tmp_path}/*.tar")] == ["1.tar", "10.tar", "2.tar"]
    assert [path.name for path in expand_pattern(f"{tmp_path}/{{2,1}}*.tar")] == ["2.tar", "1.tar", "10.tar"]


def test_a_file_that_is_named_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].json").touch()
    assert expand_pattern(f"{tmp_path}/a[1].json") == [tmp_path / "a[1].json"]
    assert is_pattern("a[1].json") and not is_pattern("a.json")


def test_a_pattern_that_finds_nothing_or_a_file_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.tar").touch()
    with pytest.raises(DataError, match="no file matches"):
        expand_pattern(f"{tmp_path}/*.parquet")
    with pytest.raises(DataError, match=r"names .*1.tar twice"):
        expand_pattern(f"{tmp_path}/{{1.tar,*.tar}}")
    with pytest.raises(DataError, match="more than 1000000 files"):
        expand_pattern("{0..99999999999}.tar")
