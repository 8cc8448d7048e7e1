-- co_routing_where: which experts are chosen together, over a selection of tokens.
-- One row per run, layer and ordered pair of different experts that share one of these tokens (both orders).
-- These are the tokens of kind prompt and generated that meet every given condition.
-- Columns and formulas as in co_routing, over these tokens.
-- With only a domain or no condition, reads rollups; otherwise reads the rows of these tokens.
-- Parameters (the first four are conditions, each optional):
--   domain (domain): the domain of their prompt.
--   prompt_ids (prompt ids): such as 3,17,256; in a shell as text: '3,17,256'.
--   token (token): the token's text, spaces included.
--   token_ids (token ids): from a table: set variable token_ids = (select string_agg(token_id, ',') from mine).
--   run (run): default every run.
--   layer (layer): default every layer.
with expert_sets as (
    select
        run_id,
        layer,
        token_id,
        list(expert) as experts
    from chosen_routing
    where (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        layer,
        token_id
),
numbered_sets as (
    select
        layer_steps.place as place,
        expert_sets.experts as experts
    from expert_sets
    join layer_steps
        on layer_steps.run_id = expert_sets.run_id
        and layer_steps.layer = expert_sets.layer
),
first_sides as (
    select
        place,
        experts,
        unnest(experts) as expert_a
    from numbered_sets
),
both_sides as (
    select
        place,
        expert_a,
        unnest(experts) as expert_b
    from first_sides
),
row_pairs as (
    select
        place,
        expert_a,
        expert_b,
        count(*)::bigint as tokens
    from both_sides
    where expert_a < expert_b
    group by
        place,
        expert_a,
        expert_b
),
pair_tokens as (
    select
        layer_steps.run_id as run_id,
        layer_steps.layer as layer,
        row_pairs.expert_a as expert_a,
        row_pairs.expert_b as expert_b,
        row_pairs.tokens as tokens
    from row_pairs
    join layer_steps
        on layer_steps.place = row_pairs.place
    union all
    select
        pair_counts.run_id as run_id,
        pair_counts.layer as layer,
        pair_counts.expert_a as expert_a,
        pair_counts.expert_b as expert_b,
        sum(pair_counts.tokens)::bigint as tokens
    from pair_counts
    where pair_counts.kind <> 'special'
        and (getvariable('run') is null or pair_counts.run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or pair_counts.layer = getvariable('layer'))
        and (getvariable('domain') is null or pair_counts.domain = getvariable('domain')::varchar)
        and getvariable('prompt_ids') is null
        and getvariable('token') is null
        and getvariable('token_ids') is null
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
from counted
order by run_id, layer, expert_a, expert_b
