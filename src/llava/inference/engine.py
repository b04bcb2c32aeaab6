"""The engine: token ids and pictures in, token ids out, many requests stepped together.

It knows nothing of text: `llava.prompt.processor` makes its input, `llava.inference.detokenize` reads its output.
A step first reads the prompts that wait, those that begin with the same picture together, then adds one token to every
answer under way. Each request has its own sampling, its own end, and an answer that does not depend on its company.

    engine = Engine(model)
    for token_id in engine.submit(encoded, params): ...            # one answer as it comes; .cancel() ends it
    completions = engine.generate(requests)                        # thousands, questions on one picture together

Not covered yet: keeping the keys and values of earlier turns, beam search, logprobs.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava.errors import ContextLengthError, EngineError, OutOfMemoryError
from llava.inference.decoder import Decoder, Group, LlavaLike
from llava.inference.lean import choose_decoder
from llava.inference.sampling import Sampler, SamplingParams
from llava.prompt.processor import Encoded

FinishReason = Literal["stop", "length", "cancelled"]

_GREEDY = SamplingParams()

# Prompts without a picture are read together when at least this many of their first tokens agree.
_MIN_SHARED_TOKENS = 32

# Tiles encoded at once: enough to fill a processor, few enough to bound the memory of the tower's activations.
_MAX_TILES_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Request:
    """One question: an encoded prompt (`Processor.encode(conversation, open_turn=True)`) and how to answer it."""

    encoded: Encoded
    params: SamplingParams = _GREEDY


@dataclass(frozen=True)
class Completion:
    """One answer. token_ids ends with the stop token when finish_reason is "stop"."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may take at once."""

    max_active: int = 256
    """Answers stepped together."""
    max_cache_bytes: int = 4 * 2**30
    """Keys and values of all answers under way; a single larger request still runs, alone."""
    max_feature_bytes: int = 256 * 2**20
    """Image features kept for pictures that are asked about again."""


class Generation:
    """One request on its way. Iterating gives its token ids as they come, and steps the engine meanwhile."""

    def __init__(self, engine: Engine, request: Request, *, max_new_tokens: int) -> None:
        self._engine = engine
        self.request = request
        self.max_new_tokens = max_new_tokens
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: EngineError | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def cancel(self) -> None:
        """End the answer where it is and give its memory back."""
        self._engine.cancel(self)

    def completion(self) -> Completion:
        """The finished answer. Raises what ended it, when something did."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "asked for the completion of an answer under way"
        return Completion(tuple(self.token_ids), self.finish_reason, len(self.request.encoded.input_ids))

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            while given < len(self.token_ids):
                given += 1
                yield self.token_ids[given - 1]
            if self.error is not None:
                raise self.error
            if self.done:
                return
            self._engine.step()


@dataclass(eq=False)
class _Job:
    """A generation with what the engine needs to work on it."""

    generation: Generation
    branch: int
    ids: NDArray[np.int64]
    pictures: tuple[bytes, ...]
    end_of_pictures: int
    """Index after the last placeholder, 0 without pictures."""
    sampler: Sampler | None
    """None when the batch's argmax is the answer."""
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)


class Engine:
    """Answers requests with one model. Safe to call from several threads; work is done by whoever calls `step`."""

    def __init__(
        self,
        model: LlavaLike,
        *,
        decoder: Decoder | None = None,
        limits: EngineLimits | None = None,
    ) -> None:
        """decoder: None picks the fastest that is right for the model's language model.

        Weights of small models are copied here: build a new engine after they have been trained further.
        """
        self._model = model
        self.decoder = choose_decoder(model) if decoder is None else decoder
        self._limits = limits or EngineLimits()
        self._image_token_id: int = model.config.image_token_id
        self._lock = threading.RLock()
        self._numbers = count()
        self._waiting: deque[_Job] = deque()
        self._active: list[_Job] = []
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.decoder.context_length

    @property
    def num_active(self) -> int:
        """Answers under way, without those that wait."""
        return len(self._active)

    @property
    def feature_bytes(self) -> int:
        """Memory of the image features kept for pictures that may be asked about again."""
        return sum(tensor.nbytes for tensor in self._features.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, encoded: Encoded, params: SamplingParams = _GREEDY) -> Generation:
        """Queue a request. Raises ContextLengthError, before any work, when the prompt leaves no room for an answer."""
        length = len(encoded.input_ids)
        if length == 0:
            raise EngineError("an empty prompt cannot be answered; give at least one token")
        room = self.context_length - length
        if room < 1:
            pictures = f", {sum(encoded.tokens_per_image)} of them pictures" if encoded.tokens_per_image else ""
            raise ContextLengthError(
                f"the prompt has {length} tokens{pictures}, and the model's context is {self.context_length}; "
                "shorten it, drop a picture or start a new conversation"
            )
        generation = Generation(self, Request(encoded, params), max_new_tokens=min(params.max_new_tokens, room))
        with self._lock:
            self._waiting.append(self._make_job(generation))
        return generation

    def generate(
        self, requests: Iterable[Request], *, on_done: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """Answer many requests, in their order. Questions on one picture are fastest next to each other.

        Requests are drawn from the iterable as there is room for them. on_done: called after each step with the number
        of requests that it finished. Raises the first error of any request, and cancels the rest.
        """
        generations: list[Generation] = []
        pending = iter(requests)
        finished = 0
        try:
            more = True
            while True:
                while more and self.num_waiting < self._limits.max_active:
                    request = next(pending, None)
                    if request is None:
                        more = False
                        break
                    generations.append(self.submit(request.encoded, request.params))
                if not (self.num_waiting or self.num_active):
                    break
                self.step()
                if on_done is not None:
                    now = sum(generation.done for generation in generations)
                    on_done(now - finished)
                    finished = now
            return [generation.completion() for generation in generations]
        finally:
            for generation in generations:
                generation.cancel()

    @torch.inference_mode()
    def cancel(self, generation: Generation) -> None:
        """End one answer now; nothing happens when it is done already."""
        with self._lock:
            if generation.done:
                return
            generation.finish_reason = "cancelled"
            self._waiting = deque(job for job in self._waiting if job.generation is not generation)
            self._free([job for job in self._active if job.generation is generation])

    def clear(self) -> None:
        """Forget the image features kept for pictures that may be asked about again."""
        with self._lock:
            self._features.clear()

    @torch.inference_mode()
    def step(self) -> int:
        """Read waiting prompts and add one token to every answer under way; returns how many are left to work on."""
        with self._lock:
            groups = self._admit()
            self._encode_ahead(groups)
            for jobs in groups:
                self._start(jobs)
            if self._active:
                self._advance()
            return len(self._active) + len(self._waiting)

    def _admit(self) -> list[list[_Job]]:
        """Take waiting jobs as far as the limits allow; those with the same beginning stand together."""
        groups: dict[tuple[tuple[bytes, ...], bytes], list[_Job]] = {}
        active = len(self._active)
        budget = self._limits.max_cache_bytes // max(self.decoder.bytes_per_token, 1)
        used = sum(len(job.ids) + job.generation.max_new_tokens for job in self._active)
        while self._waiting and active < self._limits.max_active:
            job = self._waiting[0]
            shared = job.end_of_pictures or _MIN_SHARED_TOKENS
            key = (job.pictures, job.ids[:shared].tobytes())
            tokens = len(job.ids) + job.generation.max_new_tokens
            if key in groups and len(job.ids) > shared:
                tokens -= shared
            if active and used + tokens > budget:
                break
            used += tokens
            active += 1
            groups.setdefault(key, []).append(self._waiting.popleft())
        return list(groups.values())

    def _start(self, jobs: Sequence[_Job]) -> None:
        """Read the prompts of a group and pick their first tokens."""
        self._active.extend(jobs)
        try:
            logits = self.decoder.prefill(self._make_group(jobs), [job.branch for job in jobs])
            self._pick(jobs, logits)
        except torch.OutOfMemoryError:
            self._fail(jobs, "reading the prompt ran out of memory; send a shorter one or fewer pictures")
        except BaseException as error:
            self._fail(jobs, f"reading the prompt failed: {error}")
            raise

    def _advance(self) -> None:
        jobs = list(self._active)
        try:
            last = [job.generation.token_ids[-1] for job in jobs]
            logits = self.decoder.step([job.branch for job in jobs], last)
            self._pick(jobs, logits)
        except torch.OutOfMemoryError:
            self._fail(jobs[-1:], "the answer ran out of memory; ask for fewer tokens or send a shorter prompt")
        except BaseException as error:
            self._fail(jobs, f"a step failed: {error}")
            raise

    def _pick(self, jobs: Sequence[_Job], logits: Tensor) -> None:
        """Choose each job's next token. logits: (len(jobs), V)."""
        best_values, best_ids = logits.max(dim=-1)
        ids: list[int] = best_ids.tolist()
        if not all(map(math.isfinite, best_values.tolist())):
            raise EngineError("the model's output is not finite; its weights or its number format are damaged")
        done = []
        for i, job in enumerate(jobs):
            generation = job.generation
            token_id = ids[i] if job.sampler is None else job.sampler.pick(logits[i])
            generation.token_ids.append(token_id)
            if token_id in job.stop_token_ids:
                generation.finish_reason = "stop"
            elif len(generation.token_ids) >= generation.max_new_tokens:
                generation.finish_reason = "length"
            else:
                continue
            done.append(job)
        self._free(done)

    def _free(self, jobs: Sequence[_Job]) -> None:
        if jobs:
            gone = {job.branch for job in jobs}
            self._active = [job for job in self._active if job.branch not in gone]
            self.decoder.free(sorted(gone))

    def _fail(self, jobs: Sequence[_Job], reason: str) -> None:
        for job in jobs:
            if not job.generation.done:
                job.generation.error = OutOfMemoryError(reason) if "memory" in reason else EngineError(reason)
        self._free(jobs)

    def _make_job(self, generation: Generation) -> _Job:
        encoded, params = generation.request.encoded, generation.request.params
        ids = np.ascontiguousarray(encoded.input_ids, dtype=np.int64)
        pictures = tuple(picture.key for picture in _pictures(encoded))
        is_image = ids == self._image_token_id
        end = int(np.flatnonzero(is_image)[-1]) + 1 if is_image.any() else 0
        sampler = None if params.plain else Sampler(params, ids[~is_image].tolist())
        return _Job(
            generation=generation,
            branch=next(self._numbers),
            ids=ids,
            pictures=pictures,
            end_of_pictures=end,
            sampler=sampler,
            stop_token_ids=frozenset(params.stop_token_ids),
        )

    def _make_group(self, jobs: Sequence[_Job]) -> Group:
        """Split a group's prompts into the beginning they share, pictures included, and what is each one's own."""
        shared = _shared_length([job.ids for job in jobs]) if len(jobs) > 1 else 0
        rows = [torch.from_numpy(job.ids).to(self.decoder.device) for job in jobs]
        return Group(
            prefix_ids=rows[0][:shared],
            image_features=self._image_features(jobs[0]),
            suffix_ids=tuple(row[shared:] for row in rows),
            max_new_tokens=tuple(job.generation.max_new_tokens for job in jobs),
        )

    def _image_features(self, job: _Job) -> Tensor | None:
        """Features of a job's pictures, (F, D), from those kept or encoded now."""
        if not job.pictures:
            return None
        self._encode([job])
        return torch.cat([self._features[key] for key in job.pictures])

    def _encode_ahead(self, groups: Sequence[Sequence[_Job]]) -> None:
        """Encode the pictures of several groups together; one that does not fit is left to its own group."""
        try:
            self._encode([jobs[0] for jobs in groups])
        except torch.OutOfMemoryError:
            return

    def _encode(self, jobs: Sequence[_Job]) -> None:
        """Make sure that the features of these jobs' pictures are in the store, and that it is not too large.

        The pictures of `jobs` stay, whatever their size: they are about to be read.
        """
        missing: dict[bytes, _Picture] = {}
        for job in jobs:
            for picture in _pictures(job.generation.request.encoded, job.pictures):
                if picture.key in self._features:
                    self._features.move_to_end(picture.key)
                else:
                    missing[picture.key] = picture
        for pictures in _in_chunks(list(missing.values())):
            features = self._model.encode_images(
                torch.from_numpy(np.concatenate([picture.tiles for picture in pictures])),
                image_sizes=[picture.size for picture in pictures],
                tiles_per_image=[len(picture.tiles) for picture in pictures],
            )
            self._features.update(zip((picture.key for picture in pictures), features, strict=True))
        needed = {key for job in jobs for key in job.pictures}
        stored = self.feature_bytes
        for key in list(self._features):
            if stored <= self._limits.max_feature_bytes:
                break
            if key not in needed:
                stored -= self._features.pop(key).nbytes


@dataclass(frozen=True, eq=False)
class _Picture:
    """One picture of a request. tiles: (N, 3, H, W); size: its original (height, width)."""

    key: bytes
    tiles: NDArray[np.float32]
    size: tuple[int, int]


def _pictures(encoded: Encoded, keys: Sequence[bytes] | None = None) -> list[_Picture]:
    """A request's pictures, known by their pixels and sizes when no keys are given."""
    counts = encoded.tiles_per_image or (1,) * len(encoded.pixel_values)
    tiles = np.split(encoded.pixel_values, np.cumsum(counts)[:-1]) if counts else []
    sizes = encoded.image_sizes or tuple((array.shape[2], array.shape[3]) for array in tiles)
    if keys is None:
        keys = [_picture_key(array, size) for array, size in zip(tiles, sizes, strict=True)]
    return [_Picture(*parts) for parts in zip(keys, tiles, sizes, strict=True)]


def _picture_key(tiles: NDArray[np.float32], size: tuple[int, int]) -> bytes:
    digest = hashlib.blake2b(repr((tiles.shape, size)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(tiles).data)
    return digest.digest()


def _in_chunks(pictures: Sequence[_Picture]) -> Iterator[list[_Picture]]:
    """Pictures in runs of at most _MAX_TILES_AT_ONCE tiles, one picture at least."""
    chunk: list[_Picture] = []
    tiles = 0
    for picture in pictures:
        if chunk and tiles + len(picture.tiles) > _MAX_TILES_AT_ONCE:
            yield chunk
            chunk, tiles = [], 0
        chunk.append(picture)
        tiles += len(picture.tiles)
    if chunk:
        yield chunk


def _shared_length(rows: Sequence[NDArray[np.int64]]) -> int:
    """How many first tokens all rows share, such that each keeps one token of its own."""
    first = rows[0]
    shared = min(len(row) for row in rows) - 1
    for row in rows[1:]:
        different = np.flatnonzero(first[:shared] != row[:shared])
        if len(different):
            shared = int(different[0])
    return shared
