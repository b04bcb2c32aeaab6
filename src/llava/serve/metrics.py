"""What `/metrics` says, in Prometheus' text format: requests, times, and the engine's own counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from llava.inference.service import EngineService

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, service: EngineService) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "llava_requests",
            "Requests by route, status and error code.",
            ["route", "status", "code"],
            registry=registry,
        )
        self.in_flight = Gauge("llava_requests_in_flight", "Requests under way, streams too.", registry=registry)
        self.seconds = Histogram(
            "llava_request_seconds", "From a request's first byte to the end of its answer.", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "llava_first_token_seconds", "From a request's first byte to its answer's first words.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.pictures = Counter("llava_pictures", "Pictures in accepted requests.", registry=registry)
        self.left = Counter("llava_clients_left", "Clients that left before their answer's end.", registry=registry)
        ProcessCollector(registry=registry)
        registry.register(_EngineCollector(service))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's counts at the moment of asking."""

    def __init__(self, service: EngineService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        counters: tuple[tuple[str, str, int], ...] = (
            ("answers", "Answers asked of the engine.", stats.requests),
            ("answers_refused", "Answers refused because too many waited.", stats.refused),
            ("answers_failed", "Answers that ended with an error.", stats.failed),
            ("answers_cancelled", "Answers ended before they were done.", stats.cancelled),
            ("prompt_tokens", "Tokens of prompts, pictures' too.", stats.prompt_tokens),
            ("known_prompt_tokens", "Tokens of prompts that were known from before.", stats.known_prompt_tokens),
            ("answer_tokens", "Tokens of answers.", stats.answer_tokens),
        )
        gauges: tuple[tuple[str, str, float], ...] = (
            ("answers_active", "Answers under way.", stats.active),
            ("answers_waiting", "Answers that wait for the engine.", stats.waiting),
            ("feature_bytes", "Memory of image features that are kept.", stats.feature_bytes),
            ("prefix_bytes", "Memory of prompts and answers that are kept.", stats.prefix_bytes),
            ("step_seconds", "How long the engine has been in its present step.", stats.seconds_since_step),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(f"llava_{name}", text, value=value)
        for name, text, now in gauges:
            yield GaugeMetricFamily(f"llava_{name}", text, value=now)
