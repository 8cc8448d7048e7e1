-- layer_transitions: where the tokens of an expert go at the next MoE layer.
-- One row per run, layer, next layer and pair of experts that share a token; the next layer is the next row of layers.
-- Over tokens of kind prompt and generated routed at both layers: N of them, N_i routed to expert at layer, N_j to
-- next_expert at next_layer, N_ij both (a token counts in all of its k * k' pairs):
--   conditional = N_ij / N_i                 over all next experts it sums to the next layer's top_k
--   lift        = N_ij * N / (N_i * N_j)     1 where the two choices are independent
-- A pair that never shares a token has no row: both ratios are 0.
create or replace view layer_transitions as
with steps as (
    select
        run_id,
        layer,
        lead(layer) over (partition by run_id order by layer) as next_layer
    from layers
),
pair_tokens as (
    -- of a token's k * k' pairs, those with rank 0 on one side count N_i or N_j, and the one with rank 0 on both N
    select
        here.run_id as run_id,
        here.layer as layer,
        there.layer as next_layer,
        here.expert as expert,
        there.expert as next_expert,
        count(*)::bigint as tokens,
        sum(case when there.rank = 0 then 1 else 0 end)::bigint as expert_part,
        sum(case when here.rank = 0 then 1 else 0 end)::bigint as next_expert_part,
        sum(case when here.rank = 0 and there.rank = 0 then 1 else 0 end)::bigint as layer_part
    from routing as here
    join tokens
        on tokens.run_id = here.run_id
        and tokens.segment = here.segment
        and tokens.token_id = here.token_id
    join steps
        on steps.run_id = here.run_id
        and steps.layer = here.layer
    join routing as there
        on there.run_id = here.run_id
        and there.segment = here.segment
        and there.token_id = here.token_id
        and there.layer = steps.next_layer
    where tokens.kind in ('prompt', 'generated')
    group by here.run_id, here.layer, there.layer, here.expert, there.expert
),
expert_tokens as (
    select
        run_id,
        layer,
        expert,
        sum(expert_part)::bigint as tokens
    from pair_tokens
    group by run_id, layer, expert
),
next_expert_tokens as (
    select
        run_id,
        layer,
        next_expert,
        sum(next_expert_part)::bigint as tokens
    from pair_tokens
    group by run_id, layer, next_expert
),
layer_tokens as (
    select
        run_id,
        layer,
        sum(layer_part)::bigint as tokens
    from pair_tokens
    group by run_id, layer
)
select
    pair_tokens.run_id as run_id,
    pair_tokens.layer as layer,
    pair_tokens.next_layer as next_layer,
    pair_tokens.expert as expert,
    pair_tokens.next_expert as next_expert,
    pair_tokens.tokens as tokens,
    pair_tokens.tokens::double / nullif(expert_tokens.tokens, 0) as conditional,
    pair_tokens.tokens::double * layer_tokens.tokens
    / nullif(expert_tokens.tokens::double * next_expert_tokens.tokens, 0) as lift
from pair_tokens
join expert_tokens
    on expert_tokens.run_id = pair_tokens.run_id
    and expert_tokens.layer = pair_tokens.layer
    and expert_tokens.expert = pair_tokens.expert
join next_expert_tokens
    on next_expert_tokens.run_id = pair_tokens.run_id
    and next_expert_tokens.layer = pair_tokens.layer
    and next_expert_tokens.next_expert = pair_tokens.next_expert
join layer_tokens
    on layer_tokens.run_id = pair_tokens.run_id
    and layer_tokens.layer = pair_tokens.layer;

comment on view layer_transitions is 'One row per layer and pair of experts at it and the next: how tokens flow, against chance.';
comment on column layer_transitions.run_id is 'The run these rows belong to.';
comment on column layer_transitions.layer is 'Layer index in the model.';
comment on column layer_transitions.next_layer is 'The next MoE layer: the next row of layers.';
comment on column layer_transitions.expert is 'Expert chosen at layer.';
comment on column layer_transitions.next_expert is 'Expert chosen at next_layer.';
comment on column layer_transitions.tokens is 'N_ij: tokens routed to expert and then to next_expert.';
comment on column layer_transitions.conditional is 'N_ij / N_i: share of expert''s tokens that go on to next_expert.';
comment on column layer_transitions.lift is 'N_ij * N / (N_i * N_j): 1 where the two choices are independent.';
