"""Peak memory and time of the output layer with its loss at 7B shapes (4,096 wide, 32,000 tokens): full logits, as a
usual trainer makes them, against answers only, chunk by chunk.

    python benchmarks/loss_layer.py [--tokens 4096] [--record]

Supervised shares are LLaVA's: 20 of 598 tokens a caption (stage 1, the layer frozen), 140 of 850 a conversation (stage
2, the layer trained). Peaks are the most bytes alive at once beyond inputs and weights, by torch's allocation events;
the gradient of a trained layer's own weight is left out of both (it has to be there). Prints one JSON line a case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from llava.train.loss import answer_loss

WIDTH, VOCABULARY = 4096, 32000
SHARES = {"stage 1": 20 / 598, "stage 2": 140 / 850}


def measure(work: Callable[[], object]) -> tuple[int, float]:
    """(most bytes alive at once, processor seconds)."""
    started = time.process_time()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    seconds = time.process_time() - started
    now = highest = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest, seconds


def run(stage: str, tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(stage == "stage 2")
    hidden = torch.randn(1, tokens, WIDTH, requires_grad=True)
    count = int(tokens * SHARES[stage])
    predictors = torch.linspace(0, tokens - 2, count).long()
    targets = torch.randint(0, VOCABULARY, (count,))
    config = SimpleNamespace(vocab_size=VOCABULARY)
    model: Any = SimpleNamespace(
        logits=head, lm_head=head, embed_tokens=nn.Embedding(1, 1), language_model=SimpleNamespace(config=config)
    )

    def full() -> Tensor:
        labels = torch.full((tokens,), -100)
        labels[predictors] = targets
        return functional.cross_entropy(head(hidden).flatten(0, 1).float(), labels, reduction="sum") / count

    def ours() -> Tensor:
        return answer_loss(hidden, model, predictors=predictors, targets=targets, scale=1 / count)

    own = head.weight.numel() * 4 if stage == "stage 2" else 0
    made: dict[str, Any] = {"benchmark": "loss_layer", "case": f"{stage}, {tokens} tokens"}
    gradients = []
    for name, loss in (("full", full), ("ours", ours)):
        hidden.grad = head.weight.grad = None
        peak, seconds = measure(lambda loss=loss: torch.autograd.backward(loss()))
        made |= {f"{name}_peak_mib": (peak - own) / 2**20, f"{name}_seconds": seconds}
        assert hidden.grad is not None
        gradients.append(hidden.grad.clone())
    made["peak_ratio"] = made["full_peak_mib"] / made["ours_peak_mib"]
    made["time_ratio"] = made["full_seconds"] / made["ours_seconds"]
    made["gradients_equal_to_the_bit"] = bool(torch.equal(*gradients))
    made["gradient_difference"] = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for stage in SHARES:
        figures = run(stage, options.tokens)
        print(json.dumps(figures), flush=True)
        if options.record:
            from record import record

            for metric, value in figures.items():
                if isinstance(value, int | float):
                    record("loss_layer", str(figures["case"]), metric, float(value))


if __name__ == "__main__":
    main()
