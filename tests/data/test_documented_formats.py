"""docs/data.md: every example of a format is read as it stands."""

import re
from pathlib import Path

import pytest
from PIL import Image

from llava.data.sources import FORMATS, read_conversations

PAGE = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Formats") : PAGE.index("## Several sources")]
EXAMPLES = re.findall(r"\(`format: (\w+)`.*?```json\n(.*?)```", SECTION, flags=re.DOTALL)


def test_the_page_names_every_format() -> None:
    assert set(re.findall(r"`format: (\w+)`", SECTION)) == set(FORMATS) - {"auto"}
    assert {name for name, _ in EXAMPLES} == {"llava", "pairs", "sharegpt", "openai"}


@pytest.mark.parametrize(("name", "text"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_is_read_with_its_format_and_without(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "set1").mkdir()
    for picture in ("cat", "dog"):
        Image.new("RGB", (8, 8)).save(tmp_path / "set1" / f"{picture}.jpg")
    # JSONL has one record a line; the page breaks long ones.
    path = tmp_path / "example.json"
    path.write_text(text if text.startswith("[") else re.sub(r"\n +", " ", text))
    opened = read_conversations(path, format=name)
    told_apart = read_conversations(path)
    assert len(opened) == len(told_apart) >= 1
    for one, other in zip(opened, told_apart, strict=True):
        assert one == other
        assert one.messages[-1].role == "assistant"
        assert all(Path(str(image.source)).is_file() for image in one.images)
    assert list(opened.unusable()) == []
