-- known_tokens: every routed token is in tokens, and every token's prompt is in prompts, in the same segment.
-- One row per run, segment and token without its row in one of them; lacks is the table.
-- Parameters:
--   run (run): default every run.
with routed as (
    select distinct
        run_id,
        segment,
        token_id
    from routing
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
)
select
    routed.run_id as run_id,
    routed.segment as segment,
    routed.token_id as token_id,
    'tokens' as lacks
from routed
left join tokens
    on tokens.run_id = routed.run_id
    and tokens.segment = routed.segment
    and tokens.token_id = routed.token_id
where tokens.token_id is null
union all
select
    tokens.run_id as run_id,
    tokens.segment as segment,
    tokens.token_id as token_id,
    'prompts' as lacks
from tokens
left join prompts
    on prompts.run_id = tokens.run_id
    and prompts.segment = tokens.segment
    and prompts.prompt_id = tokens.prompt_id
where prompts.prompt_id is null
    and (getvariable('run') is null or tokens.run_id = getvariable('run')::varchar)
order by run_id, segment, token_id, lacks
