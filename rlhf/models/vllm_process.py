"""The process of an engine: `python -m rlhf.models.vllm_process FOLDER` reads what `rlhf.models.engine` wrote and answers it."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Sample one answer to each prompt, and write them beside the prompts."""
    from vllm import LLM, SamplingParams  # here, so that this module can be imported where there is none

    from rlhf.files import write_text
    from rlhf.models.engine import ANSWERS, MODEL, REQUESTS

    asked = json.loads((folder / REQUESTS).read_text(encoding="utf-8"))
    memory: dict[str, Any] = {}
    if asked["memory_share"] is not None:
        memory["gpu_memory_utilization"] = asked["memory_share"]
    engine = LLM(
        model=str(folder / MODEL),
        skip_tokenizer_init=True,
        dtype=asked["dtype"],
        max_model_len=asked["longest"],
        generation_config="vllm",  # nothing of what a checkpoint declares
        **memory,
    )
    settings = [
        SamplingParams(
            temperature=asked["temperature"],
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=asked["max_new_tokens"],
            stop_token_ids=asked["end_ids"],
            seed=seed,
            detokenize=False,
        )
        for seed in asked["seeds"]
    ]
    replies = engine.generate([{"prompt_token_ids": row} for row in asked["prompts"]], settings)
    write_text(folder / ANSWERS, json.dumps([list(reply.outputs[0].token_ids) for reply in replies]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)  # an engine's own processes may wait for each other; whoever started this one ends them
