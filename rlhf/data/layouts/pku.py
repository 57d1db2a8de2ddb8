"""PKU-SafeRLHF: two responses, the index of the more helpful one and of the safer one."""

from collections.abc import Mapping

from rlhf.data.layouts.layout import Comparison, Layout, better_of


def comparison(row: Mapping[str, object], label: str) -> Comparison:
    """Return the two responses; `better_response_id` is the more helpful one's index, `safer_response_id` the safer one's."""
    better = better_of(row.get(label), label)
    return Comparison(row["prompt"], row["response_0"], row["response_1"], better, (label, row.get(label)))


PKU = Layout(
    "PKU-SafeRLHF",
    "`prompt`, `response_0`, `response_1`, `better_response_id` (or, by `label: safer_response_id`, the safer one)",
    columns=("prompt", "response_0", "response_1", "better_response_id"),
    labels=("better_response_id", "safer_response_id"),
    compares=comparison,
)
