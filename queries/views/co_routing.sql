-- co_routing: which experts of a layer are chosen together.
-- One row per run, layer and ordered pair of different experts that share a token (both orders).
-- Over tokens of kind prompt and generated with rows at the layer: N of them, N_a routed to expert_a, N_ab to both:
--   conditional = N_ab / N_a                 OLMoE (arXiv:2409.02060) Eq. 6; over all expert_b it sums to top_k - 1
--   jaccard     = N_ab / (N_a + N_b - N_ab)
--   lift        = N_ab * N / (N_a * N_b)     1 if the two are chosen independently
-- A pair that never shares a token has no row: its three ratios are 0.
-- Counts come from the rollup pair_counts, so the cost does not grow with tokens.
create or replace view co_routing as
with pair_tokens as (
    select
        pair_counts.run_id as run_id,
        pair_counts.layer as layer,
        pair_counts.expert_a as expert_a,
        pair_counts.expert_b as expert_b,
        sum(pair_counts.tokens)::bigint as tokens
    from pair_counts
    where pair_counts.kind <> 'special'
    group by
        pair_counts.run_id,
        pair_counts.layer,
        pair_counts.expert_a,
        pair_counts.expert_b
),
sides as (
    select 0 as side
    union all
    select 1 as side
),
both_orders as (
    select
        pair_tokens.run_id as run_id,
        pair_tokens.layer as layer,
        case when sides.side = 0 then pair_tokens.expert_a else pair_tokens.expert_b end as expert_a,
        case when sides.side = 0 then pair_tokens.expert_b else pair_tokens.expert_a end as expert_b,
        pair_tokens.tokens as tokens
    from pair_tokens
    cross join sides
),
counted as (
    -- each of an expert's tokens has top_k - 1 other experts, so the sum of N_ab over them is (top_k - 1) N_a
    select
        both_orders.run_id as run_id,
        both_orders.layer as layer,
        both_orders.expert_a as expert_a,
        both_orders.expert_b as expert_b,
        both_orders.tokens as tokens,
        (sum(both_orders.tokens) over (partition by both_orders.run_id, both_orders.layer, both_orders.expert_a))::double
        / nullif(layers.top_k - 1, 0) as tokens_a,
        (sum(both_orders.tokens) over (partition by both_orders.run_id, both_orders.layer, both_orders.expert_b))::double
        / nullif(layers.top_k - 1, 0) as tokens_b,
        (sum(both_orders.tokens) over (partition by both_orders.run_id, both_orders.layer))::double
        / nullif(layers.top_k * (layers.top_k - 1), 0) as tokens_all
    from both_orders
    join layers
        on layers.run_id = both_orders.run_id
        and layers.layer = both_orders.layer
)
select
    run_id,
    layer,
    expert_a,
    expert_b,
    tokens,
    tokens::double / nullif(tokens_a, 0) as conditional,
    tokens::double / nullif(tokens_a + tokens_b - tokens, 0) as jaccard,
    tokens::double * tokens_all / nullif(tokens_a * tokens_b, 0) as lift
from counted;

comment on view co_routing is 'One row per layer and ordered pair of experts chosen together: how often, compared with chance.';
comment on column co_routing.run_id is 'The run these rows belong to.';
comment on column co_routing.layer is 'Layer index in the model.';
comment on column co_routing.expert_a is 'The expert that conditional conditions on.';
comment on column co_routing.expert_b is 'Another expert of the same layer.';
comment on column co_routing.tokens is 'N_ab: tokens routed to both.';
comment on column co_routing.conditional is 'N_ab / N_a: share of expert_a''s tokens that also go to expert_b.';
comment on column co_routing.jaccard is 'N_ab / (N_a + N_b - N_ab): share of either''s tokens that go to both.';
comment on column co_routing.lift is 'N_ab * N / (N_a * N_b): 1 if the two are chosen independently.';
