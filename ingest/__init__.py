"""From prompts to committed segments: model, capture, prompts, batching and the segment writer.

Torch lives only here. Data flows one way: prompts → plan → tokens → batches → captured routing →
Parquet segment. From `warehouse` this package uses the table schema, the disk layout and the errors.

Shapes, used as suffixes of names: B prompts, S positions, T tokens, L layers, E experts, K experts per
token (top-k), H hidden size.
"""
