-- co_routing: which experts of a layer are chosen together.
-- One row per run, layer and ordered pair of different experts that share a token (both orders).
-- Over tokens of kind prompt and generated with rows at the layer: N of them, N_a routed to expert_a, N_ab to both:
--   conditional = N_ab / N_a                 OLMoE (arXiv:2409.02060) Eq. 6; over all expert_b it sums to top_k - 1
--   jaccard     = N_ab / (N_a + N_b - N_ab)
--   lift        = N_ab * N / (N_a * N_b)     1 if the two are chosen independently
-- A pair that never shares a token has no row: its three ratios are 0.
-- Counts come from the rollups pair_counts and expert_counts, so the cost does not grow with tokens.
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
expert_tokens as (
    select
        run_id,
        layer,
        expert,
        sum(tokens)::double as tokens
    from expert_counts
    where kind <> 'special'
    group by
        run_id,
        layer,
        expert
),
layer_experts as (
    -- each token has rows of top_k experts, so N_a sums to top_k N
    select
        expert_tokens.run_id as run_id,
        expert_tokens.layer as layer,
        expert_tokens.expert as expert,
        expert_tokens.tokens as tokens,
        (sum(expert_tokens.tokens) over (partition by expert_tokens.run_id, expert_tokens.layer)) / layers.top_k
            as tokens_all
    from expert_tokens
    join layers
        on layers.run_id = expert_tokens.run_id
        and layers.layer = expert_tokens.layer
),
pairs as (
    select
        pair_tokens.run_id as run_id,
        pair_tokens.layer as layer,
        pair_tokens.expert_a as expert_a,
        pair_tokens.expert_b as expert_b,
        pair_tokens.tokens as tokens,
        a.tokens as tokens_a,
        b.tokens as tokens_b,
        a.tokens_all as tokens_all
    from pair_tokens
    join layer_experts as a
        on a.run_id = pair_tokens.run_id
        and a.layer = pair_tokens.layer
        and a.expert = pair_tokens.expert_a
    join expert_tokens as b
        on b.run_id = pair_tokens.run_id
        and b.layer = pair_tokens.layer
        and b.expert = pair_tokens.expert_b
),
sides as (
    select 0 as side
    union all
    select 1 as side
)
select
    pairs.run_id as run_id,
    pairs.layer as layer,
    case when sides.side = 0 then pairs.expert_a else pairs.expert_b end as expert_a,
    case when sides.side = 0 then pairs.expert_b else pairs.expert_a end as expert_b,
    pairs.tokens as tokens,
    pairs.tokens::double / case when sides.side = 0 then pairs.tokens_a else pairs.tokens_b end as conditional,
    pairs.tokens::double / (pairs.tokens_a + pairs.tokens_b - pairs.tokens) as jaccard,
    pairs.tokens::double * pairs.tokens_all / (pairs.tokens_a * pairs.tokens_b) as lift
from pairs
cross join sides;

comment on view co_routing is 'One row per layer and ordered pair of experts chosen together: how often, compared with chance.';
comment on column co_routing.run_id is 'The run these rows belong to.';
comment on column co_routing.layer is 'Layer index in the model.';
comment on column co_routing.expert_a is 'The expert that conditional conditions on.';
comment on column co_routing.expert_b is 'Another expert of the same layer.';
comment on column co_routing.tokens is 'N_ab: tokens routed to both.';
comment on column co_routing.conditional is 'N_ab / N_a: share of expert_a''s tokens that also go to expert_b.';
comment on column co_routing.jaccard is 'N_ab / (N_a + N_b - N_ab): share of either''s tokens that go to both.';
comment on column co_routing.lift is 'N_ab * N / (N_a * N_b): 1 if the two are chosen independently.';
