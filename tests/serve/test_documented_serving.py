"""docs/serve.md: its examples run as they stand, and its tables name what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.checkpoint.load import Loaded
from llava.cli.serve import serve
from llava.serve.protocol import ChatRequest
from tests.serve.servers import picture, running

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
SOURCE = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "llava" / "serve").glob("*.py"))


def block(kind: str, holding: str) -> str:
    return next(code for code in re.findall(rf"```{kind}\n(.*?)```", TEXT, flags=re.DOTALL) if holding in code)


def test_the_examples_run(tiny: Loaded, tmp_path: Path) -> None:
    place = tmp_path / "llava-quickstart" / "data" / "images" / "000"
    place.mkdir(parents=True)
    (place / "000000.png").write_bytes(picture(64, 64))

    with running(tiny, key="secret-key-of-ann") as server:
        server.worker.name = "llava-quickstart"

        def run(command: list[str], code: str) -> str:
            code = code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace('"none"', '"secret-key-of-ann"')
            done = subprocess.run(command, input=code, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            return done.stdout

        said = run([sys.executable, "-"], block("python", "openai.OpenAI")).splitlines()
        assert re.fullmatch(r"\d+ \+ \d+ tokens", said[-2])
        assert said[-1].startswith("context_length_exceeded | Error code: 400 - the prompt has ")
        if shutil.which("curl") is None or shutil.which("base64") is None:
            pytest.skip("no curl here")
        key = " -H 'Authorization: Bearer secret-key-of-ann'"
        curl = block("sh", "base64 -w0").replace(" -d @-", f"{key} -d @-")
        answer = json.loads(run(["bash"], curl))
        shown = json.loads(block("json", "chat.completion"))
        assert answer.keys() == shown.keys()
        assert answer["choices"][0].keys() == shown["choices"][0].keys()
        listing = next(line for line in block("sh", "--api-key-file").splitlines() if line.startswith("curl"))
        assert json.loads(run(["bash"], listing)).keys() == json.loads(block("json", '"list"')).keys()


def test_every_code_of_the_table_exists_and_every_code_is_in_it() -> None:
    table = TEXT.split("## Errors")[1].split("## Who may ask")[0]
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", table))
    used = set(re.findall(r'(?:invalid\(|ApiError\(|\d{3},)\s*(?:\d{3},\s*)?"([a-z]+(?:_[a-z]+)+)"', SOURCE))
    used |= {code for code in named if f'"{code}"' in SOURCE}
    assert named == used - {"invalid_request"}


def test_every_parameter_and_option_is_named() -> None:
    for name in ChatRequest.model_fields:
        assert f"`{name}`" in TEXT or name == "model", name
    options = {f"--{name.replace('_', '-')}" for name in serve.__annotations__} - {"--return", "--model"}
    named = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", TEXT))
    assert named - options == set(), "the page names options that do not exist"


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None\nfrom llava.cli.main import main; sys.exit(main(['serve', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "llava serve: the server needs an optional package; pip install 'llava[serve]'"
