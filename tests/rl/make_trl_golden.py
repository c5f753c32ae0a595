"""Write `trl_golden.json`: advantages, losses and gradients of TRL's GRPOTrainer on random tensors.

Run by hand after a change of the fixture: `python tests/rl/make_trl_golden.py`. It drives the trainer's own code: the
advantages come out of `_generate_and_score_completions` with planted rewards, the losses out of `_compute_loss` with
planted log-probabilities in place of the model's.
"""

import json
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

B, T, GROUP, MAX_TOKENS = 8, 6, 4, 10
CASES = {
    "grpo": {"loss_type": "grpo"},
    "dapo, clip-higher": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "grpo, clip-higher": {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
    "dapo, truncated importance": {"loss_type": "dapo"},
}
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.25, 0.5, 2.0, -1.0]


def make_trainer(folder: str, **options) -> GRPOTrainer:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghij"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, **shape))
    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=B,
        num_generations=GROUP,
        max_completion_length=MAX_TOKENS,
        beta=0.0,
        report_to=[],
        use_cpu=True,
        **options,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: REWARDS[: len(completions)],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a b", "c d"]}),
        processing_class=tokenizer,
    )


def advantages(scale: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, scale_rewards=scale)
        trainer.model.train()
        inputs = [{"prompt": "a b"}] * GROUP + [{"prompt": "c d"}] * GROUP
        return trainer._generate_and_score_completions(inputs)["advantages"].tolist()


def loss(name: str, tensors: dict[str, torch.Tensor]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, **CASES[name])
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        trainer.args.steps_per_generation = 1
        logprobs = tensors["logprobs"].clone().requires_grad_()
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None)
        inputs = {
            "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
            "prompt_mask": torch.ones(B, 1, dtype=torch.long),
            "completion_ids": torch.zeros(B, T, dtype=torch.long),
            "completion_mask": tensors["mask"].long(),
            "advantages": tensors["advantages"],
            "old_per_token_logps": tensors["old_logprobs"],
            "num_items_in_batch": tensors["mask"].sum(),
        }
        if "importance" in name:
            trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
            gap = tensors["old_logprobs"] - tensors["rollout_logprobs"]
            inputs["importance_sampling_ratio"] = gap.exp().clamp(max=1.5)
        value = trainer._compute_loss(trainer.model, inputs)
        value.backward()
        return {"loss": value.item(), "gradient": logprobs.grad.tolist()}


def main() -> None:
    generator = torch.Generator().manual_seed(7)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(B, T, generator=generator)

    old = -noise(1.0).abs() - 0.1
    lengths = torch.tensor([6, 3, 1, 5, 2, 6, 4, 1])
    tensors = {
        "old_logprobs": old,
        "logprobs": old + noise(0.3),
        "rollout_logprobs": old + noise(0.4),
        "mask": torch.arange(T) < lengths[:, None],
        "advantages": torch.randn(B, generator=generator),
    }
    golden = {
        "trl": trl.__version__,
        "max_tokens": MAX_TOKENS,
        "rewards": REWARDS,
        "group_ids": [0] * GROUP + [1] * GROUP,
        "advantages_std": advantages("group"),
        "advantages_mean": advantages("none"),
        "tensors": {key: value.tolist() for key, value in tensors.items()},
        "cases": {name: loss(name, tensors) for name in CASES},
    }
    Path(__file__).with_name("trl_golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
