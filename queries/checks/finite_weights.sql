-- finite_weights: no weight is infinite or NaN. NULL is allowed: imported traces may have expert ids only.
-- One row per run, segment, layer and expert with such weights, with their number of rows.
-- Parameters:
--   run (run): default every run.
select
    run_id,
    segment,
    layer,
    expert,
    count(*)::bigint as routing_rows
from routing
where not abs(weight) < 'infinity'::float
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
group by
    run_id,
    segment,
    layer,
    expert
order by run_id, segment, layer, expert
