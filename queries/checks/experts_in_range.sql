-- experts_in_range: every expert of routing is one of its layer's, and every layer is one of its run's.
-- One row per run, segment, layer and expert that is not, with the rows that have it.
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
