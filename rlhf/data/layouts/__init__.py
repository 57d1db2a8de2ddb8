"""The layouts in which preference data are published: a registry. A new one is one file, its name here, and a test.

A row has the layout that is the first in `LAYOUTS` to match it. What a layout does not say follows: pairs from its
rankings, demonstrations from the best answers, prompts from the demonstrations.
"""

from rlhf.data.layouts.annotated import ANNOTATED
from rlhf.data.layouts.arena import ARENA
from rlhf.data.layouts.general import GENERAL
from rlhf.data.layouts.layout import Layout
from rlhf.data.layouts.named_prompts import ALPACA, NAMED_PROMPT
from rlhf.data.layouts.pku import PKU
from rlhf.data.layouts.sharegpt import SHAREGPT
from rlhf.data.layouts.shp import SHP
from rlhf.data.layouts.summaries import SUMMARIES
from rlhf.data.layouts.webgpt import WEBGPT

PUBLIC = (PKU, SUMMARIES, WEBGPT, ARENA, SHP, *ANNOTATED, SHAREGPT, NAMED_PROMPT, ALPACA)
LAYOUTS: tuple[Layout, ...] = (*PUBLIC, *GENERAL)


def find_layout(row: object) -> Layout:
    """Return the layout of a row as it was read: a mapping, or a list of messages.

    >>> find_layout({"prompt": "Hi", "responses": [{"content": "a", "score": 1}]}).name
    'K-wise row'
    """
    return next(layout for layout in LAYOUTS if layout.has(row))
