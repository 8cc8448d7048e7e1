-- prompt_tokens: prompts.num_tokens equals the number of the prompt's rows in tokens.
-- One row per run, segment and prompt where they differ.
-- Parameters:
--   run (run): default every run.
with token_counts as (
    select
        run_id,
        segment,
        prompt_id,
        count(*)::bigint as tokens
    from tokens
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
    group by
        run_id,
        segment,
        prompt_id
)
select
    prompts.run_id as run_id,
    prompts.segment as segment,
    prompts.prompt_id as prompt_id,
    prompts.num_tokens as num_tokens,
    coalesce(token_counts.tokens, 0) as tokens
from prompts
left join token_counts
    on token_counts.run_id = prompts.run_id
    and token_counts.segment = prompts.segment
    and token_counts.prompt_id = prompts.prompt_id
where prompts.num_tokens is distinct from coalesce(token_counts.tokens, 0)
    and (getvariable('run') is null or prompts.run_id = getvariable('run')::varchar)
order by run_id, segment, prompt_id
