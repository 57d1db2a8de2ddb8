"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server, in a registry of their own.

    Attributes:
        requests: by endpoint and status; 499 is a client that went away.
        request_seconds: from the request's first byte to the reply's last, by endpoint.
        in_flight: requests that are not answered yet.
        queue: texts that wait, by model.
        texts, tokens, padding, cut: scored texts, their tokens, the padding beside them, and texts that lost their
            beginning, by model.
        batch_texts, forward_seconds: texts in a forward, and its duration, by model.
        errors: requests that were not scored, by reason.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_model, registry = ["model"], self.registry
        self.requests = Counter(
            "rlhf_requests", "Requests, by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "rlhf_request_seconds", "Seconds until a reply.", ["endpoint"], registry=registry, buckets=SECONDS
        )
        self.errors = Counter("rlhf_errors", "Requests that were not scored, by reason.", ["reason"], registry=registry)
        self.in_flight = Gauge("rlhf_requests_in_flight", "Requests without a reply.", registry=registry)
        self.queue = Gauge("rlhf_queue_texts", "Texts that wait for their score.", by_model, registry=registry)
        self.texts = Counter("rlhf_texts", "Texts scored.", by_model, registry=registry)
        self.tokens = Counter("rlhf_tokens", "Tokens read.", by_model, registry=registry)
        self.padding = Counter("rlhf_padding_tokens", "Padding beside the tokens.", by_model, registry=registry)
        self.cut = Counter(
            "rlhf_cut_texts", "Texts that were too long and lost their beginning.", by_model, registry=registry
        )
        self.batch_texts = Histogram(
            "rlhf_batch_texts", "Texts in a forward.", by_model, buckets=SIZES, registry=registry
        )
        self.forward_seconds = Histogram(
            "rlhf_forward_seconds", "Seconds of a forward.", by_model, buckets=SECONDS, registry=registry
        )
        ProcessCollector(registry=registry)
