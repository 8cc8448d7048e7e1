-- co_routing: which experts of a layer are chosen together.
-- One row per run, layer and ordered pair of different experts that share a token (both orders).
-- Over tokens of kind prompt and generated with rows at the layer: N of them, N_a routed to expert_a, N_ab to both:
--   conditional = N_ab / N_a                 OLMoE (arXiv:2409.02060) Eq. 6; over all expert_b it sums to top_k - 1
--   jaccard     = N_ab / (N_a + N_b - N_ab)
--   lift        = N_ab * N / (N_a * N_b)     1 where the two are chosen independently
-- A pair that never shares a token has no row: its three ratios are 0.
create or replace view co_routing as
with pair_tokens as (
    -- an expert is paired with itself here too: that counts N_a; and one pair a token is of first choices: N
    select
        a.run_id as run_id,
        a.layer as layer,
        a.expert as expert_a,
        b.expert as expert_b,
        count(*)::bigint as tokens,
        sum(case when a.rank = 0 and b.rank = 0 then 1 else 0 end)::bigint as first_choice_tokens
    from routing as a
    join tokens
        on tokens.run_id = a.run_id
        and tokens.segment = a.segment
        and tokens.token_id = a.token_id
    join routing as b
        on b.run_id = a.run_id
        and b.segment = a.segment
        and b.token_id = a.token_id
        and b.layer = a.layer
    where tokens.kind in ('prompt', 'generated')
    group by a.run_id, a.layer, a.expert, b.expert
),
expert_tokens as (
    select
        run_id,
        layer,
        expert_a as expert,
        tokens
    from pair_tokens
    where expert_a = expert_b
),
layer_tokens as (
    select
        run_id,
        layer,
        sum(first_choice_tokens)::bigint as tokens
    from pair_tokens
    group by run_id, layer
)
select
    pair_tokens.run_id as run_id,
    pair_tokens.layer as layer,
    pair_tokens.expert_a as expert_a,
    pair_tokens.expert_b as expert_b,
    pair_tokens.tokens as tokens,
    pair_tokens.tokens::double / nullif(a.tokens, 0) as conditional,
    pair_tokens.tokens::double / nullif(a.tokens + b.tokens - pair_tokens.tokens, 0) as jaccard,
    pair_tokens.tokens::double * layer_tokens.tokens / nullif(a.tokens::double * b.tokens, 0) as lift
from pair_tokens
join expert_tokens as a
    on a.run_id = pair_tokens.run_id
    and a.layer = pair_tokens.layer
    and a.expert = pair_tokens.expert_a
join expert_tokens as b
    on b.run_id = pair_tokens.run_id
    and b.layer = pair_tokens.layer
    and b.expert = pair_tokens.expert_b
join layer_tokens
    on layer_tokens.run_id = pair_tokens.run_id
    and layer_tokens.layer = pair_tokens.layer
where pair_tokens.expert_a <> pair_tokens.expert_b;

comment on view co_routing is 'One row per layer and ordered pair of experts chosen together: how often, against chance.';
comment on column co_routing.run_id is 'The run these rows belong to.';
comment on column co_routing.layer is 'Layer index in the model.';
comment on column co_routing.expert_a is 'The expert the conditional is given.';
comment on column co_routing.expert_b is 'Another expert of the same layer.';
comment on column co_routing.tokens is 'N_ab: tokens routed to both.';
comment on column co_routing.conditional is 'N_ab / N_a: share of expert_a''s tokens that also go to expert_b.';
comment on column co_routing.jaccard is 'N_ab / (N_a + N_b - N_ab): share of either''s tokens that go to both.';
comment on column co_routing.lift is 'N_ab * N / (N_a * N_b): 1 where the two are chosen independently.';
