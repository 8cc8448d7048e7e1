-- co_routing_sums: each of an expert's tokens has top_k - 1 other experts, so the sum of conditional over all expert_b
-- is top_k - 1. Pairs and load are counted separately; this check compares them. A run imported as counts only (no
-- routing rows) has no pairs and is skipped.
-- One row per run, layer and expert whose pairs are not top_k - 1 times its tokens.
-- Parameters:
--   run (run): default every run.
with pairs_of as (
    select
        run_id,
        layer,
        expert_a as expert,
        sum(tokens)::bigint as pairs
    from co_routing
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
    group by
        run_id,
        layer,
        expert_a
)
select
    expert_load.run_id as run_id,
    expert_load.layer as layer,
    expert_load.expert as expert,
    expert_load.tokens as tokens,
    coalesce(pairs_of.pairs, 0) as pairs,
    expert_load.tokens * (layers.top_k - 1) as expected
from expert_load
join layers
    on layers.run_id = expert_load.run_id
    and layers.layer = expert_load.layer
left join pairs_of
    on pairs_of.run_id = expert_load.run_id
    and pairs_of.layer = expert_load.layer
    and pairs_of.expert = expert_load.expert
where (getvariable('run') is null or expert_load.run_id = getvariable('run')::varchar)
    and expert_load.run_id in (select segments.run_id from segments where segments.routing_rows > 0)
    and coalesce(pairs_of.pairs, 0) <> expert_load.tokens * (layers.top_k - 1)
order by run_id, layer, expert
