-- first_choice_transitions: where a token's first choice goes at the next MoE layer.
-- One row per run, layer, next layer and pair of experts that are some token's first choices (rank 0) at the two layers.
-- Over tokens of kind prompt and generated routed at both layers: N of them, N_i with first choice expert at layer,
-- N_j with first choice next_expert at next_layer, N_ij both (a token counts once):
--   conditional = N_ij / N_i                 over all next experts it sums to 1
--   lift        = N_ij * N / (N_i * N_j)     1 if the two choices are independent
-- A pair that no token takes has no row: both ratios are 0. Weights matter only through the rank.
-- A run whose ranks are not known (see runs.origin_format) has no first choices and no rows here.
-- Counts come from the rollup transition_counts, so the cost does not grow with tokens.
create or replace view first_choice_transitions as
select
    run_id,
    layer,
    next_layer,
    expert,
    next_expert,
    tokens,
    tokens::double / nullif(tokens_here, 0) as conditional,
    tokens::double * tokens_all / nullif(tokens_here * tokens_there, 0) as lift
from first_choice_totals;

comment on view first_choice_transitions is 'One row per layer and pair of first choices at it and the next layer: how tokens flow, by rank 0 only.';
comment on column first_choice_transitions.run_id is 'The run these rows belong to.';
comment on column first_choice_transitions.layer is 'Layer index in the model.';
comment on column first_choice_transitions.next_layer is 'The next MoE layer: the next row of layers.';
comment on column first_choice_transitions.expert is 'First choice (rank 0) at layer.';
comment on column first_choice_transitions.next_expert is 'First choice (rank 0) at next_layer.';
comment on column first_choice_transitions.tokens is 'N_ij: tokens for which both are first choices.';
comment on column first_choice_transitions.conditional is 'N_ij / N_i: of the tokens whose first choice is expert, the share that goes to next_expert.';
comment on column first_choice_transitions.lift is 'N_ij * N / (N_i * N_j): 1 if the two choices are independent.';
