-- confidence_by_expert: how sure the router is when it chooses each expert.
-- One row per run, layer and expert chosen at least once, over tokens of kind prompt and generated with raw logits
-- (runs ingested with --router-logits). Means of router_confidence over the expert's tokens: entropy (bits),
-- top_k_mass, margin.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
select
    routing.run_id as run_id,
    routing.layer as layer,
    routing.expert as expert,
    count(*)::bigint as tokens,
    avg(router_confidence.entropy) as entropy,
    avg(router_confidence.top_k_mass) as top_k_mass,
    avg(router_confidence.margin) as margin
from router_confidence
join routing
    on routing.run_id = router_confidence.run_id
    and routing.segment = router_confidence.segment
    and routing.token_id = router_confidence.token_id
    and routing.layer = router_confidence.layer
where routing.kind <> 'special'
    and (getvariable('run') is null or router_confidence.run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or router_confidence.layer = getvariable('layer'))
group by
    routing.run_id,
    routing.layer,
    routing.expert
order by run_id, layer, expert
