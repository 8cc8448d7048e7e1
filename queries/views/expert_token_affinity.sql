-- expert_token_affinity: which tokens of the vocabulary go to which expert.
-- One row per run, layer, expert and vocabulary entry with at least one such token.
-- Over tokens of kind prompt and generated with rows at the layer: N of them, N_x of entry x, N_i routed to expert i,
-- N_xi both:
--   share_of_token  = N_xi / N_x             over all experts it sums to top_k
--   share_of_expert = N_xi / N_i             over all entries it sums to 1
--   lift            = N_xi * N / (N_x * N_i) 1 if independent of the token
-- Rare entries reach high lifts by chance: filter on tokens, or use expert_token_association for bounds of the lift.
-- Tokens whose entry is not known are left out of N_x and N_xi.
-- Counts come from the rollups affinity_counts, vocab_counts and expert_counts: filter on layer and expert to read less.
create or replace view expert_token_affinity as
with merged_runs as (
    -- sealed, with one kind of token besides specials: affinity_counts has one row per key already
    select run_id
    from expert_counts
    where kind <> 'special'
        and segment is null
    group by
        run_id
    having min(kind) = max(kind)
),
pair_tokens as (
    -- this branch comes first because DuckDB 1.1 to 1.3 hangs on `select *` if the other one does
    select
        affinity_counts.run_id as run_id,
        affinity_counts.layer as layer,
        affinity_counts.expert as expert,
        affinity_counts.vocab_id as vocab_id,
        sum(affinity_counts.tokens)::bigint as tokens
    from affinity_counts
    where affinity_counts.kind <> 'special'
        and affinity_counts.run_id not in (select merged_runs.run_id from merged_runs)
    group by
        affinity_counts.run_id,
        affinity_counts.layer,
        affinity_counts.expert,
        affinity_counts.vocab_id
    union all
    select
        affinity_counts.run_id as run_id,
        affinity_counts.layer as layer,
        affinity_counts.expert as expert,
        affinity_counts.vocab_id as vocab_id,
        affinity_counts.tokens as tokens
    from affinity_counts
    where affinity_counts.kind <> 'special'
        and affinity_counts.segment is null
        and affinity_counts.run_id in (select merged_runs.run_id from merged_runs)
),
entry_tokens as (
    select
        vocab_counts.run_id as run_id,
        vocab_counts.layer as layer,
        vocab_counts.vocab_id as vocab_id,
        any_value(vocab_counts.token) as token,
        sum(vocab_counts.tokens)::bigint as tokens
    from vocab_counts
    where vocab_counts.kind <> 'special'
    group by
        vocab_counts.run_id,
        vocab_counts.layer,
        vocab_counts.vocab_id
),
expert_choices as (
    select
        expert_counts.run_id as run_id,
        expert_counts.layer as layer,
        expert_counts.expert as expert,
        sum(expert_counts.tokens)::bigint as tokens
    from expert_counts
    where expert_counts.kind <> 'special'
    group by
        expert_counts.run_id,
        expert_counts.layer,
        expert_counts.expert
),
expert_tokens as (
    -- a token has top_k experts, so the sum of N_i over experts is top_k N
    select
        expert_choices.run_id as run_id,
        expert_choices.layer as layer,
        expert_choices.expert as expert,
        expert_choices.tokens as tokens,
        (sum(expert_choices.tokens) over (partition by expert_choices.run_id, expert_choices.layer))::double
        / layers.top_k as layer_tokens
    from expert_choices
    join layers
        on layers.run_id = expert_choices.run_id
        and layers.layer = expert_choices.layer
)
select
    pair_tokens.run_id as run_id,
    pair_tokens.layer as layer,
    pair_tokens.expert as expert,
    pair_tokens.vocab_id as vocab_id,
    entry_tokens.token as token,
    pair_tokens.tokens as tokens,
    pair_tokens.tokens::double / nullif(entry_tokens.tokens, 0) as share_of_token,
    pair_tokens.tokens::double / nullif(expert_tokens.tokens, 0) as share_of_expert,
    pair_tokens.tokens::double * expert_tokens.layer_tokens
    / nullif(entry_tokens.tokens::double * expert_tokens.tokens, 0) as lift
from pair_tokens
left join entry_tokens
    on entry_tokens.run_id = pair_tokens.run_id
    and entry_tokens.layer = pair_tokens.layer
    and entry_tokens.vocab_id = pair_tokens.vocab_id
left join expert_tokens
    on expert_tokens.run_id = pair_tokens.run_id
    and expert_tokens.layer = pair_tokens.layer
    and expert_tokens.expert = pair_tokens.expert;

comment on view expert_token_affinity is 'One row per layer, expert and vocabulary entry: how often the expert is chosen for that token.';
comment on column expert_token_affinity.run_id is 'The run these rows belong to.';
comment on column expert_token_affinity.layer is 'Layer index in the model.';
comment on column expert_token_affinity.expert is '0-based expert index within the layer.';
comment on column expert_token_affinity.vocab_id is 'The tokenizer''s id of the token.';
comment on column expert_token_affinity.token is 'The token decoded to text by itself.';
comment on column expert_token_affinity.tokens is 'N_xi: occurrences of this token routed to this expert.';
comment on column expert_token_affinity.share_of_token is 'N_xi / N_x: share of the token''s occurrences that go to this expert.';
comment on column expert_token_affinity.share_of_expert is 'N_xi / N_i: share of the expert''s tokens that are this token.';
comment on column expert_token_affinity.lift is 'N_xi * N / (N_x * N_i): 1 if independent of the token.';
