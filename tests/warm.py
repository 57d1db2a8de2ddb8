"""What the fork server of `tests.command` imports before it forks."""

import gc

import rlhf.cli
import rlhf.pipeline.audit
import rlhf.pipeline.label
import rlhf.pipeline.model_commands
import rlhf.pipeline.reward
import rlhf.pipeline.run
import rlhf.pipeline.stages
import rlhf.report.page  # noqa: F401
from tests.undrawn import draw_only_where_asked

draw_only_where_asked()

gc.collect()
gc.freeze()  # a child's garbage collector need not look through the libraries, nor copy their pages
