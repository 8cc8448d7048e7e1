-- positions: a prompt's tokens have the positions 0 to n - 1, each once, and token_id = prompt_id * 2^24 + position.
-- One row per run, segment and prompt whose tokens violate this.
-- Parameters:
--   run (run): default every run.
select
    run_id,
    segment,
    prompt_id,
    count(*)::bigint as tokens,
    min(position) as first_position,
    max(position) as last_position,
    count(distinct position)::bigint as positions,
    sum(case when token_id = prompt_id * 16777216 + position then 0 else 1 end)::bigint as wrong_ids
from tokens
where (getvariable('run') is null or run_id = getvariable('run')::varchar)
group by
    run_id,
    segment,
    prompt_id
having min(position) <> 0
    or max(position) <> count(*) - 1
    or count(distinct position) <> count(*)
    or sum(case when token_id = prompt_id * 16777216 + position then 0 else 1 end) > 0
order by run_id, segment, prompt_id
