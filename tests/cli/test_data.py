"""`llava data`: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.cli.main import main


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_data(folder: Path, *answers: str) -> Path:
    Image.new("RGB", (80, 60), (200, 0, 0)).save(folder / "a.png")
    records = [
        {
            "id": str(number),
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": answer}],
        }
        for number, answer in enumerate(answers)
    ]
    path = folder / "mix.json"
    path.write_text(json.dumps(records))
    return path


def test_check_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(write_data(tmp_path, "Red.")), "--images", str(tmp_path)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_check_exits_with_2_and_says_what_a_run_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(write_data(tmp_path, "", "", "Red."))]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "mix.json:1 (record 0): turn 2: an answer is empty" in printed
    assert "samples without loss in the place of 2 of 3 conversations (66.67%)" in printed
    assert "so it would stop" in printed
    assert json.loads((tmp_path / "data-check" / "check.json").read_text())["findings"][0]["kind"] == "empty answer"


def test_check_with_a_wrong_picture_folder_asks_about_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    data = write_data(tmp_path, "Red.", "Blue.")
    assert main(["data", "check", str(data), "--images", "elsewhere"]) == 2
    assert (
        "Most pictures are missing: do their paths begin in elsewhere? --images says where." in capsys.readouterr().out
    )


def test_check_with_a_model_counts_tokens_and_what_sharing_saves(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path, "Red.", "It is red.", "Crimson.")
    assert main(["data", "check", str(data), "--model", str(model), "--out", "seen"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "seen" / "check.json").read_text())
    sharing = written["sharing"]
    assert (sharing["pictures_alone"], sharing["pictures_shared"]) == (3, 1)
    assert f"{sharing['tokens_alone']:,} tokens alone, {sharing['tokens_shared']:,} shared" in printed
    assert sharing["tokens_alone"] == written["tokens"]["all"] > sharing["tokens_shared"]


def test_show_prints_a_record_and_writes_its_page_and_drawing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path, "Red.", "It is crimson.")
    assert main(["data", "show", str(data), "1", "--model", str(model), "--html", "r.html", "--save", "r.png"]) == 0
    printed = capsys.readouterr().out
    assert "80 x 60 pixels" in printed
    assert "1 tiles, 16 tokens" in printed
    assert "\ufffd" not in printed, "byte tokens are joined to characters"
    assert "crimson.</s>" in printed
    assert (tmp_path / "r.html").exists()
    assert (tmp_path / "r.png").exists()
    assert main(["data", "show", str(data), "--line", "1"]) == 0
    assert "assistant: It is crimson." in capsys.readouterr().out, "both records stand in line 1"


def test_show_prints_what_does_not_parse_before_it_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"conversations": "none"}\n{"conversations": []}')
    assert main(["data", "show", "bad.jsonl", "0"]) == 2
    printed = capsys.readouterr()
    assert '"conversations": "none"' in printed.out
    assert "bad.jsonl:1: 'conversations' must be a list" in printed.err
    assert main(["data", "show", "bad.jsonl", "2"]) == 2
    assert "record 2: bad.jsonl has 2, numbered from 0" in capsys.readouterr().err


def test_convert_says_what_it_wrote_and_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path, "Red.", "Blue.")
    assert main(["data", "convert", str(data), "out.jsonl", "--to", "openai"]) == 0
    assert "wrote 2 records to out.jsonl (openai)" in capsys.readouterr().out
    assert main(["data", "convert", str(data), "out.jsonl", "--to", "openai"]) == 2
    assert "out.jsonl exists already; give --force" in capsys.readouterr().err
    assert main(["data", "convert", "out.jsonl", "back.json", "--force"]) == 0
    assert json.loads((tmp_path / "back.json").read_text()) == json.loads(data.read_text())


def test_convert_hands_options_to_the_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("where,label\na.png,cat\n")
    assert main(["data", "convert", "t.csv", "out.json", "image=where", "prompt=What?"]) == 0
    (record,) = json.loads((tmp_path / "out.json").read_text())
    assert record["image"] == "a.png"
    assert record["conversations"][0]["value"] == "<image>\nWhat?"
    assert main(["data", "convert", "t.csv", "out2.json", "image"]) == 2
    assert "'image': an option of the reader is key=value" in capsys.readouterr().err


def test_convert_leaves_bad_records_out_when_asked_and_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"conversations": [["q", "a"]]}
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(good)}\n{{}}\n")
    assert main(["data", "convert", "in.jsonl", "out.json"]) == 2
    assert main(["data", "convert", "in.jsonl", "out.json", "--skip-bad"]) == 0
    printed = capsys.readouterr()
    assert "left out: in.jsonl:2: " in printed.err
    assert "wrote 1 records to out.json (llava); left out 1" in printed.out


def test_check_reads_what_a_recipe_reads_with_its_limits(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path, "Red.", "Blue.", "Green " * 30)
    (tmp_path / "mine.yaml").write_text(
        f"model: {{path: {model}}}\ndata: {{files: [{data}], max_tokens: 80}}\noptim: {{learning_rate: 1e-3}}\n"
    )
    assert main(["data", "check", "--recipe", "mine.yaml", "data.conversations_per_tree=2"]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "A run would stop at the first of 1 conversations over data.max_tokens=80" in printed
    assert main(["data", "check", "--recipe", "mine.yaml", "data.too_long=drop"]) == 0
    written = json.loads((tmp_path / "data-check" / "check.json").read_text())
    assert written["limits"]["max_tokens"] == 80
    assert written["kinds"] == {"left out": 1}
    assert written["model"] == str(model)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check"], "name a file to check"),
        (["check", "none.json"], "none.json: cannot be read"),
        (["check", "mix.json", "--template", "plain"], "only with --model"),
        (["check", "--recipe", "none"], "no shipped recipe"),
        (["show", "none.json"], "none.json: cannot be read"),
        (["convert", "none.json", "out.json"], "none.json: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path, "Red.")
    assert main(["data", *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_what_a_stranger_wrote_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    turns = [{"from": "human", "value": f"<image>{evil}"}, {"from": "gpt", "value": evil}]
    (tmp_path / "bad.jsonl").write_text(json.dumps({"image": f"{evil}.png", "conversations": turns}))
    assert main(["data", "check", "bad.jsonl"]) == 2
    assert main(["data", "show", "bad.jsonl", "0"]) == 0
    (tmp_path / "bad.jsonl").write_text(json.dumps({"image": f"{evil}.png", "conversations": evil}))
    assert main(["data", "show", "bad.jsonl", "0"]) == 2
    assert main(["data", "convert", "bad.jsonl", "out.json", "--skip-bad"]) == 2
    printed = capsys.readouterr()
    for control in "\x1b\x07\x9b\u202e":
        assert control not in printed.out
        assert control not in printed.err
