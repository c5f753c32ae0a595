"""What a corpus is made of: the recipe, and the recipes with a name."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import field
from pathlib import Path

from glm45.config import configuration, from_dict
from glm45.corpus.decontaminate import Decontamination
from glm45.corpus.dedup import MinHash
from glm45.corpus.fim import FillInTheMiddle
from glm45.corpus.quality import Quality
from glm45.corpus.repositories import Repositories
from glm45.corpus.rules import Rules
from glm45.corpus.semantic import SemDedup
from glm45.corpus.sources import Source
from glm45.corpus.steps import Executor


@configuration
class CorpusRecipe:
    """Everything that decides what a corpus holds. The report describes the steps and gives almost no numbers."""

    sources: tuple[Source, ...]
    """Where documents come from."""
    rules: Rules = field(default_factory=Rules)
    """Rule filters."""
    minhash: MinHash = field(default_factory=MinHash)
    """Near duplicates by shared words."""
    decontamination: Decontamination = field(default_factory=Decontamination)
    """Removal of what evaluations ask."""
    quality: Quality = field(default_factory=Quality)
    """Quality scorers and buckets."""
    semdedup: SemDedup = field(default_factory=SemDedup)
    """Near duplicates by meaning."""
    fill_in_the_middle: FillInTheMiddle = field(default_factory=FillInTheMiddle)
    """Fill-in-the-middle on source files."""
    repositories: Repositories = field(default_factory=Repositories)
    """Repository contexts and releases."""
    long_characters: int = 100_000
    """Documents from this length on make datasets of their own, to be up-sampled. Not in the report."""
    held_out_fraction: float = 0.01
    """Share of found documents that is kept for evaluation as `<source>-<kind>.heldout`; prompts are divided by the
    project's own fraction (`data.splits`). Not in the report."""
    vocab_size: int = 8192
    """Size of the tokenizer that is trained on the corpus where none is given; 0 leaves the documents to be
    tokenized later, together with others. Not in the report."""
    tokenizer: str = ""
    """Folder of a tokenizer to use instead of training one."""
    num_tasks: int = 8
    """Pieces into which every step's work is cut. Not in the report."""
    executor: Executor = field(default_factory=Executor)
    """Where the steps run."""
    downloads: str = ""
    """Folder where fetched packages are kept; empty is `work/downloads` in the corpus's own folder."""
    seed: int = 0
    """Root seed of everything random in the build."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("a corpus needs at least one source")
        if len(set(names)) < len(names):
            raise ValueError(f"source names {names}: they must differ")
        if self.num_tasks < 1:
            raise ValueError(f"num_tasks = {self.num_tasks}: need at least one")


TESTS = ("test/*", "tests/*", "*/test/*", "*/tests/*", "*/testing/*", "*/idle_test/*")
LARGE_TESTS = ("django/tests/*", "sqlalchemy/test/*", "networkx/*/tests/*", "pytest/testing/*", "scrapy/tests/*")
CARRIED_ALONG = ("*.min.js", "*/locale/*", "*/vendor/*", "*/_vendor/*")
DEMO_PACKAGES = (
    *("click", "django", "docutils", "flask", "networkx", "pyramid", "pytest", "scrapy", "sphinx"),
    *("sqlalchemy", "werkzeug"),
)


def demo() -> CorpusRecipe:
    """The portable default: the standard library, installed packages and pinned source distributions."""
    return CorpusRecipe(
        sources=(
            Source(name="stdlib", reader="stdlib", include=("*.py",), exclude=TESTS, license="PSF-2.0"),
            Source(name="packages", reader="sdists", packages=DEMO_PACKAGES, exclude=LARGE_TESTS + CARRIED_ALONG),
            Source(
                name="docstrings",
                reader="installed",
                packages=("numpy", "scipy", "scikit-learn"),
                include=("*.py",),
                exclude=TESTS,
                docstrings_only=True,
            ),
            Source(name="arithmetic", reader="generated", limit=20_000, license="generated"),
        ),
        repositories=Repositories(context_characters=30_000, max_contexts=8),
        vocab_size=2048,  # the `demo` model's
    )


DEBIAN_DOCUMENTATION = (
    *("python3.11-doc", "perl-doc", "sqlite3-doc", "manpages", "manpages-dev", "git-doc", "vim-doc", "linux-doc-6.1"),
    *("cppreference-doc-en-html", "nodejs-doc", "debian-reference-en", "gnome-user-docs"),
)
DEBIAN_NOTES = ("*changelog*", "*/copyright", "*NEWS.Debian*")
DEBIAN_LANGUAGES = ("libreoffice-help-zh-cn", "debian-handbook", "manpages-zh", "manpages-de", "manpages-fr")
DEBIAN_DICTIONARIES = ("dict-gcide", "dict-foldoc", "dict-jargon")


def debian() -> CorpusRecipe:
    """Debian's documentation in several languages, dictionaries and formal mathematics; needs apt-get."""
    return CorpusRecipe(
        sources=(
            Source(name="docs", reader="debian", packages=DEBIAN_DOCUMENTATION, exclude=DEBIAN_NOTES),
            Source(name="languages", reader="debian", packages=DEBIAN_LANGUAGES, exclude=DEBIAN_NOTES),
            Source(
                name="dictionaries",
                reader="debian",
                packages=DEBIAN_DICTIONARIES,
                exclude=DEBIAN_NOTES,
                max_file_bytes=60_000_000,
            ),
            Source(
                name="metamath",
                reader="debian",
                packages=("metamath-databases",),
                exclude=DEBIAN_NOTES,
                license="CC0-1.0",
                max_file_bytes=60_000_000,
            ),
        ),
        num_tasks=16,
    )


def full() -> CorpusRecipe:
    """Everything within reach of pip and apt: the demo's sources with all their parts, and Debian's."""
    portable, system = demo(), debian()
    return dataclasses.replace(
        system,
        sources=(
            Source(name="stdlib", reader="stdlib", include=("*.py", "*.txt"), license="PSF-2.0"),
            Source(name="packages", reader="sdists"),
            Source(
                name="installed",
                reader="installed",
                packages=("matplotlib", "torch", "transformers", "sympy", "datatrove", "pydantic", "networkx"),
                include=("*.py",),
            ),
            portable.sources[2],
            dataclasses.replace(portable.sources[3], limit=200_000),
            *system.sources,
        ),
        vocab_size=32_768,
    )


RECIPES: dict[str, Callable[[], CorpusRecipe]] = {"demo": demo, "debian": debian, "full": full}


def load(name: str) -> CorpusRecipe:
    """Return the recipe of that name, or the one in a JSON file. Raises ValueError if it is neither."""
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        return from_dict(CorpusRecipe, json.loads(Path(name).read_text()))
    raise ValueError(f"no corpus recipe {name!r}: there are {', '.join(RECIPES)}, or give a JSON file")
