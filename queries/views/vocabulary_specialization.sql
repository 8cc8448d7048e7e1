-- vocabulary_specialization: how far the token alone determines a layer's experts.
-- One row per run and MoE layer. Over entries x of the vocabulary with N_x >= 10 occurrences of kind prompt and
-- generated with rows at the layer, N_xi of them routed to expert i:
--   specialization = mean over those entries of max over i of N_xi / N_x
-- OLMoE (arXiv:2409.02060) Eq. 8 by occurrences, unweighted: a rare entry counts as much as a common one, and all
-- choices count equally whatever their weight. It is 1 if each entry always goes to a single expert, and NULL if no
-- entry has 10 occurrences. Chance: with an even router each N_xi / N_x is near top_k / E, and the maximum over E
-- experts exceeds that, more so for small N_x; compare runs over the same tokens.
-- Counts come from the rollups affinity_counts and vocab_counts: the cost grows with the vocabulary, not with tokens.
create or replace view vocabulary_specialization as
with pair_tokens as (
    select
        affinity_counts.run_id as run_id,
        affinity_counts.layer as layer,
        affinity_counts.expert as expert,
        affinity_counts.vocab_id as vocab_id,
        sum(affinity_counts.tokens)::bigint as tokens
    from affinity_counts
    where affinity_counts.kind <> 'special'
    group by
        affinity_counts.run_id,
        affinity_counts.layer,
        affinity_counts.expert,
        affinity_counts.vocab_id
),
most_tokens as (
    select
        run_id,
        layer,
        vocab_id,
        max(tokens) as tokens
    from pair_tokens
    group by
        run_id,
        layer,
        vocab_id
),
entry_tokens as (
    select
        vocab_counts.run_id as run_id,
        vocab_counts.layer as layer,
        vocab_counts.vocab_id as vocab_id,
        sum(vocab_counts.tokens)::bigint as tokens
    from vocab_counts
    where vocab_counts.kind <> 'special'
    group by
        vocab_counts.run_id,
        vocab_counts.layer,
        vocab_counts.vocab_id
    having sum(vocab_counts.tokens) >= 10
),
specialized as (
    select
        entry_tokens.run_id as run_id,
        entry_tokens.layer as layer,
        avg(most_tokens.tokens::double / entry_tokens.tokens) as specialization,
        count(*)::bigint as token_types
    from entry_tokens
    join most_tokens
        on most_tokens.run_id = entry_tokens.run_id
        and most_tokens.layer = entry_tokens.layer
        and most_tokens.vocab_id = entry_tokens.vocab_id
    group by
        entry_tokens.run_id,
        entry_tokens.layer
)
select
    layers.run_id as run_id,
    layers.layer as layer,
    specialized.specialization as specialization,
    coalesce(specialized.token_types, 0)::bigint as token_types
from layers
left join specialized
    on specialized.run_id = layers.run_id
    and specialized.layer = layers.layer;

comment on view vocabulary_specialization is 'One row per layer: how far the token alone determines the expert (mean over token types of the largest share).';
comment on column vocabulary_specialization.run_id is 'The run these rows belong to.';
comment on column vocabulary_specialization.layer is 'Layer index in the model.';
comment on column vocabulary_specialization.specialization is 'Mean over token types with at least 10 occurrences of the largest share that goes to one expert; NULL without any.';
comment on column vocabulary_specialization.token_types is 'Entries of the vocabulary with at least 10 occurrences, over which the mean is taken.';
