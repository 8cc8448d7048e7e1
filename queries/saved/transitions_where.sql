-- transitions_where: where the tokens of an expert go at the next MoE layer, over a selection of tokens.
-- One row per run, layer, next layer and pair of experts that share one of these tokens.
-- These are the tokens of kind prompt and generated that meet every given condition.
-- Columns and formulas as in layer_transitions, over these tokens.
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
    group by
        run_id,
        layer,
        token_id
),
here_sets as (
    select
        expert_sets.run_id as run_id,
        expert_sets.token_id as token_id,
        expert_sets.experts as experts,
        layer_steps.place as place,
        coalesce(layer_steps.next_layer, -1) as next_layer
    from expert_sets
    left join layer_steps
        on layer_steps.run_id = expert_sets.run_id
        and layer_steps.layer = expert_sets.layer
    where (getvariable('layer') is null or expert_sets.layer = getvariable('layer'))
),
both_layers as (
    select
        here_sets.place as place,
        here_sets.experts as experts,
        there.experts as next_experts
    from here_sets
    join expert_sets as there
        on there.run_id = here_sets.run_id
        and there.token_id = here_sets.token_id
        and there.layer = here_sets.next_layer
),
first_sides as (
    select
        place,
        next_experts,
        unnest(experts) as expert
    from both_layers
),
both_sides as (
    select
        place,
        expert,
        unnest(next_experts) as next_expert
    from first_sides
),
row_pairs as (
    select
        place,
        expert,
        next_expert,
        count(*)::bigint as tokens
    from both_sides
    group by
        place,
        expert,
        next_expert
),
pair_tokens as (
    select
        layer_steps.run_id as run_id,
        layer_steps.layer as layer,
        layer_steps.next_layer as next_layer,
        row_pairs.expert as expert,
        row_pairs.next_expert as next_expert,
        row_pairs.tokens as tokens
    from row_pairs
    join layer_steps
        on layer_steps.place = row_pairs.place
    union all
    select
        transition_counts.run_id as run_id,
        transition_counts.layer as layer,
        min(transition_counts.next_layer) as next_layer,
        transition_counts.expert as expert,
        transition_counts.next_expert as next_expert,
        sum(transition_counts.tokens)::bigint as tokens
    from transition_counts
    where transition_counts.kind <> 'special'
        and (getvariable('run') is null or transition_counts.run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or transition_counts.layer = getvariable('layer'))
        and (getvariable('domain') is null or transition_counts.domain = getvariable('domain')::varchar)
        and getvariable('prompt_ids') is null
        and getvariable('token') is null
        and getvariable('token_ids') is null
    group by
        transition_counts.run_id,
        transition_counts.layer,
        transition_counts.expert,
        transition_counts.next_expert
),
counted as (
    -- each of an expert's tokens goes to k' next experts and comes from k, so N_ij sums to k' N_i and to k N_j
    select
        pair_tokens.run_id as run_id,
        pair_tokens.layer as layer,
        pair_tokens.next_layer as next_layer,
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
        and layer_steps.layer = pair_tokens.layer
)
select
    run_id,
    layer,
    next_layer,
    expert,
    next_expert,
    tokens,
    tokens::double / nullif(tokens_here, 0) as conditional,
    tokens::double * tokens_all / nullif(tokens_here * tokens_there, 0) as lift
from counted
order by run_id, layer, expert, next_expert
