-- segment_totals: a segment has as many prompts, tokens and routing rows as its segment.parquet states.
-- One row per run and segment that does not.
-- Parameters:
--   run (run): default every run.
with prompt_counts as (
    select
        run_id,
        segment,
        count(*)::bigint as prompts
    from prompts
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
    group by
        run_id,
        segment
),
token_counts as (
    select
        run_id,
        segment,
        count(*)::bigint as tokens
    from tokens
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
    group by
        run_id,
        segment
),
routing_counts as (
    select
        run_id,
        segment,
        count(*)::bigint as routing_rows
    from routing
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
    group by
        run_id,
        segment
)
select
    segments.run_id as run_id,
    segments.segment as segment,
    segments.prompts as prompts,
    coalesce(prompt_counts.prompts, 0) as prompts_found,
    segments.tokens as tokens,
    coalesce(token_counts.tokens, 0) as tokens_found,
    segments.routing_rows as routing_rows,
    coalesce(routing_counts.routing_rows, 0) as routing_rows_found
from segments
left join prompt_counts
    on prompt_counts.run_id = segments.run_id
    and prompt_counts.segment = segments.segment
left join token_counts
    on token_counts.run_id = segments.run_id
    and token_counts.segment = segments.segment
left join routing_counts
    on routing_counts.run_id = segments.run_id
    and routing_counts.segment = segments.segment
where (getvariable('run') is null or segments.run_id = getvariable('run')::varchar)
    and (
        segments.prompts is distinct from coalesce(prompt_counts.prompts, 0)
        or segments.tokens is distinct from coalesce(token_counts.tokens, 0)
        or segments.routing_rows is distinct from coalesce(routing_counts.routing_rows, 0)
    )
order by run_id, segment
