"""Fill-in-the-middle: a source file cut in three at random characters, its middle told last.

The cut falls between characters, not tokens, so that it means the same for every tokenizer. Documents keep their
special tokens as text and name them in `special_tokens` (see `glm45.corpus.document`).
"""

import random
from collections.abc import Iterator

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from glm45.config import configuration
from glm45.seeds import derive_seed

PREFIX, MIDDLE, SUFFIX = "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"
TOKENS = [PREFIX, MIDDLE, SUFFIX]


@configuration
class FillInTheMiddle:
    """The report applies fill-in-the-middle "to all source code" and gives neither rate nor order."""

    rate: float = 0.5
    """Share of source files that are cut; the rest are left as they are. Not in the report."""
    spm_share: float = 0.5
    """Share of cut files in suffix-prefix-middle order; the rest are prefix-suffix-middle. Not in the report."""

    def __post_init__(self) -> None:
        for name in ("rate", "spm_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: a share lies between 0 and 1")


def cut(text: str, random_source: random.Random, spm: bool) -> str:
    """Return `text` cut at two uniform places: prefix, suffix, middle, or with `spm` suffix, prefix, middle."""
    first, second = sorted(random_source.randint(0, len(text)) for _ in range(2))
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if spm:
        return f"{SUFFIX}{suffix}{PREFIX}{prefix}{MIDDLE}{middle}"
    return f"{PREFIX}{prefix}{SUFFIX}{suffix}{MIDDLE}{middle}"


def join(text: str) -> str:
    """Return the file that `cut` was given: the inverse, for tests and for readers."""
    first, _, rest = text.partition(SUFFIX if text.startswith(SUFFIX) else PREFIX)[2].partition(
        PREFIX if text.startswith(SUFFIX) else SUFFIX
    )
    second, _, middle = rest.partition(MIDDLE)
    return second + middle + first if text.startswith(SUFFIX) else first + middle + second


class FillInTheMiddleStep(PipelineStep):
    """Cuts a share of the source files that pass; which ones depends on the seed and the document's id alone."""

    type = "✂️ - CODE"
    name = "fill in the middle"

    def __init__(self, config: FillInTheMiddle, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass documents on, source files cut; held-out ones and those that spell a special token are left alone."""
        for document in data or ():
            metadata = document.metadata
            random_source = random.Random(derive_seed(self.seed, "fim", document.id))
            wanted = metadata["kind"] == "code" and metadata.get("bucket") != "heldout"
            if wanted and random_source.random() < self.config.rate:
                if any(token in document.text for token in TOKENS):
                    self.stat_update("spells a special token")
                else:
                    spm = random_source.random() < self.config.spm_share
                    document.text = cut(document.text, random_source, spm)
                    metadata["special_tokens"] = TOKENS
                    metadata["fim"] = "spm" if spm else "psm"
            yield document
