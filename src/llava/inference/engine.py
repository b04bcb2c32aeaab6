"""The engine: token ids and pictures in, token ids out, many requests stepped together.

It knows nothing of text: `llava.prompt.processor` makes its input, `llava.inference.detokenize` reads its output.
A step reads the prompts that wait, those that begin with the same picture together, or adds one token to every answer
under way. Each request has its own sampling, its own end, and an answer that does not depend on its company.

    engine = Engine(model)
    for token_id in engine.submit(encoded, params): ...            # one answer as it comes; .cancel() ends it
    completions = engine.generate(requests)                        # thousands, questions on one picture together

What was read and said before is kept (prefix_cache.py): the next turn, or the next person's question on the same
picture, reads only what is new.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava.errors import ContextLengthError, EngineError, LlavaError, OutOfMemoryError
from llava.inference.decoder import Decoder, Group, LlavaLike
from llava.inference.lean import choose_decoder
from llava.inference.pictures import FeatureStore, read_pictures
from llava.inference.prefix_cache import PrefixCache, content_of
from llava.inference.requests import (
    GREEDY,
    Batch,
    Completion,
    EngineLimits,
    Generation,
    Job,
    PromptRead,
    Request,
)
from llava.inference.sampling import Sampler, SamplingParams, read_logprobs
from llava.prompt.processor import Encoded

# What a model raises for an input that it cannot take: it ends the requests at hand, and each raises it to its owner.
_REQUEST_ERRORS = (LlavaError, RuntimeError, ValueError)

# Prompts without a picture are read together when at least this many of their first tokens agree.
_MIN_SHARED_TOKENS = 32


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
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._only_read = False
        self._features = FeatureStore(model, max_bytes=self._limits.max_feature_bytes)
        self.prefixes = PrefixCache(max_bytes=self._limits.max_prefix_bytes)

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
        return self._features.nbytes

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, encoded: Encoded, params: SamplingParams = GREEDY) -> Generation:
        """Queue a request. Raises ContextLengthError, before any work, when the prompt leaves no room for an answer."""
        job = self._make_job(encoded, params)
        self._waiting.append(job)  # without the lock: nobody should wait for a step to end in order to queue
        return job.generation

    def generate(
        self,
        requests: Iterable[Request],
        *,
        on_done: Callable[[int], None] | None = None,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer many requests, in their order. Questions on one picture are fastest next to each other.

        Requests are drawn from the iterable as there is room for them. on_done: called after each step with the number
        of requests that it finished. on_completion: called with each request's number and completion once it is done.
        Raises the first error of any request, and cancels the rest.
        """
        # Done requests are let go of: their pictures would fill the memory.
        under_way: dict[int, Generation] = {}
        completions: list[Completion | None] = []
        pending = iter(requests)
        try:
            more = True
            while True:
                while more and self.num_waiting < self._limits.max_active:
                    request = next(pending, None)
                    if request is None:
                        more = False
                        break
                    under_way[len(completions)] = self.submit(request.encoded, request.params)
                    completions.append(None)
                if not under_way:
                    break
                self.step()
                ended = [number for number, generation in under_way.items() if generation.done]
                for number in ended:
                    completion = under_way.pop(number).completion()
                    completions[number] = completion
                    if on_completion is not None:
                        on_completion(number, completion)
                if on_done is not None:
                    on_done(len(ended))
            return [completion for completion in completions if completion is not None]
        finally:
            for generation in under_way.values():
                generation.cancel()

    def cancel(self, generation: Generation) -> None:
        """End one answer; nothing happens when it is done already. While another thread is in a step, that step ends
        first, and the answer with it.
        """
        generation.cancelled = True
        if self._lock.acquire(blocking=False):
            try:
                self._end_cancelled()
            finally:
                self._lock.release()

    def clear(self) -> None:
        """Forget what is kept for later questions: image features, and the prompts and answers read so far."""
        with self._lock:
            self._features.clear()
            self.prefixes.clear()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Other requests wait while the caller works with the decoder itself."""
        with self._lock:
            yield

    def new_branch(self) -> int:
        """A number for a branch of the decoder that no request has."""
        return next(self._numbers)

    def read_prompt(self, encoded: Encoded, params: SamplingParams) -> PromptRead:
        """Read a prompt and leave the rest to the caller, who works within `alone` and frees the branch."""
        job = self._make_job(encoded, params)
        batch = self._look_up([job])
        logits = self.decoder.prefill(self._make_group(batch), [job.branch])
        return PromptRead(job.branch, logits, job.generation.max_new_tokens)

    @torch.inference_mode()
    def step(self) -> int:
        """Read waiting prompts or add a token to every answer under way; returns how many are left to work on."""
        with self._lock:
            self._end_cancelled()
            batches = deque(self._look_up(jobs) for jobs in self._admit())
            # A first token is handed out before the next one is made; but prompts that keep coming stop nobody for
            # more than one step.
            self._only_read = bool(batches) and not self._only_read
            try:
                self._features.encode_ahead(batch.unread for batch in batches)
                while batches:
                    self._start(batches.popleft())
            finally:
                # Only an interruption leaves batches behind; they wait for the next step.
                self._waiting.extendleft(job for batch in reversed(batches) for job in reversed(batch.jobs))
            if self._active and not self._only_read:
                self._advance()
            self._end_cancelled()
            return len(self._active) + len(self._waiting)

    @torch.inference_mode()
    def _end_cancelled(self) -> None:
        for job in [job for job in tuple(self._waiting) if job.generation.cancelled]:
            self._waiting.remove(job)
            job.generation.finish_reason = "cancelled"
        stopped = [job for job in self._active if job.generation.cancelled]
        for job in stopped:
            job.generation.finish_reason = "cancelled"
        self._remember(stopped)
        self._free(stopped)

    def _admit(self) -> list[list[Job]]:
        """Take waiting jobs as far as the limits allow; those with the same beginning stand together."""
        groups: dict[tuple[tuple[bytes, ...], bytes], list[Job]] = {}
        active = len(self._active)
        budget = self._limits.max_cache_bytes // max(self.decoder.bytes_per_token, 1)
        used = sum(len(job.ids) + job.generation.max_new_tokens for job in self._active)
        while self._waiting and active < self._limits.max_active:
            job = self._waiting[0]
            shared = job.end_of_pictures or _MIN_SHARED_TOKENS
            key = (tuple(picture.key for picture in job.pictures), job.ids[:shared].tobytes())
            tokens = len(job.ids) + job.generation.max_new_tokens
            if key in groups and len(job.ids) > shared:
                tokens -= shared
            if active and used + tokens > budget:
                break
            used += tokens
            active += 1
            groups.setdefault(key, []).append(self._waiting.popleft())
        return list(groups.values())

    def _look_up(self, jobs: Sequence[Job]) -> Batch:
        """Split prompts into what they share and what is each one's own, and find what of the former is known."""
        first = jobs[0]
        shared = _shared_length([job.ids for job in jobs]) if len(jobs) > 1 else 0
        found = self.prefixes.find(first.content, limit=shared if len(jobs) > 1 else len(first.ids) - 1)
        known, known_length = (None, 0) if found is None else found
        before = int((first.ids[:known_length] == self._image_token_id).sum())
        unread = tuple(picture for picture, end in zip(first.pictures, first.picture_ends, strict=True) if end > before)
        for job in jobs:
            job.shared = shared
        return Batch(tuple(jobs), shared or known_length, known, known_length, unread)

    def _start(self, batch: Batch) -> None:
        """Read a batch's prompts and pick their first tokens. What goes wrong is the batch's, not the engine's."""
        jobs = batch.jobs
        self._active.extend(jobs)
        try:
            logits = self.decoder.prefill(self._make_group(batch), [job.branch for job in jobs])
            self.prefixes.hit_tokens += batch.known_length
            self._pick(jobs, logits)
        except torch.OutOfMemoryError:
            self._fail(jobs, OutOfMemoryError("reading the prompt ran out of memory; shorten it or drop a picture"))
        except _REQUEST_ERRORS as error:
            self._fail(jobs, error)
        except BaseException as error:
            self._fail(jobs, error)
            raise

    def _advance(self) -> None:
        jobs = list(self._active)
        try:
            last = [job.generation.token_ids[-1] for job in jobs]
            logits = self.decoder.step([job.branch for job in jobs], last)
            self._pick(jobs, logits)
        except torch.OutOfMemoryError:
            self._fail(jobs[-1:], OutOfMemoryError("the answer ran out of memory; ask for fewer tokens"))
        except _REQUEST_ERRORS as error:
            self._fail(jobs, error)
        except BaseException as error:
            self._fail(jobs, error)
            raise

    def _pick(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """Choose each job's next token. logits: (len(jobs), V)."""
        best_values, best_ids = logits.max(dim=-1)
        ids: list[int] = best_ids.tolist()
        finite = map(math.isfinite, best_values.tolist())
        done, broken = [], []
        for i, (job, is_finite) in enumerate(zip(jobs, finite, strict=True)):
            generation = job.generation
            if not is_finite:
                broken.append(job)
                continue
            token_id = ids[i] if job.sampler is None else job.sampler.pick(logits[i])
            generation.token_ids.append(token_id)
            wanted = generation.request.params.logprobs
            if wanted is not None:
                generation.logprobs.append(read_logprobs(logits[i], token_id, top=wanted))
            if token_id in job.stop_token_ids:
                generation.finish_reason = "stop"
            elif len(generation.token_ids) >= generation.max_new_tokens:
                generation.finish_reason = "length"
            else:
                continue
            done.append(job)
        self._remember(done)
        self._free(done)
        if broken:
            reason = "the model's output is not finite; its weights or its number format are damaged"
            self._fail(broken, EngineError(reason))

    def _remember(self, jobs: Sequence[Job]) -> None:
        """Keep what was computed for answers that end, for prompts that begin like them."""
        for job in jobs:
            generation = job.generation
            # The last token was said and never read; a step that failed may have left the cache further on than that.
            said = np.array(generation.token_ids[:-1], dtype=np.int64)
            content = np.concatenate([job.content, said])
            if not generation.token_ids or not self.prefixes.wants(content[: job.shared or len(content)]):
                continue
            try:
                stored = self.decoder.keep(job.branch)
            except torch.OutOfMemoryError:
                continue
            if stored is not None and stored.length <= len(content):
                self.prefixes.store(content[: stored.length], stored)

    def _free(self, jobs: Sequence[Job]) -> None:
        if jobs:
            gone = {job.branch for job in jobs}
            self._active = [job for job in self._active if job.branch not in gone]
            self.decoder.free(sorted(gone))

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        """End jobs with an error, which each of them raises to whoever iterates over it."""
        for job in jobs:
            if not job.generation.done:
                job.generation.error = error
        self._free(jobs)

    def room_after(self, encoded: Encoded) -> int:
        """How many tokens an answer to this prompt may have. Raises ContextLengthError when there is room for none."""
        length = len(encoded.input_ids)
        if length == 0:
            raise EngineError("an empty prompt cannot be answered; give at least one token")
        room = self.context_length - length
        if room < 1:
            seen = f", {sum(encoded.tokens_per_image)} of them pictures" if encoded.tokens_per_image else ""
            raise ContextLengthError(
                f"the prompt has {length} tokens{seen}, and the model's context is {self.context_length}; "
                "shorten it, drop a picture or start a new conversation"
            )
        return room

    def _make_job(self, encoded: Encoded, params: SamplingParams) -> Job:
        room = self.room_after(encoded)
        generation = Generation(self, Request(encoded, params), max_new_tokens=min(params.max_new_tokens, room))
        ids = np.ascontiguousarray(encoded.input_ids, dtype=np.int64)
        pictures = read_pictures(encoded)
        is_image = ids == self._image_token_id
        keys = [picture.key for picture in pictures]
        rows = encoded.tokens_per_image
        picture_ends = tuple(np.cumsum(rows).tolist())
        if sum(rows) != is_image.sum() or len(rows) != len(keys):
            # Where each picture's placeholders end is not said: they are taken as one picture's.
            keys, rows = [b"".join(keys)], (int(is_image.sum()),)
            picture_ends = rows * len(pictures)
        end = int(np.flatnonzero(is_image)[-1]) + 1 if is_image.any() else 0
        sampler = None if params.plain else Sampler(params, ids[~is_image].tolist())
        return Job(
            generation=generation,
            branch=next(self._numbers),
            ids=ids,
            pictures=pictures,
            end_of_pictures=end,
            picture_ends=picture_ends,
            content=content_of(ids, keys, rows, image_token_id=self._image_token_id),
            sampler=sampler,
            stop_token_ids=frozenset(params.stop_token_ids),
        )

    def _make_group(self, batch: Batch) -> Group:
        rows = [torch.tensor(job.ids, device=self.decoder.device) for job in batch.jobs]
        features = self._features.read(batch.unread)
        if features is not None:
            # A beginning may end inside a picture: what it holds of it is not read again.
            wanted = int((batch.jobs[0].ids[batch.known_length :] == self._image_token_id).sum())
            features = features[len(features) - wanted :]
        return Group(
            prefix_ids=rows[0][: batch.shared],
            image_features=features,
            suffix_ids=tuple(row[batch.shared :] for row in rows),
            max_new_tokens=tuple(job.generation.max_new_tokens for job in batch.jobs),
            known=batch.known,
            known_length=batch.known_length,
        )


def _shared_length(rows: Sequence[NDArray[np.int64]]) -> int:
    """How many first tokens all rows share, such that each keeps one token of its own."""
    first = rows[0]
    shared = min(len(row) for row in rows) - 1
    for row in rows[1:]:
        different = np.flatnonzero(first[:shared] != row[:shared])
        if len(different):
            shared = int(different[0])
    return shared
