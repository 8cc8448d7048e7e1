-- layer_transitions: where the tokens of an expert go at the next MoE layer.
-- One row per run, layer, next layer and pair of experts that share a token; the next layer is the next row of layers.
-- Over tokens of kind prompt and generated routed at both layers: N of them, N_i routed to expert at layer, N_j to
-- next_expert at next_layer, N_ij both (a token counts in all of its k * k' pairs):
--   conditional = N_ij / N_i                 over all next experts it sums to the next layer's top_k
--   lift        = N_ij * N / (N_i * N_j)     1 if the two choices are independent
-- A pair that never shares a token has no row: both ratios are 0. A run that was imported as counts only has no rows.
-- Counts come from the rollup transition_counts, so the cost does not grow with tokens.
create or replace view layer_transitions as
select
    run_id,
    layer,
    next_layer,
    expert,
    next_expert,
    tokens,
    tokens::double / nullif(tokens_here, 0) as conditional,
    tokens::double * tokens_all / nullif(tokens_here * tokens_there, 0) as lift
from transition_totals;

comment on view layer_transitions is 'One row per layer and pair of experts at it and the next layer: how tokens flow, compared with chance.';
comment on column layer_transitions.run_id is 'The run these rows belong to.';
comment on column layer_transitions.layer is 'Layer index in the model.';
comment on column layer_transitions.next_layer is 'The next MoE layer: the next row of layers.';
comment on column layer_transitions.expert is 'Expert chosen at layer.';
comment on column layer_transitions.next_expert is 'Expert chosen at next_layer.';
comment on column layer_transitions.tokens is 'N_ij: tokens routed to expert and then to next_expert.';
comment on column layer_transitions.conditional is 'N_ij / N_i: share of expert''s tokens that go on to next_expert.';
comment on column layer_transitions.lift is 'N_ij * N / (N_i * N_j): 1 if the two choices are independent.';
