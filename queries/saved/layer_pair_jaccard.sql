-- layer_pair_jaccard: which experts of two layers are chosen by the same tokens.
-- One row per run, expert of layer and expert of other_layer that share a token, highest jaccard first. Over tokens of
-- kind prompt and generated routed at both layers: N of them, N_i to expert, N_j to other_expert, N_ij to both:
--   jaccard = N_ij / (N_i + N_j - N_ij)
--   lift    = N_ij * N / (N_i * N_j)     1 if the two choices are independent
-- For adjacent layers, layer_transitions answers from rollups; this query reads the rows of the two layers.
-- Parameters:
--   layer (layer): one layer.
--   other_layer (layer): another layer.
--   run (run): default every run.
with both_layers as (
    select
        here.run_id as run_id,
        here.expert as expert,
        there.expert as other_expert
    from routing as here
    join routing as there
        on there.run_id = here.run_id
        and there.segment = here.segment
        and there.token_id = here.token_id
    where here.layer = getvariable('layer')
        and there.layer = getvariable('other_layer')
        and here.kind <> 'special'
        and (getvariable('run') is null or here.run_id = getvariable('run')::varchar)
),
pair_tokens as (
    select
        run_id,
        expert,
        other_expert,
        count(*)::bigint as tokens
    from both_layers
    group by
        run_id,
        expert,
        other_expert
),
chosen_at as (
    select
        layers.run_id as run_id,
        layers.top_k as top_k,
        other.top_k as other_top_k
    from layers
    join layers as other
        on other.run_id = layers.run_id
    where layers.layer = getvariable('layer')
        and other.layer = getvariable('other_layer')
),
here_tokens as (
    -- a token has k experts at one layer and k' at the other, so N_ij sums to k' N_i, to k N_j and to k k' N
    select
        pair_tokens.run_id as run_id,
        pair_tokens.expert as expert,
        sum(pair_tokens.tokens)::double / chosen_at.other_top_k as tokens
    from pair_tokens
    join chosen_at
        on chosen_at.run_id = pair_tokens.run_id
    group by
        pair_tokens.run_id,
        pair_tokens.expert,
        chosen_at.other_top_k
),
there_tokens as (
    select
        pair_tokens.run_id as run_id,
        pair_tokens.other_expert as other_expert,
        sum(pair_tokens.tokens)::double / chosen_at.top_k as tokens
    from pair_tokens
    join chosen_at
        on chosen_at.run_id = pair_tokens.run_id
    group by
        pair_tokens.run_id,
        pair_tokens.other_expert,
        chosen_at.top_k
),
all_tokens as (
    select
        pair_tokens.run_id as run_id,
        sum(pair_tokens.tokens)::double / (chosen_at.top_k * chosen_at.other_top_k) as tokens
    from pair_tokens
    join chosen_at
        on chosen_at.run_id = pair_tokens.run_id
    group by
        pair_tokens.run_id,
        chosen_at.top_k,
        chosen_at.other_top_k
)
select
    pair_tokens.run_id as run_id,
    pair_tokens.expert as expert,
    pair_tokens.other_expert as other_expert,
    pair_tokens.tokens as tokens,
    pair_tokens.tokens / (here_tokens.tokens + there_tokens.tokens - pair_tokens.tokens) as jaccard,
    pair_tokens.tokens * all_tokens.tokens / (here_tokens.tokens * there_tokens.tokens) as lift
from pair_tokens
join here_tokens
    on here_tokens.run_id = pair_tokens.run_id
    and here_tokens.expert = pair_tokens.expert
join there_tokens
    on there_tokens.run_id = pair_tokens.run_id
    and there_tokens.other_expert = pair_tokens.other_expert
join all_tokens
    on all_tokens.run_id = pair_tokens.run_id
order by pair_tokens.run_id, jaccard desc, pair_tokens.expert, pair_tokens.other_expert
