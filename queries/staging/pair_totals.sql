-- pair_totals: how often each two experts of a layer are chosen together, and how often each of them is.
-- One row per run, layer and ordered pair of different experts that share a token (both orders).
-- Over tokens of kind prompt and generated with rows at the layer. A sealed run stores these rows.
-- Source: the rollups pair_counts and expert_counts.
create or replace view pair_totals as
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
sides as (
    select 0 as side
    union all
    select 1 as side
)
select
    pair_tokens.run_id as run_id,
    pair_tokens.layer as layer,
    case when sides.side = 0 then pair_tokens.expert_a else pair_tokens.expert_b end as expert_a,
    case when sides.side = 0 then pair_tokens.expert_b else pair_tokens.expert_a end as expert_b,
    pair_tokens.tokens as tokens,
    case when sides.side = 0 then a.tokens else b.tokens end as tokens_a,
    case when sides.side = 0 then b.tokens else a.tokens end as tokens_b,
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
cross join sides;

comment on view pair_totals is 'Staging. One row per layer and ordered pair of experts chosen together: how often, and how often each is.';
comment on column pair_totals.run_id is 'The run these rows belong to.';
comment on column pair_totals.layer is 'Layer index in the model.';
comment on column pair_totals.expert_a is 'One expert of the pair.';
comment on column pair_totals.expert_b is 'The other.';
comment on column pair_totals.tokens is 'N_ab: tokens routed to both.';
comment on column pair_totals.tokens_a is 'N_a: tokens routed to expert_a.';
comment on column pair_totals.tokens_b is 'N_b: tokens routed to expert_b.';
comment on column pair_totals.tokens_all is 'N: tokens with rows at the layer.';
