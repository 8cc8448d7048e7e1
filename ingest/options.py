"""The options of `moewh ingest`: one field per option, checked before anything heavy is loaded.

A field defines its option completely. The command line (`moewh.cli.ingest`), a run's identity
(`moewh.ingest.identity`) and the command that restores a run (`moewh verify`) are derived from the fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.names import check_run_id, run_id_characters

Overflow = Literal["truncate", "chunk", "skip", "error"]
PROMPT_FORMATS = tuple(found.name for found in iter_modules([str(Path(__file__).parent / "prompts" / "formats")]))
"""The modules of `moewh.ingest.prompts.formats`, listed without importing them."""

Shapes = Literal["always", "if given", "no"]
Value = TypeVar("Value")

STDIN = "-"
"""The prompts file that means standard input."""
RECORDS = "records"
"""The name of in-memory records, as a prompts file and as their source."""
DEMO = "demo"
"""The name of the embedded model and of the embedded prompts."""
SEGMENT_ROWS = 64_000_000
"""Routing rows per segment unless the user chooses otherwise, whoever writes the run."""
_NAMES = ("model", "tokenizer")
"""Fields that are checked where they are loaded."""
_OPTION = "option"
"""Key of an `Option` in its field's metadata."""


@dataclass(frozen=True)
class Sampling:
    """How to generate after each prompt: the maximum number of tokens, and how each is chosen."""

    tokens: int
    temperature: float = 0.0
    """0 always takes the most likely token."""
    seed: int = 0
    """Seed of a prompt's sample, together with its prompt_id."""


@dataclass(frozen=True)
class Option:
    """How one field of `IngestOptions` is given on the command line, and whether it shapes rows."""

    flag: str
    help: str
    metavar: str | None = None
    show_default: bool = False
    least: int | None = None
    """Smallest number allowed."""
    choices: tuple[str, ...] = ()
    """The values allowed, where the field's type does not list them; empty for no restriction."""
    shapes: Shapes = "no"
    """When the field is part of a run's identity. A new option is "if given", so that runs without it keep theirs.

    "no" also covers what the identity holds in another form: the model, the prompts and the tokenizer, by digest.
    """
    of_input: bool = False
    """It decides what is read from the same files: what was read with another value is not used again."""
    of_tokens: bool = False
    """It decides the tokens of a prompt, where it is given: runs that differ in it have no token ids in common."""
    repeats_run: bool = False
    """Whether it can be repeated, each value making a separate run: see `each_checkpoint`."""
    read: Callable[[str], str] | None = None
    """Converts the word on the command line to the value."""


def option(default: Value, declared: Option) -> Value:
    """Return a field of `IngestOptions` with a default and its command-line option."""
    return field(default=default, metadata={_OPTION: declared})


def _delimiter(word: str) -> str:
    return "\t" if word in ("\\t", "tab") else word


@dataclass(frozen=True)
class IngestOptions:
    """The options of one run. Lengths are in tokens, sizes in routing rows.

    Each field is an option of `moewh ingest`, in this order. Its type decides what the option takes: a bool is a flag
    that inverts the default, a Literal is a choice, and a tuple can be repeated.
    """

    model: str = field(
        metadata={
            _OPTION: Option(
                "--model",
                "Hub id, folder (of a model or a peft adapter), or demo. Repeat for more checkpoints, each a separate "
                "run.",
                metavar="ID_OR_PATH",
                repeats_run=True,
            )
        }
    )
    prompts: tuple[str, ...] = option(
        (),
        Option(
            "--prompts",
            metavar="FILE",
            help=f"{', '.join(f'.{name}' for name in PROMPT_FORMATS)} (one prompt per line in .txt), also .gz, .zst, "
            ".bz2 or .xz; a folder; a quoted pattern; hf://datasets/ORG/NAME[@REVISION]/FILE; - for standard input; "
            "demo. Repeat for more.",
        ),
    )
    dataset: str | None = option(
        None,
        Option(
            "--dataset",
            metavar="NAME",
            help="Read this data set of the Hub (ORG/NAME[@REVISION]) or folder with the `datasets` library, after the "
            "--prompts.",
        ),
    )
    config: str | None = option(None, Option("--config", metavar="NAME", help="Configuration of the --dataset."))
    split: str | None = option(
        None, Option("--split", metavar="NAME", help="Split of the --dataset.  [default: the only one]")
    )
    prompts_format: str | None = option(
        None,
        Option(
            "--prompts-format",
            choices=PROMPT_FORMATS,
            help="Format of the prompts.  [default: by each file's suffix; standard input: jsonl]",
        ),
    )
    delimiter: str | None = option(
        None,
        Option(
            "--delimiter",
            metavar="CHAR",
            of_input=True,
            help="Delimiter of CSV columns.  [default: as the header shows; a tab in .tsv]",
            read=_delimiter,
        ),
    )
    text_column: str | None = option(
        None,
        Option(
            "--text-column",
            metavar="NAME",
            of_input=True,
            help="Column of the prompts, a.b if nested.  [default: text, else prompt with completion appended, else "
            "instruction, input and output joined by newlines; or one of messages, conversations, input_ids]",
        ),
    )
    domain_column: str = option(
        "domain",
        Option(
            "--domain-column",
            metavar="NAME",
            of_input=True,
            show_default=True,
            help="Column of the prompts' domain, a.b if nested.",
        ),
    )
    domain: str | None = option(
        None, Option("--domain", metavar="NAME", of_input=True, help="The domain of every prompt, instead of a column.")
    )
    revision: str | None = option(
        None,
        Option(
            "--revision",
            metavar="NAME",
            help="Branch, tag or commit of the hub id; checkpoint of the demo. Repeat for more, each a separate run.",
            repeats_run=True,
        ),
    )
    run_id: str | None = option(
        None,
        Option(
            "--run-id",
            metavar="ID",
            help="Run id; with several checkpoints, their common prefix.  [default: the model's name and a digest "
            "of what shapes the rows]",
        ),
    )
    series: str | None = option(
        None,
        Option(
            "--series",
            metavar="NAME",
            help="Name shared by the checkpoints of one training run.  [default: the hub id; of folders named after a "
            "step, their parent; of any other folder, the folder alone]",
        ),
    )
    train_step: int | None = option(
        None,
        Option(
            "--train-step",
            metavar="N",
            least=0,
            help="Training step of this checkpoint, recorded with the run.  [default: from its name]",
        ),
    )
    train_tokens: int | None = option(
        None,
        Option(
            "--train-tokens",
            metavar="N",
            least=0,
            help="Tokens this checkpoint was trained on, recorded with the run.  [default: from its name]",
        ),
    )
    max_length: int | None = option(
        None,
        Option(
            "--max-length",
            metavar="N",
            least=1,
            shapes="always",
            help="Longest context in tokens.  [default: the model's]",
        ),
    )
    on_overflow: Overflow = option(  # noqa: RUF009 - it makes a field
        "truncate",
        Option(
            "--on-overflow",
            show_default=True,
            shapes="always",
            help="What to do with a longer prompt; chunk: consecutive windows, each a separate context.",
        ),
    )
    tokenizer: str | None = option(
        None,
        Option(
            "--tokenizer",
            metavar="ID_OR_PATH",
            help="Tokenizer of a model that was saved without one.  [default: the model's]",
        ),
    )
    chat_template: str | None = option(
        None,
        Option("--chat-template", metavar="FILE", help="Jinja file used instead of the tokenizer's chat template."),
    )
    chat_arguments: tuple[str, ...] = option(
        (),
        Option(
            "--chat-argument",
            metavar="NAME=VALUE",
            shapes="if given",
            of_tokens=True,
            help="Passed to the chat template: enable_thinking=false. VALUE is JSON, or else text. Repeat for more.",
        ),
    )
    special_tokens: bool = option(
        True, Option("--no-special-tokens", shapes="always", help="Do not let the tokenizer add its special tokens.")
    )
    batch_tokens: int = option(
        8_192,
        Option("--batch-tokens", metavar="N", show_default=True, least=1, help="Tokens per batch, padding included."),
    )
    segment_rows: int = option(
        SEGMENT_ROWS,
        Option(
            "--segment-rows",
            metavar="N",
            show_default=True,
            least=1,
            shapes="always",
            help="Approximate routing rows per segment, the unit that is committed and resumed.",
        ),
    )
    limit: int | None = option(
        None, Option("--limit", metavar="N", least=1, of_input=True, shapes="always", help="Only the first N prompts.")
    )
    device: str | None = option(
        None,
        Option(
            "--device",
            metavar="NAME",
            help="cuda, cpu, …; auto: spread the model over all GPUs.  [default: cuda if there is one, "
            "else mps, else cpu]",
        ),
    )
    dtype: str = option(
        "auto",
        Option(
            "--dtype",
            metavar="NAME",
            shapes="always",
            help="float32, float16 or bfloat16.  [default: as stored]",
        ),
    )
    generate: int = option(
        0,
        Option(
            "--generate",
            metavar="N",
            least=0,
            shapes="always",
            help="Generate up to N tokens after each prompt, or to an end token of the model's generation settings.",
        ),
    )
    temperature: float = option(
        0.0,
        Option(
            "--temperature",
            metavar="T",
            show_default=True,
            least=0,
            shapes="always",
            help="Sampling temperature; 0: the most likely token. Other generation settings of the model are not used.",
        ),
    )
    seed: int = option(
        0,
        Option(
            "--seed",
            metavar="N",
            show_default=True,
            least=0,
            shapes="always",
            help="Sampling seed; each prompt also uses its prompt_id.",
        ),
    )
    router_logits: bool = option(
        False,
        Option(
            "--router-logits",
            shapes="always",
            help="Also store the routers' raw logits: 4 bytes per expert, for each token and layer.",
        ),
    )
    hidden_states: str | None = option(
        None,
        Option(
            "--hidden-states",
            metavar="LAYERS",
            shapes="always",
            help="Also store the input of these layers' routers: 0,5 or all.",
        ),
    )
    expert_outputs: bool = option(
        False,
        Option(
            "--expert-outputs",
            shapes="if given",
            help="Also store the norm of each chosen expert's output and its cosine with the routed sum; the experts "
            "run twice.",
        ),
    )
    trust_remote_code: bool = option(
        False, Option("--trust-remote-code", help="Run code that the model's repository holds.")
    )
    allow_pickle: bool = option(
        False, Option("--allow-pickle", help="Load pickled weights (pytorch_model.bin), not only safetensors.")
    )

    def __post_init__(self) -> None:
        """Raise UsageError for a value that no run can have."""
        if self.run_id is not None:
            check_run_id(self.run_id)
        if not self.prompts and self.dataset is None:
            raise UsageError("no prompts were named. Give a file with --prompts, a --dataset, or --prompts demo.")
        if self.dataset is None and (self.config or self.split):
            raise UsageError("--config and --split choose from a --dataset. Name one.")
        if self.delimiter is not None and (len(self.delimiter.encode()) != 1 or self.delimiter in '"\r\n'):
            raise UsageError(f"--delimiter is {self.delimiter!r}. Give one ASCII character, such as ';' or a tab.")
        hints = get_type_hints(type(self))
        for one in fields(self):
            value = getattr(self, one.name)
            _check_number(option_of(one), value)
            if value is not None and (choices := choices_of(hints[one.name], option_of(one))) and value not in choices:
                raise UsageError(f"{option_of(one).flag} is {value!r}. Use {', '.join(choices)}.")
            if value == "" and one.name not in _NAMES:
                raise UsageError(f"{option_of(one).flag} is empty. Is a variable unset? Give a value, or leave it out.")
        if self.generate and self.on_overflow == "chunk":
            raise UsageError("--generate needs a prompt in one piece. Choose another --on-overflow than chunk.")
        if self.domain is not None and self.domain_column != type(self).domain_column:
            raise UsageError("--domain-column has no effect: --domain labels every prompt. Leave one of them out.")

    @property
    def without_effect(self) -> str | None:
        """What to say of options of generation that do nothing; they are not refused, so that older runs resume."""
        if not self.generate:
            given = [flag for flag, value in (("--temperature", self.temperature), ("--seed", self.seed)) if value]
            return f"{' and '.join(given)} without --generate: nothing is generated." if given else None
        if self.seed and not self.temperature:
            return "--seed without --temperature: the most likely token is generated, whatever the seed."
        return None

    @property
    def sampling(self) -> Sampling | None:
        """How to generate; None to generate nothing."""
        return Sampling(self.generate, self.temperature, self.seed) if self.generate else None


MOST = 2**63 - 1
"""The largest whole number that a column of the warehouse, a BIGINT, holds."""


def option_of(one: Field[Any]) -> Option:
    """Return the command-line option of a field of `IngestOptions`."""
    found: Option = one.metadata[_OPTION]
    return found


def _check_number(declared: Option, value: float | None) -> None:
    """Raise UsageError for a number outside the option's limits, and for infinity and nan."""
    if value is None or declared.least is None:
        return
    if isinstance(value, int) and value > MOST:
        raise UsageError(f"{declared.flag} is {value}. Give a whole number of at most {MOST:,}.")
    if not declared.least <= value < float("inf"):
        number = "whole" if isinstance(value, int) else "finite"
        raise UsageError(f"{declared.flag} is {value}. Give a {number} number of at least {declared.least}.")


def choices_of(hint: Any, declared: Option) -> tuple[str, ...]:
    """Return the values that an option of a type allows; empty for no restriction."""
    return get_args(hint) if get_origin(hint) is Literal else declared.choices


def shaping_options(options: IngestOptions, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options' contribution to a run's identity, by field.

    `resolved` holds values that are known only once the model is loaded; they override the ones given.
    """
    shaping = {}
    for one in fields(options):
        shapes, value = option_of(one).shapes, resolved.get(one.name, getattr(options, one.name))
        given = value != one.default if one.default else bool(value)  # (), {} and None all mean: not given
        if shapes == "always" or (shapes == "if given" and given):
            shaping[one.name] = value
    return shaping


def command_words(identity: Mapping[str, Any]) -> list[str]:
    """Return the arguments of `moewh ingest` that reproduce a run's identity: the inverse of `shaping_options`."""
    words = []
    for one in fields(IngestOptions):
        declared, value = option_of(one), identity.get(one.name)
        if declared.shapes == "no" or value is None:
            continue
        if isinstance(value, bool):
            words += [declared.flag] if value is not one.default else []
        elif isinstance(value, dict):
            for name, part in value.items():
                words += [declared.flag, f"{name}={json.dumps(part)}"]
        elif isinstance(value, list | tuple):
            words += [word for part in value for word in (declared.flag, str(part))]
        else:
            words += [declared.flag, str(value)]
    return words


def each_checkpoint(
    models: tuple[str, ...], revisions: tuple[str, ...], run_id: str | None, **others: Any
) -> list[IngestOptions]:
    """Return the options of one run per model and revision, in the order given.

    With more than one, `run_id` is the common prefix of their ids, followed by the revision's or folder's name.
    Raises UsageError for options that cannot apply to several runs.
    """
    if not models:
        raise UsageError("no model was named. Give a hub id or a folder with --model, or --model demo.")
    pairs: list[tuple[str, str | None]] = [(model, revision) for model in models for revision in revisions or (None,)]
    if len(pairs) == 1:
        return [IngestOptions(model=models[0], revision=pairs[0][1], run_id=run_id, **others)]
    for option in ("train_step", "train_tokens"):
        if others.get(option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} applies to one checkpoint. Ingest it by itself.")
    if STDIN in others.get("prompts", ()):
        raise UsageError("standard input can be read only once. Write the prompts to a file for several checkpoints.")
    names = [_checkpoint_name(*pair, several_models=len(models) > 1) for pair in pairs]
    if len(set(names)) < len(names):
        raise UsageError(f"two checkpoints are called {max(names, key=names.count)}. Ingest them one by one.")
    return [
        IngestOptions(model=model, revision=revision, run_id=f"{run_id}-{name}" if run_id else None, **others)
        for (model, revision), name in zip(pairs, names, strict=True)
    ]


def _checkpoint_name(model: str, revision: str | None, *, several_models: bool) -> str:
    """Return a name that distinguishes a checkpoint from the others of one command, in the characters of a run id."""
    base = Path(model).name
    name = revision if revision and not several_models else f"{base}-{revision}" if revision else base
    return run_id_characters(name)
