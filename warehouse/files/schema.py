"""Every stored table, defined once: names, types, units, encodings and a description per column.

The Parquet writers, the base views, their comments and the schema page of the docs are derived from
`TABLES`. `run_id` and `segment` are not stored in the files: they come from the path, and every view
puts them first. A new column has the schema version that introduced it (`since`): older files give NULL, and a
warehouse newer than these tables is refused.
Shapes: E experts of a layer, H hidden size, K experts per token (top-k).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 3
"""Version of the layout on disk."""
MANIFEST = "manifest.json"
"""Name of the file that lists the files of a committed folder (see `moewh.warehouse.files.manifest`)."""
OLDER_REMEDY = "Ingest its prompts again, into another folder, or use that moewh."
"""What to do with a warehouse that an older moewh wrote."""
POSITION_BITS = 24
"""token_id = prompt_id * 2**POSITION_BITS + position; a longer prompt is refused."""

Encoding = Literal["dictionary", "plain", "delta", "byte_stream_split"]
Level = Literal["run", "segment", "geometry", "sealed"]
"""The folder of a table's files: a run's own, a segment's, that of a run's geometry, or that of its merged counts."""


@dataclass(frozen=True)
class Column:
    """One column: its DuckDB type, its meaning (with unit), and the encoding of its pages."""

    name: str
    type: str
    description: str
    encoding: Encoding = "dictionary"
    derived: bool = False
    """True for a column that the view computes and no file stores."""
    nullable: bool = True
    """False if every row has a value: the file then stores no null levels and is faster to write and read."""
    since: int = 1
    """The schema version that added it; NULL in older files. It comes after the older columns."""
    merge: Literal["sum", "max"] = "sum"
    """How a rollup's values combine over several segments."""


@dataclass(frozen=True)
class Table:
    """One table: a file of that name in every folder of its level, and a view over all of them."""

    name: str
    level: Level
    file: str
    description: str
    columns: tuple[Column, ...]
    opt_in: bool = False
    """True for a table that only runs with its option have."""
    rollup: bool = False
    """True for counts of a segment's own rows, defined by `queries/rollups/`; sorted by all their columns."""
    counted: str | None = None
    """For an opt-in rollup, the file whose rows it counts. A segment with that file has the rollup."""
    since: int = 1
    """The schema version that added it; an older warehouse has no file of it, and its view has no rows."""
    totals_of: tuple[str, ...] = ()
    """For totals of sealed runs, the rollups that their staging view adds up."""

    @property
    def stored(self) -> tuple[Column, ...]:
        """The columns that the Parquet file holds, in file order."""
        return tuple(column for column in self.columns if not column.derived)

    @property
    def path_columns(self) -> tuple[Column, ...]:
        """The columns that come from the folder names."""
        return (RUN_ID, SEGMENT) if self.level == "segment" else (RUN_ID,)

    @property
    def viewed(self) -> tuple[Column, ...]:
        """The columns of its view, in order: those of the path first."""
        return (*self.path_columns, *self.columns)

    @property
    def may_lack_files(self) -> bool:
        """Whether a warehouse may have no file of this table, not even one without rows, because it is older."""
        return self.level == "geometry" or self.since > 1

    @property
    def newer(self) -> tuple[Column, ...]:
        """The stored columns that older files lack."""
        return tuple(column for column in self.stored if column.since > 1)

    def arrow(self, version: int | None = None) -> pa.Schema:
        """Return the Arrow schema of the Parquet file in this or an older schema version."""
        import pyarrow as pa

        types = {
            "VARCHAR": pa.string(),
            "BIGINT": pa.int64(),
            "INTEGER": pa.int32(),
            "FLOAT": pa.float32(),
            "DOUBLE": pa.float64(),
            "BOOLEAN": pa.bool_(),
            "TIMESTAMP": pa.timestamp("us"),
            "FLOAT[]": pa.list_(pa.float32()),
        }
        return pa.schema(
            [
                pa.field(column.name, types[column.type], column.nullable)
                for column in self.stored
                if column.since <= (version or SCHEMA_VERSION)
            ]
        )


RUN_ID = Column("run_id", "VARCHAR", "The run these rows belong to (from the path).")
SEGMENT = Column("segment", "INTEGER", "The committed unit of work these rows came in (from the path).")

_TOKEN_ID = Column("token_id", "BIGINT", "prompt_id * 2^24 + position: the token's id within its run.", "delta")
_LAYER = Column("layer", "INTEGER", "Layer index in the model; an encoder's layers come before its decoder's.")
_TOKEN_KIND = Column("kind", "VARCHAR", "prompt; special (added by the tokenizer); generated.")
_EXPERT = Column("expert", "INTEGER", "0-based expert index within the layer.")

RUNS = Table(
    "runs",
    "run",
    "run.parquet",
    "One row per run: its model, options, environment and progress.",
    (
        Column("model", "VARCHAR", "Hub id of the model, or the full path of its folder."),
        Column(
            "revision", "VARCHAR", "Branch, tag or commit as requested, NULL for the default; of a folder, its name."
        ),
        Column("commit_hash", "VARCHAR", "Commit of the model repository, if the Hub gave it."),
        Column("series", "VARCHAR", "Checkpoints of one training run share a series."),
        Column("model_type", "VARCHAR", "The configuration's model_type, such as olmoe."),
        Column("num_hidden_layers", "INTEGER", "Transformer layers of the text stack, dense ones included."),
        Column("num_moe_layers", "INTEGER", "Layers with a router: the run's rows in layers."),
        Column("num_experts", "INTEGER", "Routed experts per MoE layer (the largest, if layers differ)."),
        Column("top_k", "INTEGER", "Experts per token (the largest, if layers differ)."),
        Column("dtype", "VARCHAR", "Data type of the model's weights, such as bfloat16."),
        Column("attn_implementation", "VARCHAR", "Attention implementation, such as sdpa."),
        Column("experts_implementation", "VARCHAR", "Experts implementation, such as grouped_mm."),
        Column("device", "VARCHAR", "Device type on which the run was started, such as cuda or cpu."),
        Column("threads", "INTEGER", "CPU threads that torch used when the run was started."),
        Column("max_length", "INTEGER", "Longest context in tokens; longer prompts overflow."),
        Column("train_step", "BIGINT", "Training step of this checkpoint, where known."),
        Column("train_tokens", "BIGINT", "Tokens this checkpoint was trained on, where known."),
        Column("prompts_sha256", "VARCHAR", "Digest of all prompts: text, domain, source and metadata."),
        Column("tokens_key", "VARCHAR", "Runs with an equal key have the same tokens under the same ids."),
        Column("vocabulary_key", "VARCHAR", "Runs with an equal key have the same vocabulary."),
        Column("identity", "VARCHAR", "sha256 of options: runs with an equal identity have equal rows."),
        Column("options", "VARCHAR", "Everything that shapes this run's rows, as a JSON object."),
        Column(
            "origin",
            "VARCHAR",
            "forward (moewh ran the model), recorded (the user's own passes) or imported (another program's trace).",
        ),
        Column("origin_format", "VARCHAR", "Format of the recorded or imported data; NULL for forward."),
        Column("created_at", "TIMESTAMP", "When the run was started, in UTC."),
        Column("moewh_version", "VARCHAR", "Version of moewh that started the run."),
        Column("torch_version", "VARCHAR", "Version of torch that started the run."),
        Column("transformers_version", "VARCHAR", "Version of transformers that started the run."),
        Column(
            "segments_planned",
            "INTEGER",
            "Segments that the complete run will have; NULL if this is known only when its last segment is written.",
        ),
        Column("status", "VARCHAR", "complete if every planned segment is committed, else running.", derived=True),
        Column("segments", "BIGINT", "Segments committed so far.", derived=True),
        Column("prompts", "BIGINT", "Prompts committed so far.", derived=True),
        Column("tokens", "BIGINT", "Tokens committed so far.", derived=True),
    ),
)

LAYERS = Table(
    "layers",
    "run",
    "layers.parquet",
    "One row per run and MoE layer. Dense layers have no row; 'next layer' means the next row here.",
    (
        _LAYER,
        Column("stack", "VARCHAR", "decoder or encoder."),
        Column("module", "VARCHAR", "Path of the module whose experts were observed."),
        Column("router_class", "VARCHAR", "Class of the module that makes the choice; NULL where there is none."),
        Column("num_experts", "INTEGER", "Routed experts E, identity experts included."),
        Column("top_k", "INTEGER", "Experts per token K: a token has exactly K rows here, or none."),
        Column("scoring", "VARCHAR", "Function from logits to weights, such as softmax; NULL if unknown."),
        Column("renormalized", "BOOLEAN", "True if a token's K weights are divided by their sum; NULL if unknown."),
        Column("post_scale", "FLOAT", "Factor the model applies to the routed sum after the weights."),
        Column("num_shared_experts", "INTEGER", "Shared experts, which every token passes through."),
        Column("router_input", "VARCHAR", "experts: the router reads the experts' input tensor; own: another tensor."),
    ),
)

EXPERTS = Table(
    "experts",
    "run",
    "experts.parquet",
    "One row per run, MoE layer and routed expert, including experts that no token chose.",
    (
        _LAYER,
        _EXPERT,
        Column("kind", "VARCHAR", "mlp, or identity for an expert that returns its input."),
        Column(
            "selection_bias",
            "FLOAT",
            "Bias added to the expert's score for the selection only, not for its weight; 0 if none, NULL if unknown.",
        ),
    ),
)

VOCABULARY = Table(
    "vocabulary",
    "run",
    "vocabulary.parquet",
    "One row per run and entry of its tokenizer's vocabulary; no rows if no text is known.",
    (
        Column("vocab_id", "INTEGER", "The tokenizer's id of the entry.", "delta"),
        Column("token", "VARCHAR", "The entry decoded to text by itself; NULL if it has no text.", "plain"),
    ),
)

SEGMENTS = Table(
    "segments",
    "segment",
    "segment.parquet",
    "One row per committed segment: its totals.",
    (
        Column("prompts", "BIGINT", "Prompts in the segment, of any status."),
        Column("tokens", "BIGINT", "Tokens in the segment."),
        Column("routing_rows", "BIGINT", "Rows of routing in the segment."),
        Column("prompts_sha256", "VARCHAR", "Digest of the segment's prompts."),
        Column("last", "BOOLEAN", "True for the run's last segment."),
    ),
)

PROMPTS = Table(
    "prompts",
    "segment",
    "prompts.parquet",
    "One row per run and prompt, in input order.",
    (
        Column("prompt_id", "BIGINT", "0-based ordinal of the prompt in the input.", "delta"),
        Column("domain", "VARCHAR", "Kind of data, as the input labels it; NULL counts as a domain."),
        Column("source", "VARCHAR", "Where the prompt came from: its source column, else its file's name."),
        Column("text", "VARCHAR", "The prompt as it was tokenised."),
        Column("num_tokens", "BIGINT", "Rows this prompt has in tokens."),
        Column(
            "status",
            "VARCHAR",
            "ok; truncated or chunked (over the maximum length); empty (no text); "
            "skipped (over the maximum, with --on-overflow skip); failed (no rows could be captured).",
        ),
        Column("metadata", "VARCHAR", "The input's other columns as a JSON object; NULL if it has none."),
    ),
)

TOKENS = Table(
    "tokens",
    "segment",
    "tokens.parquet",
    "One row per run and token.",
    (
        _TOKEN_ID,
        Column("prompt_id", "BIGINT", "The prompt this token belongs to.", "delta"),
        Column("position", "INTEGER", "0-based position in the prompt; continues across chunks.", "delta"),
        Column("context", "INTEGER", "0-based chunk: tokens attend only within their own context."),
        Column("vocab_id", "INTEGER", "The tokenizer's id of this token."),
        Column("token", "VARCHAR", "The token decoded to text by itself."),
        _TOKEN_KIND,
    ),
)

ROUTING = Table(
    "routing",
    "segment",
    "routing.parquet",
    "One row per run, token, MoE layer and chosen expert; sorted by layer, token_id, rank. "
    "A token has K rows at a layer or none (padding, dropped, skipped or invalid numbers). "
    "The columns from vocab_id to prompt_id repeat the token's values in tokens and prompts.",
    # The encodings here determine the bytes per row: `benchmarks/results/queries.md` has the bits per column.
    (
        replace(_TOKEN_ID, nullable=False),
        replace(_LAYER, encoding="plain", nullable=False),
        Column("rank", "INTEGER", "0-based, by descending weight; ties by expert. NULL if unknown.", "plain"),
        replace(_EXPERT, nullable=False),
        Column(
            "weight",
            "FLOAT",
            "The exact scalar by which the model multiplied this expert's output; a token's weights need not sum to 1. "
            "NULL if unknown.",
            "byte_stream_split",
        ),
        Column("vocab_id", "INTEGER", "The tokenizer's id of the token; NULL if unknown.", "plain"),
        replace(_TOKEN_KIND, nullable=False),
        Column("domain", "VARCHAR", "Domain of the token's prompt; NULL counts as a domain."),
        Column("prompt_id", "BIGINT", "The prompt the token belongs to.", nullable=False),
        Column("vocabulary_key", "VARCHAR", "The key of the run's vocabulary, as in runs.", nullable=False),
    ),
)

ROUTER_LOGITS = Table(
    "router_logits",
    "segment",
    "router_logits.parquet",
    "One row per run, token and MoE layer, for runs with this option.",
    (
        _TOKEN_ID,
        _LAYER,
        Column("logits", "FLOAT[]", "The router's E raw outputs, before softmax and bias.", "byte_stream_split"),
    ),
    opt_in=True,
)

HIDDEN_STATES = Table(
    "hidden_states",
    "segment",
    "hidden_states.parquet",
    "One row per run, token and selected layer, for runs with this option.",
    (
        _TOKEN_ID,
        _LAYER,
        Column("vector", "FLOAT[]", "The router's input, H numbers.", "byte_stream_split"),
    ),
    opt_in=True,
)

EXPERT_OUTPUTS = Table(
    "expert_outputs",
    "segment",
    "expert_outputs.parquet",
    "One row per routing row, for runs with this option; sorted like routing.",
    (
        replace(_TOKEN_ID, nullable=False),
        replace(_LAYER, encoding="plain", nullable=False),
        Column("rank", "INTEGER", "0-based, by descending weight; ties by expert.", "plain", nullable=False),
        replace(_EXPERT, nullable=False),
        Column(
            "norm",
            "FLOAT",
            "Euclidean length of the expert's output before its weight is applied; NULL if not finite.",
            "byte_stream_split",
        ),
        Column(
            "cosine",
            "FLOAT",
            "Cosine of the expert's output and the token's routed sum; NULL if either has length 0 or is not finite.",
            "byte_stream_split",
        ),
    ),
    opt_in=True,
    since=2,
)

_EXPERT_A = Column("expert_a", "INTEGER", "The pair's lower expert index; a pair has one row.")
_EXPERT_B = Column("expert_b", "INTEGER", "The pair's higher expert index.")


def _measure(name: str, description: str) -> Column:
    return Column(name, "DOUBLE", description, "byte_stream_split")


EXPERT_GEOMETRY = Table(
    "expert_geometry",
    "geometry",
    "expert_geometry.parquet",
    "One row per run with a geometry, MoE layer and routed expert: measures of its weights alone. "
    "H is the size of the expert's input, I of its inner layer; biases are ignored.",
    (
        _LAYER,
        _EXPERT,
        _measure("router_norm", "Length of the expert's row in the router; NULL if the router has no such rows."),
        _measure("gate_norm", "Frobenius norm of the gate's weights; NULL for an expert without a gate."),
        _measure("up_norm", "Frobenius norm of the up projection; NULL, like all below, for an identity expert."),
        _measure("down_norm", "Frobenius norm of the down projection."),
        Column("subspace_rank", "INTEGER", "r: dimensions of the subspaces below."),
        _measure(
            "input_share",
            "Share of the router row's energy inside the top-r right singular subspace of [gate; up]; NULL without "
            "a row, if the expert's input is not in the router's space, or if the rank is below r.",
        ),
        _measure("output_share", "The same for the top-r left singular subspace of the down projection."),
        _measure("random_share", "r / H: the expected share of a row in a random direction."),
        _measure("input_kurtosis", "Fourth central moment / variance^2 of the entries of [gate; up]; 3 for a normal."),
        _measure("output_kurtosis", "The same for the down projection."),
        _measure(
            "input_effective_rank",
            "exp of the entropy of the singular values of [gate; up] divided by their sum (Roy and Vetterli 2007).",
        ),
        _measure("output_effective_rank", "The same for the down projection."),
    ),
)

ROUTER_SIMILARITY = Table(
    "router_similarity",
    "geometry",
    "router_similarity.parquet",
    "One row per run that has a geometry, MoE layer and pair of its experts (expert_a < expert_b).",
    (
        _LAYER,
        _EXPERT_A,
        _EXPERT_B,
        _measure("cosine", "Cosine of the two rows of the router; NULL if it has no such rows."),
    ),
)

EXPERT_SIMILARITY = Table(
    "expert_similarity",
    "geometry",
    "expert_similarity.parquet",
    "One row per run that has a geometry, MoE layer and pair of its experts (expert_a < expert_b).",
    (
        _LAYER,
        _EXPERT_A,
        _EXPERT_B,
        _measure("input_cosine", "Cosine of [gate; up], flattened, neuron by neuron; NULL for an identity expert."),
        _measure("output_cosine", "Cosine of the down projections, flattened; NULL for an identity expert."),
        _measure(
            "input_overlap",
            "Mean squared cosine of the principal angles between the top-r right singular subspaces of [gate; up]; "
            "NULL if either's rank is below r.",
        ),
        _measure("output_overlap", "The same for the top-r left singular subspaces of the down projections."),
        _measure("random_overlap", "r / H: the expected overlap of two random subspaces."),
    ),
)

_KIND = Column("kind", "VARCHAR", "Kind of the tokens counted: prompt; special; generated.")
_DOMAIN = Column("domain", "VARCHAR", "Domain of the tokens' prompts; NULL counts as a domain.")

EXPERT_COUNTS = Table(
    "expert_counts",
    "segment",
    "expert_counts.parquet",
    "Rollup. One row per segment, kind, domain, layer and expert with at least one token.",
    (
        _KIND,
        _DOMAIN,
        _LAYER,
        _EXPERT,
        Column("tokens", "BIGINT", "Tokens routed to this expert.", "delta"),
        Column("first_choice_tokens", "BIGINT", "Those of them whose largest weight is this expert's.", "delta"),
        Column(
            "weight_sum",
            "DOUBLE",
            "Sum of its weights in row order; NULL if no weight is known.",
            "byte_stream_split",
        ),
    ),
    rollup=True,
)

PAIR_COUNTS = Table(
    "pair_counts",
    "segment",
    "pair_counts.parquet",
    "Rollup. One row per segment, kind, domain, layer and pair of experts that share at least one token.",
    (
        _KIND,
        _DOMAIN,
        _LAYER,
        Column("expert_a", "INTEGER", "The pair's lower expert index."),
        Column("expert_b", "INTEGER", "The pair's higher expert index."),
        Column("tokens", "BIGINT", "Tokens routed to both.", "delta"),
    ),
    rollup=True,
)

_TRANSITION_KEYS = (
    _LAYER,
    Column("next_layer", "INTEGER", "The next MoE layer: the next row of layers."),
    Column("expert", "INTEGER", "Expert chosen at layer."),
    Column("next_expert", "INTEGER", "Expert chosen at next_layer."),
)

TRANSITION_COUNTS = Table(
    "transition_counts",
    "segment",
    "transition_counts.parquet",
    "Rollup. One row per segment, kind, domain, layer and pair of experts, one at the layer and one at the next MoE "
    "layer, that share at least one token.",
    (
        _KIND,
        _DOMAIN,
        *_TRANSITION_KEYS,
        Column("tokens", "BIGINT", "Tokens routed to both.", "delta"),
        Column("first_choice_tokens", "BIGINT", "Those of them for which both are first choices.", "delta"),
    ),
    rollup=True,
)

AFFINITY_COUNTS = Table(
    "affinity_counts",
    "segment",
    "affinity_counts.parquet",
    "Rollup. One row per segment, kind, layer, expert and vocabulary entry with at least one token.",
    (
        _KIND,
        _LAYER,
        _EXPERT,
        Column("vocab_id", "INTEGER", "The tokenizer's id of the token.", "delta"),
        Column("tokens", "BIGINT", "Occurrences of this token routed to this expert."),
    ),
    rollup=True,
)

VOCAB_COUNTS = Table(
    "vocab_counts",
    "segment",
    "vocab_counts.parquet",
    "Rollup. One row per segment, kind, layer and vocabulary entry that has rows at the layer.",
    (
        _KIND,
        _LAYER,
        Column("vocab_id", "INTEGER", "The tokenizer's id of the token.", "delta"),
        Column("token", "VARCHAR", "The token decoded to text by itself."),
        Column("tokens", "BIGINT", "Occurrences of this token with rows at the layer."),
    ),
    rollup=True,
)

REPETITION_COUNTS = Table(
    "repetition_counts",
    "segment",
    "repetition_counts.parquet",
    "Rollup. One row per segment, domain and layer with at least one pair of adjacent tokens: positions p and p + 1 "
    "of one prompt and context, both of kind prompt or generated, both with rows at the layer.",
    (
        _DOMAIN,
        _LAYER,
        Column("pairs", "BIGINT", "Pairs of adjacent tokens."),
        Column("first_choice_pairs", "BIGINT", "Those with the same first choice."),
        Column("any_choice_pairs", "BIGINT", "Those that share at least one expert."),
    ),
    rollup=True,
)

EXPERT_OUTPUT_COUNTS = Table(
    "expert_output_counts",
    "segment",
    "expert_output_counts.parquet",
    "Rollup of expert_outputs, in segments that have them. One row per segment, kind, domain, layer and expert with at "
    "least one choice whose norm is known.",
    (
        _KIND,
        _DOMAIN,
        _LAYER,
        _EXPERT,
        Column("choices", "BIGINT", "Choices of this expert whose norm is known.", "delta"),
        _measure("norm_sum", "Sum of their norms in row order."),
        _measure("weighted_norm_sum", "Sum of weight * norm in row order."),
        _measure("squared_norm_sum", "Sum of norm^2 in row order."),
        replace(_measure("max_norm", "The largest of their norms."), merge="max"),
        Column("cosines", "BIGINT", "Those of them whose cosine is known.", "delta"),
        _measure("cosine_sum", "Sum of their cosines in row order; NULL if none is known."),
    ),
    opt_in=True,
    rollup=True,
    counted=EXPERT_OUTPUTS.file,
    since=2,
)

TABLES: tuple[Table, ...] = (
    RUNS,
    LAYERS,
    EXPERTS,
    VOCABULARY,
    SEGMENTS,
    PROMPTS,
    TOKENS,
    ROUTING,
    ROUTER_LOGITS,
    HIDDEN_STATES,
    EXPERT_OUTPUTS,
    EXPERT_GEOMETRY,
    ROUTER_SIMILARITY,
    EXPERT_SIMILARITY,
    EXPERT_COUNTS,
    PAIR_COUNTS,
    TRANSITION_COUNTS,
    AFFINITY_COUNTS,
    VOCAB_COUNTS,
    REPETITION_COUNTS,
    EXPERT_OUTPUT_COUNTS,
)

ROLLUPS: tuple[Table, ...] = tuple(table for table in TABLES if table.rollup)

MERGED: tuple[Table, ...] = (SEGMENTS, *ROLLUPS)
"""The segment tables that a sealed run stores once for all its segments; opt-in ones only if its segments have them."""


def vocabulary_key(sha256: str) -> str:
    """Return the key of a vocabulary whose file has this digest: short enough for DuckDB to keep in place in a row."""
    return sha256[:12]


def sealed(table: Table) -> Table:
    """Return a merged table as a sealed run stores it: `segments` with segment numbers, counts without."""
    number = (replace(SEGMENT, description="Number of the segment."),) if table is SEGMENTS else ()
    return replace(table, level="sealed", columns=(*number, *table.columns))


def _total(name: str, description: str) -> Column:
    return Column(name, "DOUBLE", description)


_TRANSITION = (
    *_TRANSITION_KEYS,
    Column("tokens", "BIGINT", "N_ij: tokens routed to both.", "delta"),
    _total("tokens_here", "N_i: tokens routed to expert, and at both layers."),
    _total("tokens_there", "N_j: tokens routed to next_expert, and at both layers."),
    _total("tokens_all", "N: tokens routed at both layers."),
)

PAIR_TOTALS = Table(
    "pair_totals",
    "sealed",
    "pair_totals.parquet",
    "Totals of a sealed run. One row per layer and ordered pair of different experts that share a token of kind prompt "
    "or generated.",
    (
        _LAYER,
        Column("expert_a", "INTEGER", "One expert of the pair."),
        Column("expert_b", "INTEGER", "The other."),
        Column("tokens", "BIGINT", "N_ab: tokens routed to both.", "delta"),
        _total("tokens_a", "N_a: tokens routed to expert_a."),
        _total("tokens_b", "N_b: tokens routed to expert_b."),
        _total("tokens_all", "N: tokens with rows at the layer."),
    ),
    totals_of=("pair_counts", "expert_counts"),
    since=2,
)

TRANSITION_TOTALS = Table(
    "transition_totals",
    "sealed",
    "transition_totals.parquet",
    "Totals of a sealed run. One row per layer and pair of experts, one at the layer and one at the next MoE layer, "
    "that share a token of kind prompt or generated.",
    _TRANSITION,
    totals_of=("transition_counts",),
    since=2,
)

FIRST_CHOICE_TOTALS = Table(
    "first_choice_totals",
    "sealed",
    "first_choice_totals.parquet",
    "The same as transition_totals for first choices (rank 0) alone.",
    _TRANSITION,
    totals_of=("transition_counts",),
    since=2,
)

TOTALS: tuple[Table, ...] = (PAIR_TOTALS, TRANSITION_TOTALS, FIRST_CHOICE_TOTALS)
"""What a sealed run stores of the staging views of the same names (`queries/staging/`): over all domains, and without
special tokens. The views of matrices then read one row per pair and add nothing up."""

SEALED: tuple[Table, ...] = (*(sealed(table) for table in MERGED), *TOTALS)
"""The tables of a sealed run."""


def merge_function(column: Column) -> str:
    """Return the name of the SQL function that merges a rollup's column over several segments: sum, max or min.

    The text of a vocabulary entry is the same in all segments, so min returns it.
    """
    return "min" if column.type == "VARCHAR" else column.merge


def split_columns(table: Table) -> tuple[list[str], dict[str, str]]:
    """Return a rollup's key columns, and its other columns with their types."""
    types = {column.name: column.type for column in table.columns}
    values = {name: type_ for name, type_ in types.items() if type_ in ("BIGINT", "DOUBLE") or name == "token"}
    return [name for name in types if name not in values], values


SCHEMA_VERSION = max(since for table in TABLES for since in (table.since, *(column.since for column in table.columns)))
"""Version of these tables; manifests record it and FORMAT_VERSION."""


def refusal(format_version: object, schema_version: object) -> str | None:
    """Return why files of these versions cannot be read, and what to do; None if they can."""
    if not isinstance(format_version, int) or not isinstance(schema_version, int):
        return "does not state its format and schema version"
    if format_version > FORMAT_VERSION:
        return (
            f"was written by a newer moewh (format {format_version}; this one reads {FORMAT_VERSION}). Upgrade moewh."
        )
    if format_version < FORMAT_VERSION:
        return (
            f"was written by an older moewh (format {format_version}; this one reads {FORMAT_VERSION}). {OLDER_REMEDY}"
        )
    if schema_version > SCHEMA_VERSION:
        return (
            f"was written by a newer moewh (schema {schema_version}; this one reads {SCHEMA_VERSION}). Upgrade moewh."
        )
    return None
