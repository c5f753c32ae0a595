"""Decoding the `mini` preset in bf16 on a GPU, against transformers' generate on the same weights.

Prints generated tokens a second at several batch sizes with their ratio, and at batch 1 the share of a measured copy
bandwidth at which the weights that a token passes through are read. Does nothing without a GPU.
"""

import argparse
import statistics
import tempfile

import torch
from decode import alternate, median_ratio, timed

PROMPT = 32


class Contest:
    """Both sides with the same random weights, in bf16."""

    def __init__(self, name: str, device: torch.device):
        from transformers import Glm4MoeForCausalLM

        from glm45.engine.engine import Engine
        from glm45.model import hub
        from glm45.model.config import preset
        from glm45.model.transformer import Glm45

        self.config = preset(name)
        self.device = device
        with tempfile.TemporaryDirectory() as folder:
            hub.save(Glm45(self.config, device=device), folder)
            self.engine = Engine(hub.load(folder, dtype=torch.bfloat16, device=device))
            self.peer = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self.peer.set_experts_implementation("grouped_mm")
        self.peer.generation_config.eos_token_id = None

    def prompts(self, count: int, seed: int) -> torch.Tensor:
        """Return random token ids `[count, PROMPT]`: new ones for every seed, so that no prefix is known."""
        return torch.randint(self.config.vocab_size, (count, PROMPT), generator=torch.Generator().manual_seed(seed))

    def ours(self, prompts: torch.Tensor, num_tokens: int) -> None:
        """Generate with the engine."""
        from glm45.engine.request import SamplingParams

        self.engine.generate(prompts.tolist(), SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True))

    def theirs(self, prompts: torch.Tensor, num_tokens: int) -> None:
        """Generate with transformers."""
        with torch.inference_mode():
            tokens = self.peer.generate(prompts.to(self.device), max_new_tokens=num_tokens, do_sample=False)
        assert tokens.tolist(), "reading the tokens waits for the device"


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Return bytes a second, read and written, of one large copy: the best of ten."""
    source, target = torch.ones(2, num_bytes, dtype=torch.uint8, device=device)
    return 2 * num_bytes / min(timed(lambda: int(target.copy_(source)[-1])) for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 32, 256])
    parser.add_argument("--tokens", type=int, default=128, help="generated for each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copy-bytes", type=int, default=2**31, help="size of the copy that gives the bandwidth")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU on this machine: nothing was measured")
        return
    from glm45.model.census import census

    contest, bandwidth = Contest(options.preset, device), copy_bandwidth(device, options.copy_bytes)
    counted = census(contest.config)
    bytes_per_token = 2 * (counted.active + counted.components["head"])  # of weights; keys and values are few here
    print(f"{options.preset} in bf16 on {device}; copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    for batch in options.batches:
        wall, _ = alternate(
            {
                "ours": lambda seed, batch=batch: contest.ours(contest.prompts(batch, seed), options.tokens),
                "theirs": lambda seed, batch=batch: contest.theirs(contest.prompts(batch, seed), options.tokens),
            },
            options.rounds,
        )
        rates = {name: batch * options.tokens / statistics.median(took) for name, took in wall.items()}
        ratio = median_ratio(wall["theirs"], wall["ours"])
        print(f"  batch {batch}: {rates['ours']:,.0f} tokens/s, {ratio:.2f} times transformers' {rates['theirs']:,.0f}")
        if batch == 1:
            print(f"    weights are read at {rates['ours'] * bytes_per_token / bandwidth:.3f} of the copy bandwidth")
    contest.engine.close()


if __name__ == "__main__":
    main()
