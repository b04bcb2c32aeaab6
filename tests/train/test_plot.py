"""The picture of a run, as SVG and as PNG."""

import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from llava.train.metrics import describe_step
from llava.train.plot import HEIGHT, WIDTH, Figure, Label, Line, draw_run, round_numbers
from tests.train.test_metrics import record

LOSSES = [[], [2.0], [2.0, 2.0], [3.0, float("nan"), 1.0], [0.0] * 30, [-1.0, 5.0], [1e-9, 2e9], [1.0] * 5000]


def figure(losses: list[float]) -> Figure:
    return draw_run([describe_step(record(step, loss)) for step, loss in enumerate(losses, start=1)], title="a <b> & c")


@pytest.mark.parametrize("losses", LOSSES, ids=len)
def test_the_picture_is_whole_whatever_the_losses(losses: list[float]) -> None:
    drawn = figure(losses)
    root = ElementTree.fromstring(drawn.svg())
    assert root.tag.endswith("svg")
    assert "nan" not in drawn.svg()
    for shape in drawn.shapes:
        places = shape.points if isinstance(shape, Line) else [(shape.x, shape.y)]
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places), shape
    image = Image.open(io.BytesIO(drawn.png()))
    assert image.size == (2 * WIDTH, 2 * HEIGHT)


def test_the_loss_falls_to_the_right_in_both_pictures() -> None:
    """The strong curve's blue pixels: upper left high, lower right low."""
    drawn = figure([float(loss) for loss in np.linspace(5.0, 1.0, 200)])
    curve = next(shape for shape in drawn.shapes if isinstance(shape, Line) and shape.width == 2).points
    assert curve[0][0] < curve[-1][0]
    assert curve[0][1] < curve[-1][1]
    pixels = np.asarray(Image.open(io.BytesIO(drawn.png())).convert("RGB")).astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 100
    main = blue[: 2 * 330]
    columns = np.flatnonzero(main.any(axis=0))
    assert main[:, columns[5]].argmax() < main[:, columns[-5]].argmax()


def test_a_spike_is_not_lost_when_a_long_run_is_thinned() -> None:
    losses = [1.0] * 20_000
    losses[12_345] = 1.4
    for level in (1.5, 1.5, 1.5):
        losses += [level] * 50
    faint = [shape for shape in figure(losses).shapes if isinstance(shape, Line) and shape.width == 1]
    curve = max((shape.points for shape in faint), key=len)
    assert len(curve) < 3000
    x_share = 12_345 / len(losses)
    near = [y for x, y in curve if abs((x - 70) / 710 - x_share) < 0.01]
    assert min(near) < sorted(near)[len(near) // 2] - 10


def test_labels_say_the_last_loss_and_the_units() -> None:
    texts = [shape.text for shape in figure([2.0, 1.0]).shapes if isinstance(shape, Label)]
    assert "step 2: loss 1" in texts
    assert {"learning rate", "gradient norm, before clipping", "steps"} <= set(texts)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.37), (-3.0, 8.0), (0.0, 2e-5), (1.0, 2181.0), (0, 1e9)])
@pytest.mark.parametrize("most", [3, 4, 6])
def test_ticks_are_few_round_and_inside(low: float, high: float, most: int) -> None:
    ticks = round_numbers(low, high, most=most)
    assert 1 <= len(ticks) <= most + 1
    assert low <= ticks[0] <= ticks[-1] <= high * (1 + 1e-9)
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)
