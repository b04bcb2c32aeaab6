"""What a training run is, as data: the sections of a recipe, every key with its meaning, unknown keys refused.

    model: what the run starts from        data: which conversations, laid out how
    tune:  what learns                     optim: AdamW and its schedule
    run:   where, with what, how often

`train/recipe.py` reads them from YAML.
"""

from __future__ import annotations

from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, strings are not turned into numbers, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class ModelSection(Section):
    """What the run starts from: an existing LLaVA (`path`), or a language model and a vision tower (stage 1)."""

    path: str | None = Field(
        default=None, description="A LLaVA folder or hub id to start from (stage 2 starts from stage 1's)."
    )
    language_model: str | None = Field(
        default=None, description="A language model folder or hub id (with vision_tower)."
    )
    vision_tower: str | None = Field(
        default=None, description="A CLIP or SigLIP folder or hub id (with language_model)."
    )
    base: str | None = Field(default=None, description="The language model beneath a projector-only or LoRA `path`.")
    projector: str = Field(default="mlp2x_gelu", description="linear, mlpNx_gelu or identity; only for a new model.")
    match_embedding_scale: bool = Field(
        default=False,
        description="Scale a new projector's output to the spread of the word embeddings; only for a new model.",
    )
    vision_feature_layer: int | None = Field(
        default=None, description="The tower's hidden state to read; only for a new model."
    )
    image_mode: Literal["pad", "crop", "squash", "anyres"] | None = Field(
        default=None, description="How a picture is brought to the tower's size, of an existing model too."
    )
    image_grid_pinpoints: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = Field(
        default=None, description="Sizes (height, width) that an anyres picture is laid out in, with image_mode anyres."
    )
    start_end_tokens: bool | None = Field(
        default=None, description="Wrap pictures in <im_start> and <im_end> (LLaVA v0); only for a new model."
    )
    template: str | None = Field(
        default=None, description="The chat template of training (`llava train` saves it in the model)."
    )

    @model_validator(mode="after")
    def _one_start(self) -> ModelSection:
        if self.path is None and (self.language_model is None or self.vision_tower is None):
            raise ValueError("give `path`, or both `language_model` and `vision_tower`")
        if self.path is not None and (self.language_model is not None or self.vision_tower is not None):
            raise ValueError("`path` is a whole LLaVA: drop `language_model` and `vision_tower`, or drop `path`")
        return self


class SourceSection(Section):
    """One source of a mixture."""

    file: str = Field(description="A file of conversations, or a pattern of tar shards (`shards/{000..127}.tar`).")
    format: Literal["auto", "llava", "pairs", "sharegpt", "openai", "parquet", "webdataset"] = Field(
        default="auto", description="How the file is written; `auto` looks at the file, never at its name."
    )
    images: str | None = Field(
        default=None, description="The folder that its picture paths begin in; default: data.images, else its own."
    )
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0, description="How often an epoch reads each of its conversations: 2 is twice, .25 one in four."
    )


class DataSection(Section):
    """Which conversations, and how they are laid into rows."""

    files: list[str] = Field(
        default_factory=list, description="Files of conversations of any format, read one after another."
    )
    sources: list[SourceSection] = Field(
        default_factory=list, description="The same with a format, an image folder and a weight each."
    )
    images: str | None = Field(
        default=None, description="The folder that picture paths begin in; default: the file's folder."
    )
    allow_urls: bool = Field(default=False, description="Fetch pictures that records name by a public http(s) address.")
    template: str | None = Field(
        default=None, description="Another template for this run's text only (stage 1 of LLaVA-1.5 trains on `plain`)."
    )
    max_tokens: Count = Field(default=2048, description="The longest conversation, pictures included.")
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="What to do with a longer one: refuse it, leave it out (counted), or keep its first whole turns.",
    )
    max_bad_share: Share = Field(
        default=0.001,
        description="Stop when more than this share of the conversations read so far could not be used; ten (a tenth "
        "of a small data set) are forgiven, unless this is 0.",
    )
    token_cache: str | None = Field(
        default=None, description="A folder to keep tokenised conversations in, for the next run on the same data."
    )
    row_tokens: Count = Field(default=4096, description="The longest row that conversations are packed into.")
    group_by_picture: bool = Field(
        default=True, description="Conversations on one picture share its tokens in one tree."
    )
    conversations_per_tree: Count = Field(
        default=12, description="At most so many conversations share a picture's tokens."
    )
    order: Literal["shuffled", "grouped_by_length", "file"] = Field(
        default="shuffled",
        description="The order of an epoch; grouped_by_length: steps of one modality and like length, as in LLaVA.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(default=2, description="Threads that prepare batches ahead; 0: none.")

    @model_validator(mode="after")
    def _something_to_read(self) -> DataSection:
        if not self.files and not self.sources:
            raise ValueError("no data: name `files` (or `sources`, each with a format, images and weight)")
        if self.order == "grouped_by_length" and self.group_by_picture:
            raise ValueError("order grouped_by_length sorts single conversations: set group_by_picture to false")
        return self


Mode = Literal["frozen", "frozen_4bit", "full", "last_layers", "lora", "qlora"]


class LoraSection(Section):
    """A part's LoRA: W stays, B @ A * alpha / rank is learnt beside it."""

    rank: Count = 64
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: str | None = Field(
        default=None,
        description="A regular expression that a linear layer's full path must match; default: every linear layer of "
        "the part's blocks (never lm_head).",
    )


# LLaVA-1.5's own; a recipe that names only one of them keeps the others.
_LANGUAGE_LORA = {"rank": 128, "alpha": 256.0}


class TuneSection(Section):
    """What learns, part by part.

    frozen: nothing (frozen_4bit: and its linear layers are held in NF4); full: every weight that the loss reaches;
    last_layers: the last `<part>_layers` blocks and what stands behind them; lora: adapters beside its linear layers;
    qlora: the same over NF4 weights with double quantisation. Rows of added tokens and image_newline always learn.
    """

    vision_tower: Mode = "frozen"
    projector: Mode = "full"
    language_model: Mode = "frozen"
    vision_tower_layers: Count | None = Field(default=None, description="With vision_tower: last_layers.")
    projector_layers: Count | None = Field(default=None, description="With projector: last_layers.")
    language_model_layers: Count | None = Field(default=None, description="With language_model: last_layers.")
    vision_tower_lora: LoraSection = LoraSection()
    projector_lora: LoraSection = LoraSection()
    language_model_lora: LoraSection = LoraSection(rank=128, alpha=256.0)

    @field_validator("language_model_lora", mode="before")
    @classmethod
    def _keep_the_other_defaults(cls, given: object) -> object:
        return {**_LANGUAGE_LORA, **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _something_learns(self) -> TuneSection:
        modes = {
            "vision_tower": self.vision_tower,
            "projector": self.projector,
            "language_model": self.language_model,
        }
        if all(mode.startswith("frozen") for mode in modes.values()):
            raise ValueError("every part is frozen; set one of vision_tower, projector, language_model to full or lora")
        for part, mode in modes.items():
            layers = getattr(self, f"{part}_layers")
            if (mode == "last_layers") != (layers is not None):
                raise ValueError(f"{part}: last_layers and {part}_layers go together; give both or neither")
        return self


class OptimSection(Section):
    """AdamW and its schedule. A global step holds `batch_conversations` conversations whatever the layout."""

    learning_rate: Rate = Field(description="Peak learning rate of every trained part that has none of its own.")
    projector_learning_rate: Rate | None = None
    vision_tower_learning_rate: Rate | None = None
    language_model_learning_rate: Rate | None = None
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit keeps the moments in 8 bits (2 bytes a weight, not 8; not exact)."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: Share = Field(default=0.03, description="Share of all steps over which the rate rises from 0.")
    final_share: Share = Field(default=0.0, description="The rate at the last step, as a share of the peak.")
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    batch_conversations: Count = Field(
        default=128, description="Conversations in one global step, all processes together."
    )
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    max_steps: Count | None = Field(default=None, description="Stop after so many steps even if epochs remain.")


class RunSection(Section):
    """Where, with what, how often."""

    out: str | None = Field(default=None, description="The run's folder; it becomes a model that `llava chat` opens.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="What matrix products are computed in; float16 scales the loss."
    )
    parallel: Literal["auto", "ddp", "zero2", "zero3"] = Field(
        default="auto",
        description="With several processes: ddp keeps the model whole on each; zero2 shards gradients and optimizer, "
        "zero3 the weights too (FSDP2). auto: ddp up to a billion trained parameters, else zero3.",
    )
    cpu_offload: bool = Field(default=False, description="With zero2 or zero3: weights and moments wait in CPU memory.")
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        default="auto", description="Recompute activations in the backward pass; auto: only as far as memory asks for."
    )
    feature_cache: str = Field(
        default="auto",
        description="Where a frozen tower's features are kept for later epochs: a folder, off, or auto: in the run's "
        "folder while it runs, where that saves at least a twentieth of the work.",
    )
    feature_cache_gb: Annotated[float, Field(gt=0)] = Field(
        default=50.0, description="The most that the feature cache takes of the disk."
    )
    track: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="Where metrics go besides metrics.jsonl."
    )
    micro_batch_tokens: Count = Field(
        default=16384, description="At most so many tokens (with padding) go forward at once."
    )
    log_every: Count = 1
    save_every: Count = Field(default=500, description="Steps between checkpoints that a later run resumes from.")
    keep: Count = Field(default=2, description="How many checkpoints stay on disk.")
    max_bad_steps: Count = Field(
        default=10, description="Give up after so many steps in a row with a non-finite gradient."
    )
    sample_every: Count | None = Field(default=None, description="Steps between sample answers; default: none.")
    sample_images: list[str] = Field(default_factory=list, description="Pictures to answer about while training.")
    sample_questions: list[str] = Field(default_factory=lambda: ["Describe the picture."])


class Recipe(Section):
    """A whole run. `description` is what `llava recipe list` shows."""

    description: str = ""
    model: ModelSection
    data: DataSection
    tune: TuneSection = TuneSection()
    optim: OptimSection
    run: RunSection = RunSection()

    def as_yaml(self) -> str:
        """The resolved recipe: every key with its value, so that the run can be repeated from this text alone."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
