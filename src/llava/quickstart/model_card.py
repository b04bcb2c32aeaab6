"""The card that lies beside the quickstart's bases: what they are, what they were trained on, what they can do."""

from __future__ import annotations

from typing import Any

_INTRODUCTION = """# The quickstart's two base models

Two tiny models of this project's own making, so that `llava quickstart` needs no download: a vision tower in CLIP's
layout and a Llama language model. Both know one drawn world (one to four flat shapes, five kinds, seven colours) and
nothing else. They are made for showing how a LLaVA is tuned, not for use.

## What they were trained on

**Vision tower** (`vision_tower/`, transformers' `CLIPVisionModel`, 64 px, patch 8, features: `hidden_states[{layer}]`
without CLS). It was trained with a **dense, detector-like loss and not with CLIP's contrastive one**: each patch tells
through a head which shape it lies on, that object's colour and box, and whether the object's centre falls in it. No
text was involved. The head lies beside it (`vision_probe.safetensors`) for measuring the gates only.

**Language model** (`language_model/`, transformers' `LlamaForCausalLM`). It never saw a pixel or the tower. First came
two exercises on random tokens, copying and looking up a record's field (two heads start as the circuit that copies, and
numbers start in order), then questions about scenes. A scene stood in its context as text ("small red circle top
left [0.10, 0.12, 0.30, 0.33]."), and in the later part of the training for some rows as a grid of 8 x 8 places, each
holding the drawn object's shape, colour and box as symbols through a small projector that was thrown away: the form in
which a LLaVA's language model meets pictures, so that the quickstart's two stages have minutes of work left, not hours.
"""


def write_model_card(facts: dict[str, Any]) -> str:
    """Markdown from bases.json's content."""
    gates, wanted = facts["gates"], facts["wanted"]
    tower = [
        f"| {kind} | {least} | {gates['vision_tower'][kind]:.3f} | {gates['vision_tower_second_renderer'][kind]:.3f} |"
        for kind, least in wanted["vision_tower"].items()
    ]
    language = [
        f"| {kind} | {wanted['language_model'].get(kind, '-')} | {value:.3f} |"
        for kind, value in gates["language_model"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    sizes = facts["parameters"]
    return "\n".join(
        [
            _INTRODUCTION.format(layer=facts["vision_feature_layer"]),
            "## What they can do",
            "",
            "Vision tower, per patch that lies on an object, held-out scenes of two to four objects; the second",
            "renderer paints named colours without smoothed edges at 224 to 640 px and scales down (box: IoU > .5).",
            "",
            "| | wanted | own renderer | second renderer |",
            "|---|---|---|---|",
            *tower,
            "",
            "Language model, held-out scenes of two to four objects as text with boxes (box: IoU > .5, others exact).",
            "",
            "| | wanted | reached |",
            "|---|---|---|",
            *language,
            "",
            *(
                ["Short of what was wanted:", "", *(f"- {line}" for line in facts["short"]), ""]
                if facts["short"]
                else []
            ),
            "## How they were made",
            "",
            f"`llava quickstart --rebuild-bases`, seed {facts['seed']}; {sizes['vision_tower']:,} and "
            f"{sizes['language_model']:,} parameters,",
            f"stored in float16. Recipe `{facts['recipe_hash']}`",
            "(sha256 over the settings and the code that decides the result).",
            f"Versions: {versions}.",
            "`benchmarks/quickstart_bases.py` measures the tables again.",
            "",
        ]
    )
