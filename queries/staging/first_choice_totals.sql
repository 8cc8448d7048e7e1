-- first_choice_totals: how many first choices go from each expert to each expert of the next MoE layer.
-- One row per run, layer, next layer and pair of experts that are some token's first choices (rank 0) at the two layers.
-- Over tokens of kind prompt and generated routed at both layers; a token counts once. A sealed run stores these rows.
-- Source: the rollup transition_counts.
create or replace view first_choice_totals as
with pair_tokens as (
    select
        transition_counts.run_id as run_id,
        transition_counts.layer as layer,
        transition_counts.expert as expert,
        transition_counts.next_expert as next_expert,
        sum(transition_counts.first_choice_tokens)::bigint as tokens
    from transition_counts
    where transition_counts.kind <> 'special'
        and transition_counts.first_choice_tokens > 0
    group by
        transition_counts.run_id,
        transition_counts.layer,
        transition_counts.expert,
        transition_counts.next_expert
)
select
    pair_tokens.run_id as run_id,
    pair_tokens.layer as layer,
    layer_steps.next_layer as next_layer,
    pair_tokens.expert as expert,
    pair_tokens.next_expert as next_expert,
    pair_tokens.tokens as tokens,
    (sum(pair_tokens.tokens) over (partition by pair_tokens.run_id, pair_tokens.layer, pair_tokens.expert))::double
        as tokens_here,
    (sum(pair_tokens.tokens) over (
        partition by pair_tokens.run_id, pair_tokens.layer, pair_tokens.next_expert
    ))::double as tokens_there,
    (sum(pair_tokens.tokens) over (partition by pair_tokens.run_id, pair_tokens.layer))::double as tokens_all
from pair_tokens
join layer_steps
    on layer_steps.run_id = pair_tokens.run_id
    and layer_steps.layer = pair_tokens.layer;

comment on view first_choice_totals is 'Staging. One row per layer and pair of first choices at it and the next layer: the tokens of both, and of either.';
comment on column first_choice_totals.run_id is 'The run these rows belong to.';
comment on column first_choice_totals.layer is 'Layer index in the model.';
comment on column first_choice_totals.next_layer is 'The next MoE layer: the next row of layers.';
comment on column first_choice_totals.expert is 'First choice (rank 0) at layer.';
comment on column first_choice_totals.next_expert is 'First choice (rank 0) at next_layer.';
comment on column first_choice_totals.tokens is 'N_ij: tokens for which both are first choices.';
comment on column first_choice_totals.tokens_here is 'N_i: tokens whose first choice at layer is expert.';
comment on column first_choice_totals.tokens_there is 'N_j: tokens whose first choice at next_layer is next_expert.';
comment on column first_choice_totals.tokens_all is 'N: tokens routed at both layers.';
