from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import llava
from llava.cli import doctor
from llava.cli.main import main


def test_the_report_names_versions_device_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for wanted in (
        llava.__version__,
        "torch",
        "dtype",
        "memory",
        "disk",
        "llava[quant]" if missing("quant") else "quant",
    ):
        assert wanted in shown


def missing(extra: str) -> list[str]:
    found: list[str] = doctor.read_extras()[extra]["missing"]
    return found


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    about = json.loads(out)
    assert about["llava"] == llava.__version__
    assert about["compute"]["device"] in about["compute"]["devices"] or about["compute"]["device"] == "cpu"
    assert about["compute"]["dtype_reason"]


def test_every_extra_of_the_project_is_described() -> None:
    from importlib import metadata

    assert set(metadata.metadata("llava").get_all("Provides-Extra") or []) == set(doctor.read_extras())


def test_a_missing_package_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "bitsandbytes" else "1.0")
    extra = doctor.read_extras()["quant"]
    assert extra == {"missing": ["bitsandbytes"], "command": "pip install 'llava[quant]'"}


@pytest.mark.parametrize(("place", "says"), [(0, "imported instead"), (99, "hidden by this one")])
def test_another_package_named_llava_is_noticed(
    place: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("")
    ours = Path(llava.__file__).parent
    paths = [str(ours.parent), *sys.path]
    paths.insert(place, str(tmp_path))
    monkeypatch.setattr(sys, "path", paths)
    problems = doctor.find_other_llavas(ours)
    assert len(problems) == 1
    assert says in problems[0]
    assert str(tmp_path) in problems[0]


def test_another_project_installed_under_our_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.2.2.post1" if name == "llava" else "1.0")
    assert any("1.2.2.post1" in problem for problem in doctor.find_problems())


def test_torchvision_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert any("pip uninstall torchvision" in problem for problem in doctor.find_problems())


def test_this_environment_has_no_problems() -> None:
    assert doctor.find_problems() == []
