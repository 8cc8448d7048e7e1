"""Load a tokenizer, the model's own or the one given with --tokenizer, together with its chat template.

transformers makes a tokenizer even when its files are missing: an empty stub, or one with a made-up vocabulary.
Their tokens would be meaningless, so the files that the tokenizer's class needs must exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.utils.hub import cached_file

from moewh.ingest.model.repository import looks_like_path, not_fetched
from moewh.warehouse.errors import MoewhError, UsageError, short_message

_WHOLE = "tokenizer.json"
_STAND_INS = ("tokenizer.model", "tekken.json", "tiktoken.model")
"""Files that transformers accepts as the vocabulary of any class."""
_USUAL = (_WHOLE, *_STAND_INS, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files that most tokenizers are saved as."""


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from: a folder or hub id, and how to fetch its files."""

    location: str
    title: str
    """As the user named it."""
    revision: str | None
    """For the hub; None for a folder."""
    trust_remote_code: bool
    named: bool = False
    """Whether it comes from --tokenizer; else it is the model's own."""

    def has(self, file: str) -> bool:
        """Return whether this file exists."""
        return bool(
            cached_file(self.location, file, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        )


def load_tokenizer(source: TokenizerSource, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer; `chat_template` is a file that replaces its chat template.

    Raises MoewhError for one without its files or with broken ones, UsageError for an unusable template.
    """
    template = read_template(Path(chat_template)) if chat_template is not None else None
    if source.named and Path(source.location).is_file():
        raise UsageError(f"--tokenizer {source.title} is a file. Name the folder that holds the tokenizer's files.")
    if source.named and looks_like_path(source.title) and not Path(source.location).exists():
        raise UsageError(f"there is no folder {source.title}. Check the path given to --tokenizer.")
    arguments = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.location, **arguments)
        usable = isinstance(tokenizer, PreTrainedTokenizerBase)
        complete = _has_files(source, type(tokenizer))
    except Exception as error:  # each tokenizer format has its own parser, with its own errors
        if Path(source.location).is_dir() and not any(map(source.has, _USUAL)):
            raise MoewhError(_no_files(source, _USUAL)) from error
        raise MoewhError(_load_failure(source, error)) from error
    if not usable:
        raise MoewhError(f"{source.title} has a {type(tokenizer).__name__}, which cannot tokenise text by itself.")
    if not complete:
        raise MoewhError(_no_files(source, (_WHOLE, *type(tokenizer).vocab_files_names.values())))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _has_files(source: TokenizerSource, kind: type) -> bool:
    """Return whether the files that a tokenizer class requires exist; byte-level classes require none."""
    names: dict[str, str] = getattr(kind, "vocab_files_names", {})
    if not {key for key in names if key != "tokenizer_config_file"}:
        return True
    if issubclass(kind, TokenizersBackend) and source.has(_WHOLE):
        return True
    needed = [name for key, name in names.items() if key.endswith("vocab_file") or key == "merges_file"]
    if needed and all(source.has(name) for name in needed):
        return True
    return issubclass(kind, TokenizersBackend) and any(source.has(name) for name in _STAND_INS)


def _no_files(source: TokenizerSource, wanted: Iterable[str]) -> str:
    advice = "Check --tokenizer." if source.named else "Name the model's tokenizer with --tokenizer ID_OR_PATH."
    names = ", ".join(name for name in dict.fromkeys(wanted) if name != "tokenizer_config.json")
    return (
        f"{source.title} lacks the files of its tokenizer ({names}); without them transformers makes up a vocabulary. "
        f"{advice}"
    )


def _load_failure(source: TokenizerSource, error: Exception) -> str:
    text = f"{type(error).__name__}: {short_message(error)}"
    if "trust_remote_code" in text:
        return f"{source.title} needs code of its own. Read that code, then give --trust-remote-code."
    if line := not_fetched(Path(source.location)):
        return f"cannot load the tokenizer of {source.title}: {line}"
    advice = "Check --tokenizer." if source.named else "Check its files, or name another with --tokenizer ID_OR_PATH."
    return f"cannot load the tokenizer of {source.title}: {text}. {advice}"


def read_template(path: Path) -> str:
    """Return the chat template in a file. Raises UsageError for a file that is not a template."""
    try:
        template = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"--chat-template {path} is not UTF-8. Convert it, or name the Jinja file.") from None
    except OSError as error:
        raise UsageError(f"--chat-template {path} cannot be read: {error.strerror or error}.") from None
    if "messages" not in template:
        raise UsageError(f"--chat-template {path} does not use messages, so it is not a chat template.")
    return template
