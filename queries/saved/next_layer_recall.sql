-- next_layer_recall: how well an expert chosen at a layer predicts the experts of the next layer (prefetching).
-- One row per run, layer and next layer. Over tokens of kind prompt and generated routed at both layers; N_ij of them go
-- from expert i to expert j (layer_transitions). Each expert i that a token chooses predicts the C experts j with the
-- largest N_ij (ties: the lowest):
--   recall         = share of all transitions i to j whose j is among the C predictions of i
--   recall_by_load = the same if every expert predicts the C most used experts of the next layer
--   random         = C / E' with E' experts in the next layer: recall of random predictions
-- Each choice predicts independently: pooling a token's k choices can do better. Predictions and recall use the same
-- counts, so recall is too high with few tokens per expert. Compare recall with recall_by_load.
-- Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   guesses (count): C; default the experts per token at the next layer.
--   run (run): default every run.
--   layer (layer): default every layer.
with moves as (
    select
        layer_transitions.run_id as run_id,
        layer_transitions.layer as layer,
        layer_transitions.next_layer as next_layer,
        layer_transitions.expert as expert,
        layer_transitions.next_expert as next_expert,
        layer_transitions.tokens as tokens,
        least(coalesce(getvariable('guesses'), there.top_k), there.num_experts) as guesses,
        there.num_experts as num_experts,
        here.top_k * there.top_k as pairs_per_token
    from layer_transitions
    join layers as here
        on here.run_id = layer_transitions.run_id
        and here.layer = layer_transitions.layer
    join layers as there
        on there.run_id = layer_transitions.run_id
        and there.layer = layer_transitions.next_layer
    where (getvariable('run') is null or layer_transitions.run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer_transitions.layer = getvariable('layer'))
),
next_loads as (
    select
        run_id,
        layer,
        next_expert,
        sum(tokens)::bigint as tokens
    from moves
    group by
        run_id,
        layer,
        next_expert
),
next_places as (
    select
        run_id,
        layer,
        next_expert,
        row_number() over (partition by run_id, layer order by tokens desc, next_expert asc) as place
    from next_loads
),
ranked as (
    select
        moves.run_id as run_id,
        moves.layer as layer,
        moves.next_layer as next_layer,
        moves.tokens as tokens,
        moves.guesses as guesses,
        moves.num_experts as num_experts,
        moves.pairs_per_token as pairs_per_token,
        next_places.place as place_by_load,
        row_number() over (
            partition by moves.run_id, moves.layer, moves.expert
            order by moves.tokens desc, moves.next_expert asc
        ) as place
    from moves
    join next_places
        on next_places.run_id = moves.run_id
        and next_places.layer = moves.layer
        and next_places.next_expert = moves.next_expert
)
select
    run_id,
    layer,
    next_layer,
    round(sum(tokens)::double / max(pairs_per_token))::bigint as tokens,
    max(guesses) as guesses,
    sum(case when place <= guesses then tokens else 0 end)::double / nullif(sum(tokens), 0) as recall,
    sum(case when place_by_load <= guesses then tokens else 0 end)::double / nullif(sum(tokens), 0) as recall_by_load,
    max(guesses)::double / max(num_experts) as random
from ranked
group by
    run_id,
    layer,
    next_layer
order by run_id, layer
