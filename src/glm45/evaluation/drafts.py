"""How often the multi-token prediction layer guesses the model's own next token: what speculative decoding lives on."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from glm45.engine.engine import Engine, EngineConfig
from glm45.engine.request import SamplingParams
from glm45.environments.protocol import Task
from glm45.environments.tokens import prompt_ids
from glm45.model import hub
from glm45.text.tokenizer import Tokenizer


def draft_acceptance(path: Path, tasks: Sequence[Task], max_tokens: int = 64) -> float | None:
    """Return the share of one-token drafts that greedy decoding accepts on `tasks`; None without an MTP layer.

    Raises FileNotFoundError or ValueError for a folder that holds no checkpoint.
    """
    model = hub.load(path, device=hub.best_device()).eval()
    if not model.config.num_nextn_predict_layers:
        return None
    tokenizer = Tokenizer.load(path)
    prompts = [prompt_ids(task, tokenizer) for task in tasks]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)

    async def answer_all(engine: Engine) -> None:
        await asyncio.gather(*(engine.generate_async(prompt, params) for prompt in prompts))

    with Engine(model, tokenizer, EngineConfig(num_drafts=1)) as engine:
        asyncio.run(answer_all(engine))
        return engine.stats()["acceptance"]
