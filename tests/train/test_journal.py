"""Lines that stand once, whatever the disk and the process do in between."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llava.train.journal import Journal, UnsavedError, naming_unsaved, read_lines, write_durably


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def fill(path: Path, *numbers: int) -> None:
    journal = Journal(path)
    for number in numbers:
        journal.write({"step": number})


def test_a_resumed_journal_drops_what_comes_behind_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, 1, 2, 3, 4)
    journal = Journal(path, resume_at=2)
    journal.write({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_a_run_from_its_beginning_drops_an_earlier_runs_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, 1, 2)
    Journal(path)
    assert not path.exists()


def test_a_line_that_a_kill_cut_short_is_left_out_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, 1, 2)
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    assert steps(path) == [1, 2]
    Journal(path, resume_at=2).write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_texts_with_any_line_end_of_unicode_stay_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Journal(path).write({"step": 1, "answer": "a\u2028b\x85c\r\nd"})
    Journal(path, resume_at=1)
    assert read_lines(path) == [{"step": 1, "answer": "a\u2028b\x85c\r\nd"}]


def test_lines_wait_for_a_full_disk_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    journal = Journal(path)
    journal.write({"step": 1})
    whole = os.fdopen

    def full(handle: int, *args: Any, **more: Any) -> Any:
        os.lseek(handle, len(b'{"step": 1}\n'), os.SEEK_SET)
        os.write(handle, b'{"st')  # a few bytes found room
        os.close(handle)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdopen", full)
    for step in (2, 3):
        journal.write({"step": step})
    with pytest.raises(OSError, match="No space left"):
        journal.sync()
    assert caplog.text.count("its lines wait in memory") == 1
    monkeypatch.setattr(os, "fdopen", whole)
    journal.sync()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_write_that_takes_only_some_bytes_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.fdopen

    class Slow:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Slow":
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def seek(self, place: int) -> None:
            self.file.seek(place)

        def write(self, data: bytes) -> int:
            return self.file.write(data[:3])

    monkeypatch.setattr(os, "fdopen", lambda *args, **more: Slow(whole(*args, **more)))
    fill(tmp_path / "a.jsonl", 1, 2)
    assert steps(tmp_path / "a.jsonl") == [1, 2]


def test_a_text_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_durably(path, "before")

    def failing(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    refusal = r"run.json: cannot be written \(Input/output error\); what was saved before"
    with pytest.raises(UnsavedError, match=refusal), naming_unsaved(path):
        write_durably(path, "after")
    assert path.read_text() == "before"
