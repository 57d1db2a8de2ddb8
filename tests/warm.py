"""What the fork server of `tests.command` imports before it forks."""

import rlhf.cli
import rlhf.pipeline.audit
import rlhf.pipeline.judge
import rlhf.pipeline.rounds
import rlhf.pipeline.stages
import rlhf.report.page  # noqa: F401
