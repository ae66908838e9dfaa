"""What Prometheus reads: counters named as vLLM names them, under our prefix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from speculens.server.supervisor import Supervisor
from speculens.server.wire import Event, Piece, Ready

PREFIX = "speculens:"
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """A registry of its own, so that two servers in one process do not share their counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of admitted prompts.")
        self.tokens = self._counter("generation_tokens", "Tokens emitted.")
        self.ended = self._counter("request_success", "Sequences that ended, by reason.", "finished_reason")
        self.answers = self._counter("http_requests", "Answers, by path and status.", "path", "status")
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.latency = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self.drafts = self._counter("spec_decode_num_drafts", "Target passes that scored a tree.")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Drafted nodes that were scored.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were kept.")
        self.accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Passes that kept this level.", "position"
        )
        self.loads = self._counter("worker_starts", "Workers that became ready.")

    def watch(self, supervisor: Supervisor) -> None:
        """Read the gauges when they are asked for."""
        running = Gauge(f"{PREFIX}num_requests_running", "Sequences in slots.", registry=self.registry)
        waiting = Gauge(f"{PREFIX}num_requests_waiting", "Sequences that wait for a slot.", registry=self.registry)
        running.set_function(lambda: supervisor.running)
        waiting.set_function(lambda: supervisor.waiting)

    def answered_to(self, path: str, status: int) -> None:
        """Count an HTTP answer; paths that nobody offers are one."""
        self.answers.labels(path if path in PATHS else "other", str(status)).inc()

    def count(self, event: Event) -> None:
        """Everything that the worker says passes here."""
        if isinstance(event, Ready):
            self.loads.inc()
        if not isinstance(event, Piece):
            return
        self.tokens.inc(event.tokens)
        if event.finish_reason and event.stats:
            stats = event.stats
            self.prompt_tokens.inc(event.prompt_tokens)
            self.ended.labels(event.finish_reason).inc()
            self.drafts.inc(stats.num_drafts)
            self.drafted.inc(stats.num_draft_tokens)
            self.accepted.inc(stats.num_accepted_tokens)
            for position, count in enumerate(stats.accepted_at):
                self.accepted_at.labels(str(position)).inc(count)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(PREFIX + name, about, buckets=SECONDS, registry=self.registry)
