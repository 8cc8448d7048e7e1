-- finite_logits: no raw router logit is infinite or NaN (runs ingested with --router-logits).
-- One row per run, segment, layer and token with such logits, with their number.
-- Parameters:
--   run (run): default every run.
with all_logits as (
    select
        run_id,
        segment,
        layer,
        token_id,
        unnest(logits) as logit
    from router_logits
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
)
select
    run_id,
    segment,
    layer,
    token_id,
    count(*)::bigint as logits
from all_logits
where logit is null
    or not abs(logit) < 'infinity'::float
group by
    run_id,
    segment,
    layer,
    token_id
order by run_id, segment, layer, token_id
