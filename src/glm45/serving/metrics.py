"""Counters and latency histograms, as Prometheus reads them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

LATENCY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
ENGINE_COUNTERS = {
    "steps": "Steps of the engine.",
    "requests": "Requests handed to the engine.",
    "aborted_requests": "Requests ended before they were finished.",
    "prompt_tokens": "Prompt tokens computed or found in the prefix cache.",
    "cached_tokens": "Prompt tokens found in the prefix cache.",
    "generated_tokens": "Tokens generated.",
    "drafted_tokens": "Tokens drafted by the MTP layer.",
    "accepted_tokens": "Drafts that verification kept.",
    "preemptions": "Sequences put back because cache blocks ran out.",
    "errors": "Steps of the engine that failed.",
}
ENGINE_GAUGES = {
    "running": "Sequences that are being computed.",
    "waiting": "Sequences that wait.",
    "blocks": "Blocks of the paged cache.",
    "blocks_in_use": "Blocks in use.",
    "blocks_cached": "Blocks that hold a prefix nobody uses now.",
    "weight_version": "Version of the weights in force.",
}


class Histogram:
    """Counts of observations at or under each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...] = LATENCY_SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the samples in Prometheus's text format."""
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server counts besides the engine's own totals."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        """By route and status."""
        self.stream_errors = 0
        """Streams that ended in an error event."""
        self.disconnects = 0
        """Clients that left before their answer was complete."""
        self.first_token = Histogram()
        self.inter_token = Histogram()
        self.duration = Histogram()

    def render(self, stats: Mapping[str, Any], num_samples: int, num_refused: int) -> str:
        """Return the page that Prometheus scrapes; `stats` are the engine's."""
        lines: list[str] = []
        _declare(lines, "glm45_http_responses_total", "counter", "Responses by route and status.")
        for (route, status), count in sorted(self.responses.items()):
            lines.append(f'glm45_http_responses_total{{route="{route}",status="{status}"}} {count}')
        for name, value, about in (
            ("stream_errors", self.stream_errors, "Streams that ended in an error event."),
            ("client_disconnects", self.disconnects, "Clients that left before their answer was complete."),
            ("refused_requests", num_refused, "Requests refused because the queue was full."),
        ):
            _declare(lines, f"glm45_{name}_total", "counter", about)
            lines.append(f"glm45_{name}_total {value}")
        _declare(lines, "glm45_samples_in_flight", "gauge", "Samples under way or queued in the server.")
        lines.append(f"glm45_samples_in_flight {num_samples}")
        for name, about in ENGINE_COUNTERS.items():
            _declare(lines, f"glm45_engine_{name}_total", "counter", about)
            lines.append(f"glm45_engine_{name}_total {stats.get(name, 0)}")
        for name, about in ENGINE_GAUGES.items():
            _declare(lines, f"glm45_engine_{name}", "gauge", about)
            lines.append(f"glm45_engine_{name} {stats.get(name, 0)}")
        for name, histogram, about in (
            ("first_token_seconds", self.first_token, "From request to first token."),
            ("inter_token_seconds", self.inter_token, "Between successive tokens of a sample."),
            ("request_seconds", self.duration, "From request to last token."),
        ):
            _declare(lines, f"glm45_{name}", "histogram", about)
            lines.extend(histogram.lines(f"glm45_{name}"))
        return "\n".join(lines) + "\n"


def _declare(lines: list[str], name: str, kind: str, about: str) -> None:
    lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
