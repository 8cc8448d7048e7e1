-- experts_in_range: every expert in routing exists in its layer, and every layer exists in its run.
-- One row per run, segment, layer and expert that does not exist, with its number of rows.
-- Parameters:
--   run (run): default every run.
select
    routing.run_id as run_id,
    routing.segment as segment,
    routing.layer as layer,
    routing.expert as expert,
    count(*)::bigint as routing_rows
from routing
left join experts
    on experts.run_id = routing.run_id
    and experts.layer = routing.layer
    and experts.expert = routing.expert
where experts.expert is null
    and (getvariable('run') is null or routing.run_id = getvariable('run')::varchar)
group by
    routing.run_id,
    routing.segment,
    routing.layer,
    routing.expert
order by run_id, segment, layer, expert
