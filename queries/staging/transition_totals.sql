-- transition_totals: how many tokens go from each expert to each expert of the next MoE layer, and how many have either.
-- One row per run, layer, next layer and pair of experts that share a token; the next layer is the next row of layers.
-- Over tokens of kind prompt and generated routed at both layers; a token counts in all of its k * k' pairs. A sealed
-- run stores these rows.
-- Source: the rollup transition_counts.
create or replace view transition_totals as
with pair_tokens as (
    select
        transition_counts.run_id as run_id,
        transition_counts.layer as layer,
        transition_counts.expert as expert,
        transition_counts.next_expert as next_expert,
        sum(transition_counts.tokens)::bigint as tokens
    from transition_counts
    where transition_counts.kind <> 'special'
    group by
        transition_counts.run_id,
        transition_counts.layer,
        transition_counts.expert,
        transition_counts.next_expert
)
-- each of an expert's tokens goes to k' next experts and comes from k, so N_ij sums to k' N_i and to k N_j
select
    pair_tokens.run_id as run_id,
    pair_tokens.layer as layer,
    layer_steps.next_layer as next_layer,
    pair_tokens.expert as expert,
    pair_tokens.next_expert as next_expert,
    pair_tokens.tokens as tokens,
    (sum(pair_tokens.tokens) over (partition by pair_tokens.run_id, pair_tokens.layer, pair_tokens.expert))::double
    / nullif(layer_steps.next_top_k, 0) as tokens_here,
    (sum(pair_tokens.tokens) over (
        partition by pair_tokens.run_id, pair_tokens.layer, pair_tokens.next_expert
    ))::double
    / nullif(layer_steps.top_k, 0) as tokens_there,
    (sum(pair_tokens.tokens) over (partition by pair_tokens.run_id, pair_tokens.layer))::double
    / nullif(layer_steps.top_k * layer_steps.next_top_k, 0) as tokens_all
from pair_tokens
join layer_steps
    on layer_steps.run_id = pair_tokens.run_id
    and layer_steps.layer = pair_tokens.layer;

comment on view transition_totals is 'Staging. One row per layer and pair of experts at it and the next layer: the tokens of both, and of either.';
comment on column transition_totals.run_id is 'The run these rows belong to.';
comment on column transition_totals.layer is 'Layer index in the model.';
comment on column transition_totals.next_layer is 'The next MoE layer: the next row of layers.';
comment on column transition_totals.expert is 'Expert chosen at layer.';
comment on column transition_totals.next_expert is 'Expert chosen at next_layer.';
comment on column transition_totals.tokens is 'N_ij: tokens routed to both.';
comment on column transition_totals.tokens_here is 'N_i: tokens routed to expert, and at both layers.';
comment on column transition_totals.tokens_there is 'N_j: tokens routed to next_expert, and at both layers.';
comment on column transition_totals.tokens_all is 'N: tokens routed at both layers.';
