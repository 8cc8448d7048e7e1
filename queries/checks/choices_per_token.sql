-- choices_per_token: a token has exactly top_k rows at a layer, or none.
-- One row per run, segment, layer and token with any other number of rows.
-- Parameters:
--   run (run): default every run.
select
    routing.run_id as run_id,
    routing.segment as segment,
    routing.layer as layer,
    routing.token_id as token_id,
    count(*)::bigint as choices,
    layers.top_k as top_k
from routing
join layers
    on layers.run_id = routing.run_id
    and layers.layer = routing.layer
where (getvariable('run') is null or routing.run_id = getvariable('run')::varchar)
group by
    routing.run_id,
    routing.segment,
    routing.layer,
    routing.token_id,
    layers.top_k
having count(*) <> layers.top_k
order by run_id, segment, layer, token_id
