"""What looks at a run from time to time: router health with alarms, attention logits, held-out loss, samples."""

import json
from pathlib import Path
from typing import Any

from glm45.data.folder import DataFolder
from glm45.data.loader import Batch, held_out_batches
from glm45.seeds import derive_seed
from glm45.text.tokenizer import Tokenizer
from glm45.training.evaluation import continue_text, held_out_losses
from glm45.training.health import attention_logit_range
from glm45.training.metrics import Metrics
from glm45.training.progress import Display
from glm45.training.run import TrainConfig
from glm45.training.state import TrainingState


class Observers:
    """Everything periodic that does not change the run."""

    def __init__(self, config: TrainConfig, data: DataFolder, tokenizer: Tokenizer | None, folder: Path) -> None:
        self.config, self.data, self.tokenizer, self.folder = config, data, tokenizer, folder
        self._held_out: tuple[int, dict[str, list[Batch]]] = (0, {})

    def look(self, state: TrainingState, metrics: Metrics, display: Display) -> None:
        """Do what is due after the step that `state` has just done."""
        last = state.step == state.plan.num_steps
        if state.step % self.config.health.every == 0 or last:
            self._look_at_health(state, metrics, display)
        if state.step % self.config.evaluation.every == 0 or last:
            self._evaluate(state, metrics, display)

    def _look_at_health(self, state: TrainingState, metrics: Metrics, display: Display) -> None:
        balance, alarms = state.router.look()
        event: dict[str, Any] = {"event": "health", "step": state.step, **balance}
        if (batches := self._held_out_batches(state)) and state.world.layout.is_data_parallel:
            tokens_BT = next(iter(batches.values()))[0].tokens_BT[:1, : self.config.health.probe_tokens]
            event["attention_logits"] = attention_logit_range(state.model, tokens_BT.to(state.world.device))
        metrics.event(event)
        for alarm in alarms:
            metrics.event({"event": "alarm", "step": state.step, "message": alarm})
            display.say(f"ALARM at step {state.step}: {alarm}")

    def _evaluate(self, state: TrainingState, metrics: Metrics, display: Display) -> None:
        losses = held_out_losses(state.model, self._held_out_batches(state), state.world, state.pipeline)
        if losses:
            metrics.event({"event": "evaluation", "step": state.step, **losses})
            display.say(f"held-out loss at step {state.step}: {losses['mean']:.4f}")
            if state.best is None or losses["mean"] < state.best[1]:
                state.best = (state.step, losses["mean"])
        if self.tokenizer is not None and self.config.evaluation.prompts and state.world.layout.is_data_parallel:
            self._write_samples(state, display)

    def _write_samples(self, state: TrainingState, display: Display) -> None:
        assert self.tokenizer is not None
        samples = {}
        for number, prompt in enumerate(self.config.evaluation.prompts):
            seed = derive_seed(self.config.seed, "samples", state.step, number)
            samples[prompt] = continue_text(state.model, self.tokenizer, prompt, self.config.evaluation, seed)
        if state.world.rank == 0:
            path = self.folder / "samples" / f"step-{state.step:08d}.json"
            path.write_text(json.dumps(samples, indent=1, ensure_ascii=False))
            prompt, text = next(iter(samples.items()))
            display.say(f"sample: {prompt!r} -> {text!r}")

    def _held_out_batches(self, state: TrainingState) -> dict[str, list[Batch]]:
        """The held-out rows at the sequence length of the stage that the run is in."""
        stage = state.plan.step(max(state.step - 1, 0)).segment.stage
        length, batches = self._held_out
        if length != stage.sequence_length and self.data.held_out:
            rows = max(1, self.config.micro_batch_tokens // stage.sequence_length)
            batches = held_out_batches(self.data, stage.sequence_length, rows, self.config.evaluation.rows)
            self._held_out = (stage.sequence_length, batches)
        return batches
