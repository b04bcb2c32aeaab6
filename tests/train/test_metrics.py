"""The lines of metrics.jsonl."""

import json
from pathlib import Path

from llava.train.loop import StepRecord
from llava.train.metrics import MetricsLog, describe_step, read_metrics, running_mean


def record(step: int, loss: float = 1.5, **changes: object) -> StepRecord:
    values: dict[str, object] = dict(  # noqa: C408 - keywords read better here
        step=step, epoch=0.5, loss=loss, learning_rate=1e-3, grad_norm=0.7, tokens=80, positions=100, answer_tokens=20,
        conversations=4, dropped=0, seconds=0.4, waited_seconds=0.1, skipped=False,
    )  # fmt: skip
    return StepRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_a_line_holds_plain_numbers() -> None:
    line = describe_step(record(3))
    assert line["tokens_per_second"] == 160.0
    assert line["supervised_share"] == 0.25
    assert line["padding_share"] == 0.2
    assert "skipped" not in line


def test_what_is_not_finite_becomes_null_and_is_marked() -> None:
    line = describe_step(record(3, float("nan"), skipped=True))
    assert line["loss"] is None
    assert line["skipped"] is True
    json.dumps(line, allow_nan=False)


def test_a_resumed_log_holds_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write(record(step))
    path.write_text(path.read_text() + '{"step": 6, "lo')
    resumed = MetricsLog(path, resume_at=3)
    resumed.write(record(4))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "m.jsonl").write(record(1))
    MetricsLog(tmp_path / "m.jsonl")
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_the_running_mean_forgets() -> None:
    assert running_mean([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]
